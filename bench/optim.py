"""`tribp.optim`: a step of every optimizer, on parameters of many shapes and types, beside other libraries'."""

import functools
import importlib
import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from tribp import optim
from tribp.dispatch import dtype_name
from tribp.launch.arch import Arch, cdiv

from .expectations import Expectation, Launch, threads, vectors
from .operation import TOLERANCE, Action, Given, KernelTests, Operation, Reference, Target, Work

Shapes = Sequence[tuple[int, ...]]

# An element's additions, multiplications, divisions and roots, counted from the formulas without options (SGD: with
# momentum): where the roofline shows the step. Memory bounds it wherever these numbers lie.
OPERATIONS = {
    "Adam": 13, "AdamW": 14, "RMSprop": 9, "Adagrad": 7, "SGD": 4, "Momentum": 4,
    "Adadelta": 13, "Adamax": 9, "NAdam": 16, "RAdam": 13, "Rprop": 8, "ASGD": 6,
}  # fmt: skip


@dataclass(frozen=True)
class StepCase:
    """One optimizer on one set of parameters."""

    optimizer: str  # tribp's class
    shapes_name: str
    shapes: Shapes
    dtype: torch.dtype = torch.float32
    options: Mapping[str, Any] = field(default_factory=dict)  # that torch has too
    beyond: Mapping[str, Any] = field(default_factory=dict)  # that it has not
    scaler: bool = False  # under a GradScaler
    grouped: bool = True  # False: a parameter group for every tensor
    small: bool = False  # bound by its launches: wall clock, time on the host, time in a CUDA graph
    irregular: bool = False  # besides: a strided tensor, groups with and without a state, hyperparameters on the device
    tf32 = False

    @property
    def dtype_name(self) -> str:
        return dtype_name(self.dtype)

    @property
    def name(self) -> str:
        on = [key if value is True else f"{key}={value}" for key, value in {**self.options, **self.beyond}.items()]
        on = [word.replace("torch.", "") for word in on] + ["scaler"] * self.scaler
        return " ".join([self.optimizer, *on, self.shapes_name, self.dtype_name])

    @property
    def lengths(self) -> list[int]:
        return [math.prod(shape) for shape in self.shapes]

    @property
    def elements(self) -> int:
        return sum(self.lengths)

    @property
    def clip(self) -> float | None:
        return self.beyond.get("max_grad_norm")

    def make(self, groups: "Groups", **capture: Any) -> Any:
        """tribp's optimizer."""
        fixed = {"lr": LR, **self.options, **self.beyond} | ({"fused": True} if self.scaler else {})
        return getattr(optim, self.optimizer)(groups, **fixed, **capture)


# -- cases ------------------------------------------------------------------------------------------------------------


def gpt2() -> Shapes:
    """GPT-2's parameters: 124 M in 148 tensors."""
    n = 768
    norm = [(n,), (n,)]
    attention = [(n, 3 * n), (3 * n,), (n, n), (n,)]
    perceptron = [(n, 4 * n), (4 * n,), (4 * n, n), (n,)]
    return [(50257, n), (1024, n), *12 * [*norm, *attention, *norm, *perceptron], *norm]


def resnet50() -> Shapes:
    """ResNet-50's parameters: 25.6 M in 161 tensors."""

    def conv(outputs: int, inputs: int, size: int) -> list[tuple[int, ...]]:
        return [(outputs, inputs, size, size), (outputs,), (outputs,)]  # and its batch normalization

    shapes, inputs = conv(64, 3, 7), 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            shapes += [*conv(width, inputs, 1), *conv(width, width, 3), *conv(4 * width, width, 1)]
            if block == 0:
                shapes += conv(4 * width, inputs, 1)
            inputs = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


MOMENTUM = {"momentum": 0.9}
ALL: dict[str, Mapping[str, Any]] = {"SGD": MOMENTUM, "Adagrad": {}, "RMSprop": {}}
UNFUSED = ("Adadelta", "Adamax", "NAdam", "RAdam", "Rprop", "ASGD")  # in torch
LARGE, HUGE = ("1e8", [(10**8,)]), ("1e9", [(10**9,)])
BF16, FP16, FP32, FP64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
BITS = {"state_bits": 8, "master_bits": 24}
STOCHASTIC = {"state_dtype": FP32, "stochastic_rounding": True}


