"""Configs: what the heuristics choose is legal, and what is beside it is legal too, and computes the same."""

import os
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from functools import partial
from math import prod
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import tribp
from tribp import versions
from tribp.launch import plan as plans
from tribp.launch.arch import ARCHS, INTERPRETER, ITEMSIZE, Arch, cdiv
from tribp.launch.buffer import layout_of
from tribp.launch.configs import WORKSPACE, basis, most_parts
from tribp.launch.matmul import MatmulConfig
from tribp.launch.neighbors import neighbors
from tribp.launch.optim import MultiTensorProblem
from tribp.launch.reduce_config import ReduceProblem
from tribp.ops.conv3x3.config import ConvProblem, ConvWgradProblem
from tribp.ops.conv3x3.config_depthwise import DepthwiseProblem
from tribp.ops.conv3x3.config_few_channels import FewChannelsDgradProblem, FewChannelsProblem
from tribp.ops.conv3x3.config_relayout import RelayoutProblem
from tribp.ops.linear.config import BackwardProblem, DgradProblem, ForwardProblem, OutputGradProblem, WgradProblem

from ..conv3x3.cases import ieee as ieee
from ..oracle import TOLERANCE, error
from ..processes import called, python
from .config_cases import problems

MACHINES = {**ARCHS, "interpreter": INTERPRETER}
SM_90 = ARCHS["sm_90"]


@pytest.mark.parametrize(
    "machine", [pytest.param(name, marks=[pytest.mark.slow] * (name == "sm_100")) for name in MACHINES]
)  # sm_90 has the same rules
def test_what_heuristics_choose_is_legal_and_what_is_beside_it_holds(machine: str) -> None:
    tried: dict[type, int] = {}
    for at, problem in enumerate(problems(MACHINES[machine])):
        first = problem.choose()
        assert problem.is_legal(first), (problem, first)
        assert problem.adjusted(first) == first, (problem, first)
        assert problem.is_legal(replace(first, reason="measured on sm_90: 5 µs")), "as a search stores it"
        around = neighbors(problem, first)
        assert first not in around
        assert len(set(around)) == len(around)
        tried[type(problem)] = tried.get(type(problem), 0) + len(around)
        # A search goes on from there: of every fourth problem from one of them, for all would be ten thousands.
        further = neighbors(problem, around[at % len(around)]) if around and at % 4 == 0 else []
        for config in [first, *around, *further]:
            check(problem, config)
            assert config.reason == first.reason
    assert min(tried.values()) > 0, tried


def check(problem: Any, config: Any) -> None:
    """What every kernel takes for granted, said apart from what a problem says is legal."""
    arch: Arch = problem.arch
    sides = [v for k, v in asdict(config).items() if k.startswith("block")]
    assert all(side >= 1 and side & (side - 1) == 0 for side in sides), f"tl.arange takes powers of two: {config}"
    assert config.num_warps * (64 if arch.backend == "hip" else 32) <= 1024
    assert getattr(config, "max_registers", None) is None or arch.backend == "cuda", "no option elsewhere"
    if getattr(config, "tma", False):
        assert problem.tma
        assert arch.has_tma
        assert max(sides) <= 256, "a descriptor's most"
    if hasattr(config, "box") and not isinstance(problem, ConvProblem):
        boxes = config.boxes(problem.n, *problem[1:3])
        each = cdiv(boxes, config.splits)
        assert each * (config.splits - 1) < boxes <= each * config.splits, "a split without a box"
    if isinstance(problem, (ConvProblem, ConvWgradProblem)):
        assert prod(config.box) == (config.block_l if isinstance(problem, ConvWgradProblem) else config.block_i)
    if isinstance(problem, ConvProblem):
        turns = 9 * cdiv(problem.l, config.block_l)
        each = cdiv(turns, config.splits)
        assert each * (config.splits - 1) < turns <= each * config.splits, "a part without a turn"
        assert config.splits == 1 or (config.flat and problem.classes * problem.group_tiles == 1)
        share = problem.n * problem.p * problem.q * problem.j * max(4, ITEMSIZE[problem.dtype])
        assert config.splits == 1 or config.splits * share <= WORKSPACE
        assert config.tma or not config.flat or config.num_warps <= 4, "pytorch #173068"
        assert not (config.tma and problem.whole and problem.l % config.block_l), "a step would read the next pixel"
    if isinstance(problem, BackwardProblem):
        rows = cdiv(cdiv(problem.m, config.splits), config.block_i) * config.block_i
        assert rows * (config.splits - 1) < problem.m <= rows * config.splits
        assert config.block_l >= problem.n, "one step sums over all outputs"
    if isinstance(problem, ForwardProblem):
        columns = cdiv(cdiv(problem.k, config.splits), config.block_l) * config.block_l
        assert columns * (config.splits - 1) < problem.k <= columns * config.splits
        share = problem.m * problem.n * max(4, ITEMSIZE[problem.dtype])
        assert config.splits == 1 or config.splits * share <= WORKSPACE
    if isinstance(problem, WgradProblem):
        rows = cdiv(cdiv(problem.m, config.splits), config.block_l) * config.block_l
        assert rows * (config.splits - 1) < problem.m <= rows * config.splits
        share = problem.n * problem.k * max(4, ITEMSIZE[problem.dtype])
        assert config.splits == 1 or config.splits * share <= max(problem.spare, WORKSPACE)


