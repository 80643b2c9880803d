"""The settings that might be better than the rules' choice: what `python -m bench static --candidates` compares.

A candidate changes a rule of `tribp/launch/` for one case, so that everything around the launch follows: room for
partial results, descriptors, the passes before and after. `UNSEEN` are those that the model says nothing about.
"""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple
from unittest import mock

from tribp.ops.conv3x3.config import choose_box, even_splits
from tribp.launch.matmul import whole_splits

from .conv_cases import BF16, FEW, ConvCase
from .conv_kernels import MANY, MIDDLE
from .linear import SQUARE, SQUARISH, TALL
from .registry import Case
from .step_cases import FP32, StepCase, cases

Rule = Callable[..., Any]
LINEAR, CONV, STEP = "tribp.ops.linear_sigmoid.plan", "tribp.ops.conv3x3.plan", "tribp.optim.triton_bucket"


@dataclass(frozen=True)
class Candidate:
    name: str
    operation: str
    case: Case | StepCase
    direction: str
    variant: str  # the alternative, in words
    rules: Mapping[str, Callable[[Rule], Rule]] = field(default_factory=dict)  # by where they are called from
    constants: Mapping[str, object] = field(default_factory=dict)  # of the kernels, changed afterwards

    @contextlib.contextmanager
    def changed(self) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            for where, change in self.rules.items():
                module, _, rule = where.rpartition(".")
                original = getattr(__import__(module, fromlist=[rule]), rule)
                stack.enter_context(mock.patch(where, change(original)))
            yield


def asked(**arguments: Any) -> Callable[[Rule], Rule]:
    """The rule, asked another question."""
    return lambda rule: lambda *given, **named: rule(*given, **named | arguments)


def chosen(**fields: Any) -> Callable[[Rule], Rule]:
    """The rule, with other values in its answer."""
    return lambda rule: lambda *given, **named: replace(rule(*given, **named), **fields)


def split(factor: float) -> Callable[[Rule], Rule]:
    """`choose_wgrad` with more splits or fewer, none of them empty."""

    def change(rule: Rule) -> Rule:
        def changed(m: int, *given: Any, **named: Any) -> Any:
            s = rule(m, *given, **named)
            return replace(s, splits=whole_splits(m, max(1, int(s.splits * factor)), s.block_l))

        return changed

    return change


def split_boxes(factor: float) -> Callable[[Rule], Rule]:
    """The same of `choose_conv_wgrad`."""

    def change(rule: Rule) -> Rule:
        def changed(n: int, p: int, q: int, *given: Any, **named: Any) -> Any:
            s = rule(n, p, q, *given, **named)
            return replace(s, splits=even_splits(s.boxes(n, p, q), max(1, int(s.splits * factor))))

        return changed

    return change


def tile(block_i: int, block_j: int, stages: int, warps: int = 8) -> Callable[[Rule], Rule]:
    """`choose_conv` with other tiles, and the box that belongs to them."""

    def change(rule: Rule) -> Rule:
        def changed(n: int, p: int, q: int, *given: Any, **named: Any) -> Any:
            box = choose_box(block_i, n, p, q, wide=named["wide"])
            sizes = dict(block_i=block_i, block_j=block_j, num_stages=stages, num_warps=warps)
            return replace(rule(n, p, q, *given, **named), box=box, **sizes)

        return changed

    return change


def _linear(shape: tuple[int, ...]) -> Case:
    return Case(shape, BF16)


SHORT = (65536, 1024, 256)
BIG = dict(block_i=128, block_j=256, block_l=64, num_warps=8, num_stages=4)
WIDE = dict(block_i=128, block_j=128, block_l=64, num_warps=8, num_stages=3, persistent=0)