def variants(shapes: tuple[str, Shapes]) -> Iterator[StepCase]:
    """Types and options, on the same tensors."""
    adam = StepCase("Adam", *shapes)
    yield replace(adam, dtype=BF16)
    yield replace(adam, dtype=BF16, beyond={"state_dtype": FP32})
    yield replace(adam, dtype=BF16, beyond=STOCHASTIC)
    yield replace(adam, dtype=BF16, beyond=BITS)
    yield replace(adam, options={"amsgrad": True})
    yield StepCase("RMSprop", *shapes, options={"centered": True, **MOMENTUM})
    yield replace(adam, scaler=True)
    yield replace(adam, beyond={"max_grad_norm": 1.0})


def cases() -> list[StepCase]:
    """The most valuable first: a run may be cut off."""
    lengths = [(f"1000x{n}", [(n,)] * 1000) for n in (8, 64, 512, 4096)]
    ruled = {"Adam": {}, **ALL}.items()
    return [
        *(StepCase(name, *LARGE, options=options) for name, options in ruled),
        *(StepCase(name, *LARGE) for name in ("AdamW", *UNFUSED)),
        *(StepCase(name, *shapes, options=options, small=True) for name, options in ruled for shapes in lengths),
        StepCase("Adam", "gpt2", gpt2()),
        StepCase("Adam", "resnet50", resnet50(), small=True),
        StepCase("Adam", "465 groups of 8", [(8,)] * 465, grouped=False, small=True),
        *variants(LARGE),
        StepCase("Adam", "gpt2", gpt2(), beyond={"max_grad_norm": 1.0}),
        StepCase("SGD", *LARGE),
        *(StepCase(name, *lengths[0], small=True) for name in UNFUSED),
        *(StepCase(name, *HUGE, options=options) for name, options in ruled),
    ]


def smoke_cases() -> list[StepCase]:
    """Interpreted, a program of 128 elements costs 6 ms."""
    two = ("70+9", [(70,), (3, 3)])
    return [
        StepCase("Adam", *two, small=True),
        *(StepCase(name, *two, options=options) for name, options in ALL.items()),
        *(StepCase(name, "70", [(70,)]) for name in ("AdamW", *UNFUSED)),
        StepCase("Adam", "3 groups of 8", [(8,)] * 3, grouped=False, small=True),
        *variants(two),
    ]


def work(case: StepCase, direction: str) -> Work:
    """All is read once, and what changes written once; clipping and unscaling read the gradients once more."""
    on = case.options
    states = {
        "Adam": 2 + on.get("amsgrad", False),
        "RMSprop": 1 + on.get("centered", False) + ("momentum" in on),
        "Adagrad": 1,
        "SGD": int("momentum" in on),
        "ASGD": 1,
    }.get(case.optimizer, 2)
    grads = 1 + case.scaler + (case.clip is not None)
    state_size = case.beyond.get("state_dtype", case.dtype).itemsize
    if "state_bits" in case.beyond:
        state_size = 1 + 4 / 32  # and a scale for 32 numbers
    moved = (2 + grads) * case.dtype.itemsize + 2 * states * state_size + 2 * ("master_bits" in case.beyond)
    return Work(moved * case.elements, OPERATIONS[case.optimizer] * case.elements)


def targets(case: StepCase, direction: str) -> list[Target]:
    """What was set for an H100."""
    targets = [Target("", 1 if case.clip is None else 2, "launches")]
    bare = case.dtype == torch.float32 and not case.beyond and not case.scaler
    ruled = case.options == ({"momentum": 0.9} if case.optimizer == "SGD" else {})  # Momentum is SGD with momentum
    if bare and ruled and case.shapes_name == "1e8":
        # Where torch has no fused step, what torch.compile makes of it stands beside, without a target.
        peer = Target("eager", 2.3) if case.optimizer in ("RMSprop", *UNFUSED) else Target("fused", 1.0)
        targets += [Target("copy", 0.92, "bandwidth"), peer, Target("for-loop", 1.001, "held memory")]
    if bare and ruled and case.shapes_name.startswith("1000x") and case.optimizer not in ("RMSprop", *UNFUSED):
        targets.append(Target("fused", 5.0))
    return targets


