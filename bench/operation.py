"""What the bench knows of an operation. Every command iterates over the operations and reads this alone.

To add one: a file in this folder that ends in `OPERATION = Operation(…)`. Nothing else names it.
"""

import contextlib
import functools
import importlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from tribp.dispatch import dtype_name
from tribp.launch.arch import Arch

from .expectations import Expectation, Launch

Given = Mapping[str, Any]  # a launch's arguments and constants by name


@dataclass(frozen=True)
class Case:
    """One thing to measure: a shape (what its numbers mean is the operation's business), a type, a precision."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    tf32: bool = False
    small: bool = False  # a launch costs as much as the work: the host and a CUDA graph are timed as well

    @property
    def dtype_name(self) -> str:
        name = dtype_name(self.dtype)
        return f"{name} tf32" if self.tf32 else name

    @property
    def name(self) -> str:
        return f"{'x'.join(map(str, self.shape))} {self.dtype_name}"

    def normal(self, device: torch.device, *shape: int, std: float = 1.0) -> Tensor:
        """Fresh numbers of the type, as a float32 tensor would round to them."""
        return (std * torch.randn(shape, device=device, dtype=torch.float32)).to(self.dtype)


class Work(NamedTuple):
    """The least that must be done: bytes read and written once, and operations of the case's type."""

    bytes: float
    operations: float


class Reference(NamedTuple):
    """A float64 result, and the size its error is measured against (the norm of a sum's terms, where it can cancel)."""

    value: Tensor
    scale: float


class Target(NamedTuple):
    """tribp is to be `ratio` times as fast as `peer`, or to keep the limit that another quantity sets.

    memory: the peer's peak over tribp's. held memory: tribp's between calls over the peer's, at most. bandwidth: the
    part of the copy's rate. launches: exactly so many.
    """

    peer: str
    ratio: float
    quantity: str = "time"


class Action(NamedTuple):
    """A call to be timed. `before` comes before each call that the host's clock times, and is not timed."""

    call: Callable[[], object]
    before: Callable[[], object] = lambda: None


class Workload(Protocol):
    """One case with inputs. A provider is what `Operation.providers` has for a name."""

    @property
    def reference(self) -> Mapping[str, Reference]:
        """The float64 results, by name; computed once."""

    def results(self, provider: Any, direction: str) -> Mapping[str, Tensor]:
        """What the provider computes in this direction, by the names of the reference."""

    def action(self, provider: Any, direction: str, *, captured: bool = False) -> Action:
        """The same as a call to be timed. Preparations (the forward pass of a backward) run now, on this stream.

        captured: for a CUDA graph.
        """

    def allowed(self, name: str, baseline: float) -> float:
        """The largest relative error of this result. baseline: the error of torch's own."""


class KernelTests(NamedTuple):
    """The tests of one operation's kernels: files, and pytest's -k.

    compute-sanitizer slows kernels down 10 to 50 times and instruments each when it is loaded. 26 to 84 tests of
    bfloat16, in which every kernel and form is met, took 16 to 75 s an operation on an H200, all of them side by side.
    Left out: what the profiler counts (both tools want the same interface), graphs (capture needs the caching
    allocator), and what fills a GPU.
    """

    gpu: Sequence[str]  # the GPU's own tests, those of huge tensors and of many shapes aside
    checked: Sequence[str]  # for compute-sanitizer
    smoke: Sequence[str]
    large: Sequence[str] = ()  # whose GPU tests have huge tensors, or many shapes
    kernels: Sequence[str] = ()  # of all types and forms