def _all() -> Iterator[Candidate]:
    forward, dgrad, wgrad = (f"{LINEAR}.choose_{name}" for name in ("forward", "dgrad", "wgrad"))
    pointers = asked(tma=False)
    for shape in (SQUARE, TALL, SQUARISH, SHORT):
        on, name = _linear(shape), "TMA against pointers"
        yield Candidate(name, "linear", on, "forward", "pointers", {forward: pointers})
        yield Candidate(name, "linear", on, "backward", "pointers", {dgrad: pointers, wgrad: pointers})
        slow = "1 / (1 + exp(−z))"
        yield Candidate("ex2 + rcp sigmoid", "linear", on, "forward", slow, constants={"PTX": False})
    name = "persistent programs"
    more = {forward: chosen(persistent=0, num_stages=4)}
    yield Candidate(name, "linear", _linear(SQUARE), "forward", "a program a tile, 4 stages", more)
    for shape in (TALL, SQUARISH, SHORT):
        more = {forward: chosen(persistent=264)}
        yield Candidate(name, "linear", _linear(shape), "forward", "persistent, 264 programs", more)
    name = "two programs an SM"
    more = {forward: chosen(**WIDE)}
    for shape in (SQUARE, TALL, SQUARISH):
        yield Candidate(name, "linear", _linear(shape), "forward", "128×128, two programs", more)
    yield Candidate(name, "linear", _linear(SHORT), "forward", "128×256, one program", {forward: chosen(**BIG)})
    more = {forward: chosen(**BIG | dict(num_stages=3), persistent=132)}
    for shape in (SQUARISH, SHORT):
        yield Candidate(name, "linear", _linear(shape), "forward", "128×256, persistent", more)
    name = "dz in wgrad's prologue"
    for direction in ("backward", "frozen input"):
        yield Candidate(name, "linear", _linear(TALL), direction, "a pass of its own", {wgrad: asked(may_fuse=False)})
        for shape in (SQUARISH, SHORT, SQUARE):
            more = {wgrad: chosen(fuse_dz=True, block_i=128, block_j=128, num_stages=3)}
            yield Candidate(name, "linear", _linear(shape), direction, "dz formed on load, 128×128", more)
    for factor in (0.5, 2):
        for shape in (TALL, SQUARISH, SHORT):
            more = {wgrad: split(factor)}
            yield Candidate("split factors", "linear", _linear(shape), "backward", f"{factor:g}× the splits", more)

    conv, conv_wgrad = f"{CONV}.choose_conv", f"{CONV}.choose_conv_wgrad"
    case: ConvCase
    for pixels in (FEW[0], MIDDLE, MANY):
        case = ConvCase(pixels, BF16)
        for direction, where in (("forward", conv), ("dgrad", conv), ("wgrad", conv_wgrad)):
            yield Candidate("conv boxes against pointers", "conv", case, direction, "pointers", {where: pointers})
        more = {conv: chosen(flat=False)}
        yield Candidate("one loop over taps and channels", "conv", case, "forward", "a loop a tap", more)
        for factor in (0.5, 2):
            more = {conv_wgrad: split_boxes(factor)}
            yield Candidate("split factors", "conv", case, "wgrad", f"{factor:g}× the splits", more)

    for case, sizes in (
        (ConvCase(FEW[0], BF16), [(128, 64, 4), (256, 64, 2), (256, 64, 3)]),
        (ConvCase((64, 128, 128, 28, 28), BF16), [(256, 128, 3), (128, 128, 4)]),
        (ConvCase(MANY, BF16), [(64, 64, 4), (128, 64, 4)]),
    ):
        for block_i, block_j, stages in sizes:
            more = {conv: tile(block_i, block_j, stages)}
            words = f"{block_i}×{block_j}, {stages} stages"
            yield Candidate("tiles of the convolution", "conv", case, "forward", words, more)

    where = f"{STEP}.choose_step"
    for of, length, chunks in (
        ("Adam", "1e8", (1, 2, 4, 16, 32)),
        ("SGD", "1e8", (1, 2, 4, 16, 32)),
        ("Adam", "gpt2", (1, 2, 4, 16, 32)),
        ("Adam", "1000x4096", (2, 4)),
        ("Adam", "1000x8", ()),
    ):
        step = next(c for c in cases() if (c.optimizer, c.shapes_name, c.dtype) == (of, length, FP32))
        for blocks in chunks:
            words = f"{blocks} blocks a program"
            more = {where: chosen(chunk_blocks=blocks)}
            yield Candidate("chunk sizes in the optimizer", "optim", step, "step", words, more)
        for block, warps in ((512, 4), (2048, 8), (1024, 8)):
            words = f"blocks of {block}, {warps} warps"
            more = {where: chosen(block=block, num_warps=warps)}
            yield Candidate("programs an SM in the optimizer", "optim", step, "step", words, more)


ALL = list(_all())


class Unseen(NamedTuple):
    name: str
    reason: str


UNSEEN = [
    Unseen(
        "epilogue subtiles",
        "no kernel has them. With TMA and a 128×256 tile they would free 32 KB of shared memory for a fourth stage; to "
        "the model a stage is only latency in flight, which three stages of such a tile hide already.",
    ),
    Unseen(
        "unrolled taps",
        "the variant was dropped (3.6 times the code, as many registers). What there is to win is the flat loop's "
        "arithmetic on taps, which counts only where issue slots limit: see `issue` in the terms that --json writes.",
    ),
    Unseen(
        "stored gradients' pointers against a fresh upload",
        "on the host: 8 bytes a tensor (8 KB for 1,000) cross PCIe in under a µs, but the copy is a launch of its own; "
        "`python -m bench host` shows what reading the pointers costs, only a GPU what the copy does.",
    ),
]