# -- providers --------------------------------------------------------------------------------------------------------

LR = 1e-2
STEPS = 3  # that are checked
SCALE = 1024.0  # a GradScaler's, in the check; 1 while timing, which unscales the same gradients again and again
WHOLE = 1 << 27  # elements up to which all of them are checked; of larger tensors both ends and a spread
PEERS = ("for-loop", "foreach", "fused", "compile", "apex", "bitsandbytes")

Groups = list[dict[str, Any]]


@dataclass(frozen=True)
class Provider:
    """An optimizer. `make` takes parameter groups, and `capturable` where a CUDA graph is to hold the step."""

    make: Callable[..., Any]
    unscales: bool = False  # the step itself unscales gradients
    clips: bool = False  # the step itself clips gradients
    compiled: bool = False  # by torch.compile


def providers(case: StepCase, without_compile: str = "") -> dict[str, Provider | str]:
    """By name; in place of one that is left out, a sentence."""
    options, beyond = case.options, case.beyond.keys()
    capturable = case.optimizer in ("Adam", "AdamW", "RMSprop", *UNFUSED)

    def torchs(**how: bool) -> Callable[..., Any]:
        return _maker("torch.optim", case.optimizer, {**options, **how}, capturable)

    lacking = [key for key in ("state_dtype", "stochastic_rounding", "state_bits") if key in beyond]
    without = f"torch has no {' and no '.join(lacking)}" if lacking else ""
    unfused = f"torch has no fused {case.optimizer}" if case.optimizer in ("RMSprop", *UNFUSED) else ""
    there: dict[str, Provider | str] = {
        "tribp": Provider(case.make, unscales=True, clips=True),
        "for-loop": without or Provider(torchs(foreach=False)),
        "foreach": without or Provider(torchs(foreach=True)),
        "fused": without or unfused or Provider(torchs(fused=True), unscales=True),
        "compile": without or without_compile or Provider(torchs(), compiled=True),
        "apex": "apex has no such optimizer",
        "bitsandbytes": "bitsandbytes has no such optimizer",
    }
    if case.optimizer not in UNFUSED and not case.scaler and not set(options) - {"momentum"}:
        if case.optimizer != "RMSprop" and not {"stochastic_rounding", "state_bits"} & beyond:
            adam = case.optimizer in ("Adam", "AdamW")
            decays = {"adam_w_mode": case.optimizer == "AdamW"} if adam else {}
            name = f"Fused{case.optimizer.removesuffix('W')}"
            there["apex"] = _installed("apex.optimizers", name, {**options, **decays}, adam)
        if not beyond and (case.optimizer != "SGD" or options):
            there["bitsandbytes"] = _installed("bitsandbytes.optim", f"{case.optimizer}32bit", options, False)
    return there


def _maker(module: str, name: str, options: Mapping[str, Any], can_capture: bool) -> Callable[..., Any]:
    """can_capture: whether the optimizer knows `capturable`."""

    def make(groups: Groups, capturable: bool = False) -> Any:
        capture = {"capturable": True} if capturable and can_capture else {}
        return getattr(importlib.import_module(module), name)(groups, lr=LR, **options, **capture)

    return make


def _installed(module: str, *how: Any) -> Provider | str:
    return Provider(_maker(module, *how)) if importlib.util.find_spec(module.split(".")[0]) else "not installed"