@dataclass(frozen=True)
class Operation:
    """An operation as data: what is measured, what its kernels are, how results are shown.

    A case is a `Case`, or anything else with `name`, `dtype`, `dtype_name`, `tf32` and `small`; cases come in order of
    their value, for a run may be cut off. The defaults are those of a differentiable function.
    """

    name: str
    summary: str

    # What is measured, of every case and direction.
    cases: Sequence[Any]
    smoke_cases: Sequence[Any]
    directions: Sequence[str]
    # By name, of a case: what `workload` is given; a sentence in place of one that is left out. The second argument is
    # why torch.compile is to be left out, or nothing.
    providers: Callable[[Any, str], Mapping[str, Any]]
    workload: Callable[[Any, torch.device], Workload]
    work: Callable[[Any, str], Work]
    targets: Callable[[Any, str], Sequence[Target]]

    # Its kernels.
    compiled: Callable[[bool], Iterable[tuple[Any, Sequence[str]]]]  # what `static` compiles: each form, or everything
    expectations: Callable[[Launch, Any, Arch], Iterable[Expectation]]  # what a launch's machine code must show
    # By kernel, of a launch's arguments by name, its grid and the case: parts of `model.work.LaunchWork`.
    kernel_work: Mapping[str, Callable[[Given, tuple[int, ...], Any], dict[str, Any]]]
    tests: KernelTests
    of_others: Sequence[str] = ()  # kernels of another operation, that a call launches besides

    # Whom it is compared with, and how that is shown.
    baseline: str = "eager"  # the provider whose errors are torch's own
    peers: Sequence[str] = ("eager", "compile")  # all providers but tribp
    best_of: Mapping[str, Sequence[str]] = field(default_factory=dict)  # names for the fastest of several peers
    columns: Sequence[str] = ()  # of the table (see `results.COLUMNS`), if not those of a differentiable function
    legend: str = (
        "Times are medians in µs on the device, L2 flushed. Ratios are the other's time over tribp's. The floor is "
        "bytes over the copy's rate, or operations over the product's, whichever is more."
    )

    # What sets an optimizer's step apart.
    small_clock: str = "device"  # that small cases are judged by; "wall": from the call until the device is done
    products: bool = True  # whether its operations are matrix products, whose rate is a ceiling besides the copy's
    graph_calls: int = 20  # in one CUDA graph
    call: Callable[[Any], object] | None = None  # the call on CPU tensors, where launches read tables on the device

    def launches(self, case: Any, direction: str, arch: Arch) -> list[Launch]:
        """What the call that is measured launches on this GPU, of its own kernels; on tensors without memory."""
        from .no_gpu import recording

        with recording(arch) as launches, precision(case.tf32):
            ours = self.providers(case, "nothing else is called")["tribp"]
            action = self.workload(case, torch.device("meta")).action(ours, direction)
            launches.clear()  # those that prepare it
            action.call()
        return [launch for launch in launches if launch.kernel.__name__ not in self.of_others]


@contextlib.contextmanager
def precision(tf32: bool) -> Iterator[None]:
    """float32 products and convolutions of all providers in TF32, or in full precision whatever the environment says.

    torch's defaults differ between the two: convolutions are in TF32 unless they are told otherwise. cuDNN times its
    algorithms at the first call of every shape, and takes the fastest: torch at its best.
    """
    products: list[Any] = [torch.backends.cuda.matmul, torch.backends.cudnn.conv]  # type: ignore[attr-defined]
    name = "tf32" if tf32 else "ieee"
    settings: list[tuple[Any, str, object]] = [(product, "fp32_precision", name) for product in products]
    settings.append((torch.backends.cudnn, "benchmark", True))
    with contextlib.ExitStack() as stack:
        for module, name, value in settings:
            stack.callback(setattr, module, name, getattr(module, name))
            setattr(module, name, value)
        yield


OPTIONAL = ("grad_scale", "grad_norm", "lower_y", "EMA_TYPE")  # of kernels, what is None where it is not wanted
COUNTS = ("TAPS", "GROUPS_PER_TILE", "LAYOUT_DIMS")  # of kernels, where they are more than one