WGRAD = ConvWgradProblem(64, 16, 16, 256, 256, 1, 1, "float16", "ieee", SM_90, 8, True, 0)
SM_86 = Arch("cuda", 86, 84, 99 << 10, "sm_86")


def product(dtype: str, arch: Arch) -> ForwardProblem:
    return ForwardProblem(1024, 512, 512, dtype, "ieee", arch, 16 // ITEMSIZE[dtype], True)


@pytest.mark.parametrize(
    ("problem", "tile", "stages", "fits"),
    [
        # 233,472 bytes of 232,448: ones lie beside the stages. mma.sync, in older versions, has them in registers.
        (WGRAD, (64, 128, 128), 2, not versions.fences_copies()),
        (WGRAD, (64, 128, 64), 4, True),
        (product("float64", ARCHS["sm_80"]), (64, 128, 128), 1, False),  # 196,608 bytes of 166,912
        (product("float64", SM_86), (64, 64, 128), 1, False),
        (product("float32", SM_86), (64, 256, 128), 1, False),
        (product("float32", SM_86), (128, 128, 128), 1, True),  # 65,536 bytes: one operand after the other
        (product("float16", ARCHS["gfx942"]), (128, 128, 128), 1, True),
        (product("float32", ARCHS["gfx942"]), (128, 256, 128), 1, False),
    ],
)
def test_legal_stages_fit_shared_memory(problem: Any, tile: tuple[int, int, int], stages: int, fits: bool) -> None:
    """Bytes are those that Triton 3.7 took."""
    sides = dict(zip(("block_i", "block_j", "block_l"), tile, strict=True))
    config = problem.adjusted(replace(problem.choose(), **sides, tma=False, num_warps=8, num_stages=stages))
    assert (config.num_stages == stages and problem.is_legal(config)) is fits


def test_a_persistent_programs_tile_lies_beside_its_stages() -> None:
    """65,536 bytes of 128×256 outputs, and stages of 49,152, in 231,424."""
    problem = product("float16", SM_90)
    config = replace(problem.choose(), block_i=128, block_j=256, block_l=64, num_warps=8, num_stages=4, tma=True)
    for persistent, stages in ((False, 4), (True, 3)):
        fitting = problem.adjusted(replace(config, persistent=persistent))
        assert fitting.num_stages == stages
        assert problem.is_legal(fitting)
        assert not problem.is_legal(replace(fitting, num_stages=stages + 1))


def test_partial_results_have_room_in_the_workspace_or_in_what_is_spare() -> None:
    assert [most_parts(2**20, dtype) for dtype in ("bfloat16", "float32", "float64")] == [8, 8, 4]
    assert [most_parts(2**20, "float32", spare=spare << 20) for spare in (31, 64)] == [8, 16]
    assert most_parts(2**30, "float32") == 1


def test_what_prefetches_has_one_stage() -> None:
    """One pipeline on top of another does not compile."""
    problem = product("float16", SM_90)._replace(vec=1, tma=False)
    chosen = problem.choose()
    assert (chosen.prefetch, chosen.num_stages, problem.is_legal(chosen)) == (True, 1, True)
    assert not problem.is_legal(replace(chosen, num_stages=2))


@pytest.mark.parametrize("machine", MACHINES)
def test_what_does_not_compile_is_not_legal(machine: str) -> None:
    """Sides of tiles and warps that are no powers of two, and fewer registers than ptxas takes."""
    for problem in problems(MACHINES[machine]):
        first = problem.choose()
        for field, value in asdict(first).items():
            if field.startswith("block") or field == "num_warps":
                for odd in (3, value + value // 2, value - 1):
                    if odd & (odd - 1):
                        config = problem.adjusted(replace(first, **{field: odd}))
                        assert getattr(config, field) != odd or not problem.is_legal(config), (problem, config)
        if hasattr(first, "max_registers"):
            assert not problem.is_legal(replace(first, max_registers=1))
            assert not problem.is_legal(replace(first, max_registers=256))


def test_a_grids_second_axis_ends_at_65535() -> None:
    wgrad = WgradProblem(2**24, 8, 8, "bfloat16", "ieee", SM_90, 8, True, False, 0)
    assert wgrad.is_legal(replace(wgrad.choose(), splits=32_768))
    assert not wgrad.is_legal(replace(wgrad.choose(), splits=65_536))
    depthwise = DepthwiseProblem(2**17, 8, 8, 8, "float16", SM_90, channels_last=True, wgrad=True)
    small = replace(depthwise.choose(), box=(1, 8, 8), block_i=8)
    assert depthwise.is_legal(replace(small, splits=32_768))
    assert not depthwise.is_legal(replace(small, splits=65_536))
    images = RelayoutProblem(2**20, 64, 8, "float16", SM_90)
    assert not images.is_legal(replace(images.choose(), tiles=1))
    channels = RelayoutProblem(1, 9, 2_097_121, "float16", SM_90)
    assert channels.is_legal(channels.choose())


def test_a_kernel_of_one_form_has_no_other() -> None:
    """With other fields `few_channels_dgrad` computes something else."""
    problem = FewChannelsDgradProblem(2, 5, 30, 40, "float16", "ieee", SM_90, True)
    first = problem.choose()
    for changes in (dict(block_l=16), dict(block_i=first.block_i // 2), dict(block_j=32), dict(tma=not first.tma)):
        assert not problem.is_legal(replace(first, **changes))


VARIED: dict[Any, set[str]] = {
    ForwardProblem: {"block_i", "block_j", "block_l", "num_warps", "num_stages", "tma", "persistent", "group",
                     "max_registers", "splits"},
    DgradProblem: {"fuse_dz"},
    WgradProblem: {"fuse_dz", "splits"},
    BackwardProblem: {"block_i", "block_j", "num_stages", "splits"},
    ConvProblem: {"box", "flat", "block_i", "block_j", "block_l", "tma", "num_stages", "num_warps", "group", "splits"},
    ConvWgradProblem: {"box", "taps", "splits", "block_i", "block_j", "block_l", "tma", "num_stages"},
    FewChannelsProblem: {"box", "block_i", "block_j", "num_warps", "splits"},
    FewChannelsDgradProblem: {"box", "num_warps", "num_stages"},
    DepthwiseProblem: {"box", "block_i", "block_j", "num_warps", "splits"},
    OutputGradProblem: {"block_m", "block_n", "rows", "num_warps"},
    ReduceProblem: {"block_parts", "block", "num_warps"},
    RelayoutProblem: {"block_p", "block_c", "tiles", "num_warps", "max_registers"},
}  # fmt: skip


@pytest.mark.parametrize("kind", VARIED)
def test_all_that_can_be_varied_is(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(versions, "triton_version", lambda: (3, 7))  # older ones rule some out
    changed = set()
    for problem in problems(SM_90):
        if isinstance(problem, kind):
            first = asdict(problem.choose())
            for config in neighbors(problem, problem.choose()):
                changed |= {name for name, value in asdict(config).items() if value != first[name]}
    assert VARIED[kind] <= changed


# -- other configs compute the same


def linear(
    dtype: torch.dtype, n: int = 16, k: int = 24, needs: str = "xwb"
) -> tuple[Callable[[], Mapping[str, Tensor]], Mapping[str, Tensor]]:
    x, w, b, dy = (torch.randn(size, dtype=torch.float64).to(dtype) for size in ((40, k), (n, k), (n,), (40, n)))
    w = w / 5
    return differentiated(tribp.linear_sigmoid, lambda *t: torch.sigmoid(F.linear(*t)), (x, w, b), dy, needs)


def convolution(
    c: int, groups: int = 1, *, last: bool = True, activation: str | None = None, needs: str = "xwb"
) -> tuple[Callable[[], Mapping[str, Tensor]], Mapping[str, Tensor]]:
    layout = torch.channels_last if last else torch.contiguous_format
    x, w = torch.randn(1, c, 5, 7).to(memory_format=layout), torch.randn(16 if groups == 1 else c, c // groups, 3, 3)
    dy = torch.randn(1, len(w), 5, 7).to(memory_format=layout)

    def exact(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        y = F.conv2d(x, w, b, 1, 1, 1, groups)
        return torch.sigmoid(y) if activation else y

    def ours(x: Tensor, w: Tensor, b: Tensor) -> Tensor:
        return tribp.conv3x3(x, w, b, 1, 1, groups, activation)

    return differentiated(ours, exact, (x, w / c, torch.randn(len(w))), dy, needs)


def differentiated(
    ours: Callable[..., Tensor],
    exact: Callable[..., Tensor],
    inputs: tuple[Tensor, ...],
    dy: Tensor,
    needs: str = "xwb",
) -> tuple[Callable[[], Mapping[str, Tensor]], Mapping[str, Tensor]]:
    def results(function: Callable[..., Tensor], dtype: torch.dtype) -> Mapping[str, Tensor]:
        given = {
            name: t.detach().to(dtype).requires_grad_(name in needs) for name, t in zip("xwb", inputs, strict=True)
        }
        y = function(*given.values())
        grads = torch.autograd.grad(y, [given[name] for name in needs], dy.to(dtype)) if needs else ()
        return {"y": y.detach(), **dict(zip(needs, grads, strict=True))}

    return lambda: results(ours, dy.dtype), results(exact, torch.float64)


def step() -> tuple[Callable[[], Mapping[str, Tensor]], Mapping[str, Tensor]]:
    values, grads = torch.randn(500), torch.randn(500)

    def results(optimizer: Any, dtype: torch.dtype) -> Mapping[str, Tensor]:
        p = torch.nn.Parameter(values.to(dtype, copy=True))
        p.grad = grads.to(dtype)
        optimizer([p], lr=0.1).step()
        return {"p": p.detach()}

    return lambda: results(tribp.optim.Adam, torch.float32), results(torch.optim.Adam, torch.float64)


CALLS: dict[str, tuple[Callable[[], Any], set[type]]] = {
    "linear, TMA": (lambda: linear(torch.float16, 72), {WgradProblem, DgradProblem}),
    "linear, one pass": (lambda: linear(torch.float16), {BackwardProblem}),
    "linear, float64": (lambda: linear(torch.float64, needs=""), {ForwardProblem}),
    "linear, odd rows": (lambda: linear(torch.float16, 7, 19, "b"), {ForwardProblem, OutputGradProblem, ReduceProblem}),
    "dense": (lambda: convolution(24, needs=""), {ConvProblem}),
    "dense wgrad": (lambda: convolution(24, needs="w"), {ConvWgradProblem}),
    "dense, NCHW": (lambda: convolution(9, last=False, activation="sigmoid", needs="b"), {RelayoutProblem}),
    "few channels": (lambda: convolution(3), {FewChannelsProblem, FewChannelsDgradProblem}),
    "depthwise": (lambda: convolution(6, 6), {DepthwiseProblem}),
    "step": (step, {MultiTensorProblem}),
}


class Asked(dict[Any, Any]):
    """Configs, none, which were asked for."""

    def __init__(self) -> None:
        self.problems: dict[Any, None] = {}

    def get(self, problem: Any, default: Any = None) -> Any:
        self.problems[problem] = None
        return default


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.usefixtures("ieee", "interpreter")
def test_configs_beside_the_heuristics_compute_the_same(name: str) -> None:
    make, kinds = CALLS[name]
    call, exact = make()
    with plans.using(Asked()) as asked:
        call()
    left = set(kinds)
    for problem in asked.problems:
        if type(problem) not in left:
            continue
        left.remove(type(problem))
        for config in neighbors(problem, problem.choose()):
            with plans.using({problem: config}):
                found = call()
            for result, value in found.items():
                tolerance = 2 * TOLERANCE[value.dtype if name == "linear, float64" else found[result].dtype]
                assert error(found[result], exact[result]) <= tolerance, (result, problem, config)
    assert not left


def compiled(target: str) -> dict[str, list[str]]:
    """What the compiler says to some configs. Runs in a process without the interpreter."""
    from bench import conv3x3, linear
    from bench.compile import read_launches
    from bench.conv3x3 import ConvCase

    found: dict[str, list[str]] = {}
    arch = ARCHS[target]
    calls: list[Callable[[Arch], Any]] = [
        partial(linear.OPERATION.launches, linear.LinearCase((4096, 1024, 1024), torch.bfloat16), "forward"),
        partial(conv3x3.OPERATION.launches, ConvCase((64, 64, 64, 56, 56), torch.bfloat16), "forward"),
    ]
    for call in calls:
        with plans.using(Asked()) as asked:
            call(arch)
        (problem,) = asked.problems
        around = neighbors(problem, problem.choose())
        smallest = min(around, key=lambda s: (s.block_i * s.block_j * s.block_l, s.num_stages))
        with plans.using({problem: smallest}):
            codes = [code for code, _ in read_launches(call(arch), arch)]
        found[type(problem).__name__] = [f"{code.error} {code.shared_memory <= code.shared_limit}" for code in codes]
    return found


@pytest.mark.parametrize("target", [t if t == "sm_90" else pytest.param(t, marks=pytest.mark.slow) for t in ARCHS])
def test_small_configs_compile(target: str) -> None:
    found = called(compiled, target)
    assert len(found) == 2
    assert {said for codes in found.values() for said in codes} == {" True"}, found


def test_problems_and_neighbors_are_the_same_in_every_process() -> None:
    """Under another seed of Python's hashes sets have another order, and objects other addresses."""
    seed = "2" if os.environ.get("PYTHONHASHSEED") == "1" else "1"
    code = f"from {__name__} import *; print(a_problem_and_its_neighbors())"
    said = python("-c", code, env={"PYTHONHASHSEED": seed}, check=True).stdout.strip()
    assert said == a_problem_and_its_neighbors()
    assert "0x" not in said


def a_problem_and_its_neighbors() -> str:
    problem = WgradProblem(80, 40, 48, "float16", "ieee", SM_90, 8, True, True, 1 << 30)
    return f"{problem} {neighbors(problem, problem.choose())}"


def test_a_config_replaces_the_choice_for_its_problem_and_no_other() -> None:
    problem = ForwardProblem(8192, 1024, 1024, "bfloat16", "ieee", SM_90, 8, True)
    config, other = neighbors(problem, problem.choose())[0], problem._replace(m=4096)
    plan = plans.Plan(SM_90, [layout_of(torch.empty(1))], {problem: config})
    assert plan.config(problem) == config != problem.choose()
    assert plan.config(other) == other.choose()
    assert plan.configs == {problem: config, other: other.choose()}


# -- what configs rest on


@pytest.mark.parametrize("machine", MACHINES)
def test_every_choice_says_what_it_rests_on(machine: str) -> None:
    found = {basis(problem.choose(), MACHINES[machine]) for problem in problems(MACHINES[machine])}
    assert "derived" in found
    assert ("compiled" in found) == (machine != "interpreter")
    assert ("measured" in found) == (machine == "sm_90")


@pytest.mark.parametrize(
    ("reason", "sm_90", "sm_86"),
    [
        ("derived: 16 bytes", "derived", "derived"),
        ("compiled: no spill", "compiled", "derived"),
        ("measured on sm_80, sm_90: 5 µs", "measured", "derived"),
        ("measured on sm_86: 5 µs", "derived", "measured"),
    ],
)
def test_a_basis_holds_where_it_was_found(reason: str, sm_90: str, sm_86: str) -> None:
    config = MatmulConfig(16, 16, 16, 4, 1, reason)
    assert basis(config, SM_90) == sm_90
    assert basis(config, Arch("cuda", 86, 84, 99 << 10, "sm_86")) == sm_86


@pytest.mark.parametrize("reason", ["", "128×128", "measured: 5 µs", "derived on sm_90: 1", "guessed: 1", "derived"])
def test_a_reason_must_say_so(reason: str) -> None:
    with pytest.raises(ValueError, match="begins with"):
        basis(MatmulConfig(16, 16, 16, 4, 1, reason), SM_90)