class Job:
    """A provider with parameters and gradients of its own, the same for all providers."""

    def __init__(self, case: StepCase, provider: Provider, device: torch.device, **options: bool) -> None:
        self.case, self.device, self.provider = case, device, provider
        torch.manual_seed(0)
        self.params = [
            Parameter(torch.empty(shape, dtype=case.dtype, device=device).normal_(0, 0.1)) for shape in case.shapes
        ]
        groups: Groups = [{"params": self.params}] if case.grouped else [{"params": [p]} for p in self.params]
        if case.irregular:
            strided = Parameter(torch.empty(64, 64, dtype=case.dtype, device=device)[:, 1:])
            self.params, groups = [*self.params, strided], [*groups, {"params": [strided], "amsgrad": False}]
            groups[0]["eps"] = torch.tensor(1e-8, device=device)
        self.grads = [torch.empty_like(p.data) for p in self.params]
        self.optimizer = provider.make(groups, **options)
        self._scale, self._found_inf = torch.ones((), device=device), torch.zeros((), device=device)
        self._update = torch.compile(self.optimizer.step) if provider.compiled else self.optimizer.step

    def gradients(self, step: int, scale: float = 1.0) -> None:
        """Those of a step, which are the same each time."""
        torch.manual_seed(step)
        for p, grad in zip(self.params, self.grads, strict=True):
            p.grad = grad.normal_().mul_(scale)
        self._scale.fill_(scale)

    def renew(self) -> None:
        """Gradients as a backward pass leaves them: new tensors."""
        for p in self.params:
            p.grad = None
        torch.autograd.backward(self.params, self.grads)

    def step(self) -> None:
        """All that a training loop does between the backward pass and the next forward one."""
        if self.case.scaler:
            if self.provider.unscales:
                self.optimizer.grad_scale, self.optimizer.found_inf = self._scale, self._found_inf
            else:
                grads = [p.grad for p in self.params]
                inverse = self._scale.reciprocal()
                torch._amp_foreach_non_finite_check_and_unscale_(grads, self._found_inf, inverse)  # type: ignore[arg-type]
                if self._found_inf.item():
                    return
        if self.case.clip is not None and not self.provider.clips:
            torch.nn.utils.clip_grad_norm_(self.params, self.case.clip)
        self._update()

    def moments(self) -> dict[str, list[Tensor]]:
        """The states that are as large as their parameters, by name."""
        return {
            name: [self.optimizer.state[p][name] for p in self.params]
            for name, value in self.optimizer.state[self.params[0]].items()
            if isinstance(value, Tensor) and value.shape == self.params[0].shape and value.is_floating_point()
        }


@dataclass(frozen=True)
class StepWorkload:
    """The results of STEPS steps: the parameters, and every state by its name, of all tensors in a row."""

    case: StepCase
    device: torch.device

    def sample(self, tensors: Sequence[Tensor]) -> Tensor:
        """All elements, or of more than WHOLE those where a wrong offset would show."""
        flat = tensors[0].detach().view(-1)
        if len(tensors) > 1:
            flat = torch.cat([t.detach().reshape(-1) for t in tensors])
        if len(flat) <= WHOLE:
            return flat.clone()
        return torch.cat([flat[: 1 << 20], flat[::997], flat[-(1 << 20) :]])

    @functools.cached_property
    def reference(self) -> Mapping[str, Reference]:
        """By the genuine class in float64. Every update is one of single elements, so that a sample will do."""
        job = Job(self.case, Provider(torch.optim.SGD), self.device)
        p = Parameter(self.sample(job.params).double())
        assert self.case.clip is None or self.case.elements <= WHOLE, "a norm of all gradients needs them all"
        exact = getattr(torch.optim, self.case.optimizer)([p], LR, **self.case.options, foreach=False)
        for step in range(STEPS):
            job.gradients(step)
            p.grad = self.sample(job.grads).double()
            if self.case.clip is not None:
                torch.nn.utils.clip_grad_norm_([p], self.case.clip)
            exact.step()
        tensors = {"param": p.detach()}
        tensors |= {k: v for k, v in exact.state[p].items() if isinstance(v, Tensor) and v.shape == p.shape}
        return {name: Reference(value, float(value.norm())) for name, value in tensors.items()}

    def results(self, provider: Provider, direction: str) -> dict[str, Tensor]:
        job = Job(self.case, provider, self.device)
        for step in range(STEPS):
            job.gradients(step, SCALE if self.case.scaler else 1.0)
            job.step()
        tensors = {"param": self.sample(job.params)}
        return tensors | {name: self.sample(value) for name, value in job.moments().items() if name in self.reference}

    def action(self, provider: Provider, direction: str, *, captured: bool = False) -> Action:
        job = Job(self.case, provider, self.device, **{"capturable": True} if captured else {})
        job.gradients(0)
        return Action(job.step, job.renew)

    def allowed(self, name: str, baseline: float) -> float:
        """One rounding of the type a step, or twice the error of torch's for-loop where that is a little more; not
        where it is much more, for then the comparison is at fault. Rounding at random goes up to a whole unit in the
        last place, not half.
        """
        is_param = name == "param"
        limit = TOLERANCE[self.case.dtype if is_param else self.case.beyond.get("state_dtype", self.case.dtype)]
        if is_param and "stochastic_rounding" in self.case.beyond:
            limit *= 2
        if "state_bits" in self.case.beyond:
            limit *= 4  # three steps of lr 0.01 with moments that are 1 % off, on parameters of 0.1
        return max(limit, min(2 * baseline, 4 * limit))