def describe(launch: Launch) -> str:
    """The settings in a few characters: an optimizer's rule and states, tile, warps, stages, what is switched on.

    Of a convolution besides: its box of pixels, its steps where they are not 1, taps and groups that share a program.
    """
    given, settings = launch.named, launch.settings
    states = [str(given[name]) for name in ("STATE0_TYPE", "STATE1_TYPE", "STATE2_TYPE") if given.get(name) is not None]
    sizes = [str(size) for name, size in settings.items() if name.startswith("BLOCK") and name[-1].isalpha()]
    words = [getattr(given.get("RULE"), "__name__", ""), ",".join(states), "×".join(sizes)]
    words += [f"w{launch.num_warps}", f"s{launch.num_stages}"]
    if "BOX_N" in given:
        words.append("box" + "×".join(str(given[f"BOX_{side}"]) for side in "NHW"))
    if max(steps := [given.get(f"STEP_{side}", given.get(f"step_{side.lower()}", 1)) for side in "HW"]) > 1:
        words.append("step{}×{}".format(*steps))
    words += [f"{name.lower()}{n}" for name in COUNTS if (n := given.get(name, 1)) > 1]
    words += [name.lower() for name, value in settings.items() if value is True and name != "PTX"]
    words += [name.lower() for name in OPTIONAL if given.get(name) is not None]
    return " ".join(filter(None, [*words, given.get("ACT_name")]))


# -- the operations there are -----------------------------------------------------------------------------------------


@functools.cache
def operations() -> dict[str, Operation]:
    """Every OPERATION of this folder's files, by name."""
    texts = {file.stem: file.read_text(encoding="utf-8") for file in sorted(Path(__file__).parent.glob("*.py"))}
    modules = [name for name, text in texts.items() if re.search(r"^OPERATION = ", text, re.MULTILINE)]
    entries: list[Operation] = [importlib.import_module(f"{__package__}.{module}").OPERATION for module in modules]
    return {operation.name: operation for operation in entries}


def find(chosen: Sequence[str] = ()) -> list[Operation]:
    """The operations of these names, or all of them. Raises ValueError for a name that does not exist."""
    for name in chosen:
        if name not in operations():
            raise ValueError(f"no operation is called {name!r}; there are: {', '.join(operations())}")
    return [operations()[name] for name in chosen or operations()]


# -- differentiable functions: an output, and gradients of all arguments or of some -----------------------------------

# Relative Frobenius error against float64: one rounding to the type (half a unit in the last place: 6e-8, 5e-4, 4e-3)
# with room for a second, not for a lost term. TF32 rounds every operand to 11 bits.
TOLERANCE = {torch.float64: 1e-14, torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 5e-3}
TF32_TOLERANCE = 1e-3

# torch.compile at its best, less its own CUDA graphs: they copy their inputs first and cannot repeat a backward pass,
# and what a graph saves is measured in one of ours (`CudaMeter.graph_time`), for every provider alike.
best_compiled = functools.partial(torch.compile, mode="max-autotune-no-cudagraphs", dynamic=False)


def functions(ours: Callable[..., Tensor], eager: Callable[..., Tensor]) -> Callable[[Any, str], Mapping[str, Any]]:
    """The providers of a differentiable function."""
    return lambda case, without: {"tribp": ours, "eager": eager, "compile": without or best_compiled(eager)}


def layer_work(case: Any, direction: str, *, x: int, w: int, b: int, y: int, dz: int, operations: float) -> Work:
    """Of y = act(x ⋆ w + b): each input read once, each output written once; one direction after the other.

    Elements of each, and the operations of one product. dz: of dy, and of the output if the derivative takes it.
    """
    forward, backward = x + w + b + y, dz + x + w + x + w + b
    elements, products = {
        "forward": (forward, 1), "dgrad": (dz + w + x, 1), "wgrad": (dz + x + w + b, 1),
        "wgrad only": (dz + x + w + b, 1), "backward": (backward, 2), "both": (forward + backward, 3),
    }[direction]  # fmt: skip
    return Work(elements * case.dtype.itemsize, products * operations)


