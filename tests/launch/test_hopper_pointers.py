"""Products by pointers on Hopper: by mma.sync, or with the fence that PTX asks for between `cp.async` and wgmma.

wgmma reads shared memory through another proxy than the one `cp.async` writes it through. What Triton is installed
decides which of the two it is (`tribp/versions.py`).
"""

import json
from typing import Any

import pytest

from tribp import versions
from tribp.launch.arch import ARCHS
from tribp.launch.matmul import MatmulConfig, needs_registers
from tribp.launch.neighbors import neighbors
from tribp.launch.tiles import candidates
from tribp.ops.conv3x3.config import ConvProblem, ConvWgradProblem
from tribp.ops.conv3x3.config_few_channels import FewChannelsProblem
from tribp.ops.linear.config import ForwardProblem

from ..processes import forked
from .config_cases import problems

H100 = ARCHS["sm_90"]
PRECISIONS = [("bfloat16", "ieee"), ("float32", "tf32"), ("float32", "tf32x3")]

COMPILE = """
import json, torch
from bench import conv3x3 as conv
from bench import linear
from bench.compile import source_of, target_of
from bench.conv3x3 import ConvCase
from tribp.launch.arch import ARCHS
import triton

arch = ARCHS["sm_90"]
found = {}
def read(name, launches):
    for launch in launches:
        products = "forward", "dgrad", "wgrad", "few_channels_wgrad"
        if launch.kernel.__name__ in products and not launch.named.get("TMA"):
            source, options = source_of(launch, arch)
            ptx = triton.compile(source, target=target_of(arch), options=options).asm["ptx"]
            found[f"{name} {launch.kernel.__name__}"] = [line.strip().split(" ")[0] for line in ptx.splitlines()]
# Rows that are no multiple of 16 bytes have no descriptors; of 4 bytes, they are not copied asynchronously either.
for dtype, tf32, pitch in ((torch.bfloat16, False, 1004), (torch.float32, True, 1002)):
    for direction in ("forward", "backward"):
        case = linear.LinearCase((4096, pitch, pitch), dtype, tf32)
        read(f"linear {pitch} {dtype} {direction}", linear.OPERATION.launches(case, direction, arch))
few = 64, 3, 64, 64, 64
for case in (ConvCase((16, 128, 128, 13, 13), torch.bfloat16), ConvCase(few, torch.bfloat16),
             ConvCase(few, torch.float32, tf32=True)):
    read(f"conv {case.name}", conv.OPERATION.launches(case, "wgrad", arch))
read("groups", conv.OPERATION.launches(ConvCase((64, 128, 128, 28, 28), torch.bfloat16, groups=32), "forward", arch))
print(json.dumps(found))
"""


def unfenced(opcodes: list[str]) -> bool:
    """Whether a product can follow a wait for copies with no fence between, in the order of the code, run twice."""
    waited = False
    for opcode in [*opcodes, *opcodes]:
        if opcode.startswith("cp.async.wait_"):
            waited = True
        elif opcode.startswith("fence.proxy.async"):
            waited = False
        elif opcode.startswith("wgmma.mma_async") and waited:
            return True
    return False


@pytest.mark.slow  # the executor misses a fence as well, in the cases of `tests/executed`
def test_no_product_by_pointers_misses_its_fence() -> None:
    done = forked("-c", COMPILE)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert {name.rsplit(" ", 1)[1] for name in found} == {"forward", "dgrad", "wgrad", "few_channels_wgrad"}
    assert any("cp.async.wait_group" in opcode for opcodes in found.values() for opcode in opcodes)
    assert [name for name, opcodes in found.items() if unfenced(opcodes)] == []


def test_the_check_sees_a_missing_fence() -> None:
    copied, fence, product = "cp.async.wait_group", "fence.proxy.async.shared::cta;", "wgmma.mma_async.sync.aligned"
    assert unfenced([copied, product])
    assert unfenced([product, copied]), "around the loop"
    assert not unfenced([copied, fence, product])
    assert not unfenced([copied, "mma.sync.aligned"])


@pytest.fixture(params=[True, False], ids=["3.7", "3.6"])
def newer(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> bool:
    """What the heuristics see of Triton's version."""
    monkeypatch.setattr(versions, "triton_version", lambda: (3, 7) if request.param else (3, 6))
    return bool(request.param)


def uses_wgmma(config: MatmulConfig) -> bool:
    return config.block_i >= 64 and config.num_warps >= 4


def test_which_products_go_to_wgmma(newer: bool) -> None:
    def first(dtype: str, precision: str, tma: bool, along: bool = True) -> bool:
        vec = 16 if dtype == "float64" else 4
        return uses_wgmma(candidates(ForwardProblem(0, 0, 512, dtype, precision, H100, vec, tma, along), 512)[0])

    assert first("bfloat16", "ieee", tma=True)
    assert first("bfloat16", "ieee", tma=True, along=False)
    assert first("bfloat16", "ieee", tma=False) == newer, "3.6 leaves out the fence"
    assert first("float32", "tf32", tma=True) == newer, "3.6 has no descriptors that round"
    assert not first("float32", "tf32", tma=True, along=False)
    assert not first("float32", "tf32", tma=False)
    assert not first("float32", "tf32x3", tma=True)


def test_no_legal_product_is_left_without_its_fence(newer: bool) -> None:
    for problem in problems(H100):
        if not hasattr(problem, "precision") or not hasattr(problem, "vec"):
            continue
        chosen = problem.choose()
        assert problem.is_legal(chosen), (problem, chosen)
        for config in [chosen, *neighbors(problem, chosen)]:
            if needs_registers(problem, tma=config.tma):
                assert config.prefetch or not uses_wgmma(config), (problem, config)
                assert getattr(config, "taps", 1) == 1, f"two warps spill three results: {config}"


@pytest.mark.parametrize(("dtype", "precision"), PRECISIONS)
def test_convolutions_by_pointers(dtype: str, precision: str, newer: bool) -> None:
    may = newer and dtype == "bfloat16"
    pointers: dict[str, Any] = dict(vec=4, tma=False, along=True, wide=False, stepped=False)
    kind = (dtype, precision, H100)
    dense = ConvProblem(64, 13, 13, 128, 128, 1, 1, 1, *kind, whole=False, **pointers)
    groups = ConvProblem(64, 28, 28, 32, 32, 4, 8, 1, *kind, whole=True, **pointers)
    wgrad = ConvWgradProblem(16, 13, 13, 128, 128, 1, 1, *kind, vec=4, tma=False, spare=1 << 30)
    for problem in (dense, groups, wgrad):
        assert uses_wgmma(problem.choose()) == may, problem
    few = FewChannelsProblem(64, 64, 64, 64, 3, dtype, H100, wgrad=True).choose()
    assert (few.num_stages > 1) == may, "one stage copies nothing asynchronously"