def call(case: StepCase) -> None:
    """A step on CPU tensors, of which those of one dimension are cut: longer ones are launched alike."""
    short = replace(case, shapes=[shape if len(shape) > 1 else (min(*shape, 1 << 24),) for shape in case.shapes])
    job = Job(short, Provider(short.make, unscales=True, clips=True), torch.device("cpu"))
    job.gradients(1)
    job.step()


# -- kernels ----------------------------------------------------------------------------------------------------------


DTYPES = (FP32, BF16, FP16, FP64)
CLIP: dict[str, Any] = {"max_grad_norm": 1.0}
ADAM = StepCase("Adam", "1000+4M", [(1000,), (1 << 22,)])
EVERYTHING = replace(
    ADAM, options={"amsgrad": True}, beyond={**CLIP, "ema_decay": 0.9, "eps_inside_sqrt": True}, scaler=True,
    irregular=True,
)  # fmt: skip

# What is compiled without a GPU, in which types; with --all every case in every type.
SELECTION: list[tuple[StepCase, Sequence[torch.dtype]]] = [
    (ADAM, DTYPES),
    (replace(ADAM, optimizer="SGD"), (FP32,)),
    (replace(ADAM, optimizer="Momentum"), (FP32,)),
    (replace(ADAM, optimizer="RMSprop"), (FP32,)),
    (replace(ADAM, optimizer="RMSprop", options={"centered": True, **MOMENTUM}), ()),
    (replace(ADAM, optimizer="Adagrad"), (FP32,)),
    *((replace(ADAM, optimizer=name), (FP32,)) for name in UNFUSED),
    (replace(ADAM, beyond=CLIP), (FP32,)),
    (replace(ADAM, options={"amsgrad": True}), ()),
    (replace(ADAM, scaler=True), ()),
    (replace(ADAM, beyond={"ema_decay": 0.9}), ()),
    (replace(ADAM, beyond={"state_dtype": FP32}), (BF16,)),
    (replace(ADAM, beyond={"stochastic_rounding": True}), ()),
    (replace(ADAM, beyond=BITS), (BF16,)),
    (replace(ADAM, optimizer="RMSprop", options={"centered": True, **MOMENTUM}, beyond=BITS), ()),
    (replace(ADAM, optimizer="SGD", options=MOMENTUM, beyond={"state_bits": 8}), ()),
    (EVERYTHING, ()),
    (replace(EVERYTHING, beyond={**EVERYTHING.beyond, **BITS, "stochastic_rounding": True}), ()),
    (replace(EVERYTHING, beyond={**EVERYTHING.beyond, **STOCHASTIC}), (BF16,)),
]


def compiled(everything: bool) -> Iterator[tuple[StepCase, Sequence[str]]]:
    for case, some in SELECTION:
        every = [BF16] if "stochastic_rounding" in case.beyond else DTYPES
        yield from ((replace(case, dtype=dtype), ("step",)) for dtype in (every if everything else some))