@dataclass(frozen=True)
class DifferentiableWorkload:
    """`arguments` by name, the first being the input, and `output_grad`, what comes back from the layer above.

    `exact` computes the output from float64 arguments. Every function is called with `options` besides.
    """

    arguments: Mapping[str, Tensor]
    output_grad: Tensor
    exact: Callable[..., Tensor]
    tf32: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    rows: int | None = None  # of the input, that are computed at a time in float64; None: all
    layers: int = 1  # each rounds what it hands on

    @functools.cached_property
    def reference(self) -> Mapping[str, Reference]:
        """Rows of the output and of the input's gradient depend on that row of the input alone, and the gradients of
        the other arguments are sums over rows: so they can be had in several parts, in the memory that one takes.

        Such a sum can be as small as it likes. What its terms amount to is seen with signs that are drawn at random.
        """
        first, *others = self.arguments
        outputs, grads, terms = list[Tensor](), list[tuple[Tensor, ...]](), list[tuple[Tensor, ...]]()
        rows = self.rows or len(self.output_grad)
        parts = [torch.split(tensor, rows) for tensor in (self.arguments[first], self.output_grad)]
        for some, dy in zip(*parts, strict=True):
            exact = {**self.arguments, first: some}
            leaves = [value.detach().double().requires_grad_() for value in exact.values()]
            output, dy = self.exact(*leaves, **self.options), dy.double()
            grads.append(torch.autograd.grad(output, leaves, dy, retain_graph=True))
            terms.append(torch.autograd.grad(output, leaves[1:], dy * (2 * torch.randint_like(dy, 2) - 1)))
            outputs.append(output.detach())
        input_grads, *sums = zip(*grads, strict=True)
        values = {"output": torch.cat(outputs), f"{first}.grad": torch.cat(input_grads)}
        references = {name: Reference(value, float(value.norm())) for name, value in values.items()}
        for name, *both in zip(others, sums, zip(*terms, strict=True), strict=True):
            value, signed = (functools.reduce(torch.add, parts) for parts in both)
            references[f"{name}.grad"] = Reference(value, max(float(value.norm()), float(signed.norm())))
        return references

    def results(self, function: Callable[..., Tensor], direction: str) -> Mapping[str, Tensor]:
        inputs = self._inputs(direction)
        output = function(*inputs.values(), **self.options)
        results = {"output": output.detach()} if direction in ("forward", "both") else {}
        if direction != "forward":
            leaves = {name: value for name, value in inputs.items() if value.requires_grad}
            grads = torch.autograd.grad(output, list(leaves.values()), self.output_grad)
            results |= {f"{name}.grad": grad for name, grad in zip(leaves, grads, strict=True)}
        return results

    def action(self, function: Callable[..., Tensor], direction: str, *, captured: bool = False) -> Action:
        if direction == "both":
            return Action(lambda: self.results(function, direction))
        inputs = self._inputs(direction)
        if direction == "forward":
            # With the arguments requiring gradients, as in training: what is saved for backward is part of the cost.
            return Action(lambda: function(*inputs.values(), **self.options))
        output = function(*inputs.values(), **self.options)
        leaves = [value for value in inputs.values() if value.requires_grad]
        return Action(lambda: torch.autograd.grad(output, leaves, self.output_grad, retain_graph=True))

    def allowed(self, name: str, baseline: float) -> float:
        """The output must meet its type's tolerance and stay within twice torch's error.

        A gradient must do one of the two: it is formed from the rounded output, by torch as well, and where the
        sigmoid saturates 1 − y has lost the digits that the tolerance asks for.
        """
        dtype = self.output_grad.dtype
        limit = self.layers * (TF32_TOLERANCE if self.tf32 else TOLERANCE[dtype])
        # Half a unit in the operands' last place on top: where torch happens to be exact, or (on a CPU) does not
        # round to the TF32 that is allowed, twice its error is nothing.
        twice = 2 * baseline + (2**-10 if self.tf32 else torch.finfo(dtype).eps) / 2
        return min(limit, twice) if name == "output" else max(limit, twice)

    def _inputs(self, direction: str) -> dict[str, Tensor]:
        """The arguments, of which those require gradients that the direction is about."""
        inputs = {name: value.detach() for name, value in self.arguments.items()}
        first, *others = inputs
        differentiated = {"dgrad": [first], "wgrad": others, "bias": ["bias"]}
        for name in differentiated.get(direction.removesuffix(" only"), inputs):
            inputs[name].requires_grad_()
        return inputs
