"""`--set`: configs with some fields set by hand."""

from pathlib import Path
from typing import Any

import pytest

from bench.__main__ import main
from bench.variant import variant

from .test_run import NO_CUDA

pytest.importorskip("triton")

from tribp.launch.arch import ARCHS
from tribp.launch.optim import MultiTensorProblem
from tribp.launch.plan import config_for
from tribp.ops.conv3x3.config import ConvProblem
from tribp.ops.conv3x3.config_depthwise import DepthwiseProblem
from tribp.ops.conv3x3.config_few_channels import FewChannelsDgradProblem, FewChannelsProblem
from tribp.ops.linear.config import ForwardProblem

LINEAR = ForwardProblem(4096, 4096, 4096, "bfloat16", "ieee", ARCHS["sm_90"], vec=8, tma=True)
CONV = ConvProblem(
    256, 56, 56, 64, 64, group_tiles=1, groups_per_tile=1, classes=1, dtype="bfloat16", precision="ieee",
    arch=ARCHS["sm_90"], vec=8, tma=True, along=True, whole=False, wide=False, stepped=False,
)  # fmt: skip

FEW_CHANNELS = FewChannelsProblem(64, 56, 56, 64, 3, "bfloat16", ARCHS["sm_90"], wgrad=False)
FEW_CHANNELS_DGRAD = FewChannelsDgradProblem(64, 56, 56, 64, "bfloat16", "ieee", ARCHS["sm_90"], tma=True)
DEPTHWISE = DepthwiseProblem(64, 56, 56, 384, "bfloat16", ARCHS["sm_90"], channels_last=True, wgrad=False)
STEP = MultiTensorProblem(1 << 24, ("float32",), strided=False, arch=ARCHS["sm_90"])


def test_fields_are_set_and_what_follows_follows() -> None:
    rule = config_for(CONV)
    with variant(["Conv.block_i=256", "num_stages=2"]):
        conv, linear = config_for(CONV), config_for(LINEAR)
    assert (conv.block_i, conv.num_stages, linear.num_stages) == (256, 2, 2)
    assert conv.box[0] * conv.box[1] * conv.box[2] == 256 != rule.block_i
    assert linear.block_i == LINEAR.choose().block_i, "of another kind"
    assert config_for(CONV) == rule


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("num_warps", "FIELD=VALUE or KIND.FIELD=VALUE, got 'num_warps'"),
        ("num_warps=four", "num_warps must be a number, .* got 'four'"),
        ("num_warps=4.0", r"num_warps must be int, numbers above 0, got 4\.0"),
        ("tma=1", "tma must be bool"),
        ("Conv.box=(0, 8, 8)", r"box must be tuple\[int, int, int\]"),
        ("max_registers=0", r"max_registers must be int \| None"),
        ("num_wraps=4", "no field 'num_wraps'; there are block, "),
        ("Convolution.block_i=64", "no kind 'Convolution'; there are Backward, Conv, "),
        ("reason='mine'", "no field 'reason'"),
    ],
)
def test_what_is_no_setting(setting: str, message: str) -> None:
    """It is said before anything is done."""
    with pytest.raises(ValueError, match=message), variant([setting]):
        pytest.fail("never run")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("block_i=4096", "block_i=4096: no kernel is made with block_i=4096, .* for ConvProblem"),
        ("block_i=48", "no kernel is made with block_i=48"),
        ("num_warps=6", "no kernel is made with .* num_warps=6"),
        ("max_registers=1", "max_registers=1: no kernel is made"),
        ("Conv.box=(1, 8, 8)", "box can be .* beside the others"),
        ("Forward.num_stages=2", "nothing that was asked for has such a config"),
    ],
)
def test_what_cannot_be_set(setting: str, message: str) -> None:
    with pytest.raises(ValueError, match=message), variant([setting]):
        config_for(CONV)


@pytest.mark.parametrize(
    ("problem", "setting"),
    [
        (FEW_CHANNELS_DGRAD, "block_l=16"),
        (FEW_CHANNELS, "persistent=True"),
        (DEPTHWISE, "tma=True"),
        (DEPTHWISE, "num_stages=5"),
        (CONV, "prefetch=True"),
    ],
)
def test_what_no_kernel_reads_is_not_ignored(problem: Any, setting: str) -> None:
    with pytest.raises(ValueError, match=f"--set {setting}: .* beside the others"), variant([setting]):
        config_for(problem)


def test_registers_can_be_set_everywhere() -> None:
    problems: list[Any] = [CONV, LINEAR, FEW_CHANNELS, FEW_CHANNELS_DGRAD, DEPTHWISE, STEP]
    with variant(["max_registers=64"]):
        assert {config_for(problem).max_registers for problem in problems} == {64}


def test_none_is_a_value() -> None:
    with variant(["max_registers=None", "tma=True"]):
        config = config_for(CONV)
    assert (config.max_registers, config.tma) == (None, True)


@NO_CUDA
def test_results_of_a_variant_are_kept_apart(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of each variant: the library's own configs are still missing, and so are other variants."""
    words = [
        "run",
        "linear",
        "--smoke",
        "--case",
        "33x7x19 float16",
        "--missing",
        "--no-compile",
        "--out",
        str(tmp_path),
    ]
    for settings in (["--set", "Forward.block_i=16"], [], ["--set", "Forward.block_l=16"]):
        assert main([*words, *settings]) == 0
        said = capsys.readouterr().out
        assert f"{' '.join(['linear', *settings])} (smoke" in said, "it is measured, and the heading tells of what"
        assert (tmp_path / f"{' '.join(['linear', *settings])}.json").exists()
    assert len(list(tmp_path.iterdir())) == 3