def expectations(launch: Launch, case: StepCase, arch: Arch) -> Iterator[Expectation]:
    """Every operand of a full, aligned block is read, and if it changes written, 16 bytes at a time."""
    given = launch.named
    # The smaller blocks of strided tensors, and of float64 for 64 threads a warp, make do with narrower ones.
    float64_on_amd = arch.backend == "hip" and given["GRAD_TYPE"].primitive_bitwidth == 64
    least = 0 if given["LAYOUT_DIMS"] or float64_on_amd else 1

    def count(*names: str) -> int:
        """16-byte accesses a thread."""
        bits = [given[name].primitive_bitwidth for name in names if given[name] is not None]
        share = 128 * threads(launch, arch)
        return sum(max(least, given["BLOCK"] * n // share) for n in bits if n > 8)  # 8 of 8 bits are half an access

    if launch.kernel.__name__ == "gradient_norm":
        yield vectors(count("GRAD_TYPE"), 0, "a gradient is read in whole vectors")
        return
    written = count(*(name for name in TYPES if name != "GRAD_TYPE"))
    unscales = isinstance(given["grad_scale"], Tensor)
    scaled = count("GRAD_TYPE") if unscales else 0
    yield vectors(count("GRAD_TYPE") + written, scaled + written, "full, aligned blocks go in whole vectors")
    if given["CODED"] and not unscales:
        yield Expectation(
            "approximate", lambda code: f"{n} exact divisions" if (n := code.counts.get("FCHK")) else None,
            "beside codes the last place is nothing, and exact divisions and roots are a quarter of the instructions",
        )  # fmt: skip


TYPES = ("PARAM_TYPE", "GRAD_TYPE", "STATE0_TYPE", "STATE1_TYPE", "STATE2_TYPE", "EMA_TYPE")


def step_work(given: Given, grid: tuple[int, ...], case: StepCase) -> dict[str, Any]:
    """An optimizer's step, or the norm before it. A program reads four tables before its first element (which chunk,
    its tensor's row, the hyperparameters and the counter's address, the counter), and counts itself at the end."""
    sizes = {name: given[name].primitive_bitwidth // 8 for name in TYPES if given.get(name) is not None}
    if given.get("RULE"):
        sizes["scales"] = 4 / 32 * sum(size == 1 for size in sizes.values())
        sizes["RESIDUAL"] = int(given["RESIDUAL"])
    moved = sizes["GRAD_TYPE"]
    if "RULE" in given:
        moved = 2 * sum(sizes.values()) - (0 if isinstance(given["grad_scale"], Tensor) else moved)
    block, lengths = given["BLOCK"], case.lengths
    return dict(
        tensors={id(given["grads"]): float(case.elements * moved)},
        turns=min(given["chunk_blocks"], max(cdiv(n, block) for n in lengths)),
        step=block * sum(sizes.values()),
        chain=5,
    )


OPERATION = Operation(
    name="optim",
    summary="a step of tribp.optim beside torch.optim's and other libraries'",
    cases=cases(),
    smoke_cases=smoke_cases(),
    directions=("step",),
    baseline="for-loop",
    peers=PEERS,
    best_of={"eager": ("for-loop", "foreach", "fused")},
    providers=providers,
    workload=StepWorkload,
    work=work,
    targets=targets,
    compiled=compiled,
    expectations=expectations,
    kernel_work={"multi_tensor_step": step_work, "gradient_norm": step_work},
    call=call,
    tests=KernelTests(
        ["tests/optim/test_gpu.py"],
        ["tests/optim/test_gpu.py", "-k", "nothing_waits or gradscaler or other_backend"],
        ["tests/optim/test_plan.py", "-k", "a_plan_is_kept"],
        kernels=["tests/optim/test_kernels.py"],
    ),
    columns=("case", "clock", "tribp", *PEERS, "vs fused", "of floor", "launches", "busy", "host", "graph", "extra MB"),
    legend="Times are medians in µs: on the device with L2 flushed, or (wall) from the call until the device is done, "
    "with new gradients each step. Ratios are the other's time over tribp's. The floor: bytes a step must move over "
    "the copy's rate; of it, in parts of the time on the device.",
    small_clock="wall",
    products=False,
    graph_calls=1,  # that is how a training step is captured
)
