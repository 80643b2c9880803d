"""The convolution's part of `python -m bench static`: kernels that are compiled badly on purpose, what is expected of
which, and how settings are shown. `test_static.py` compiles; here are the plants that it asks for.
"""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import pytest
import torch

from bench.conv3x3 import DEPTHWISE, FEW, OPERATION, ConvCase, expectations, row_accesses
from bench.expectations import (
    ALWAYS,
    Compiled,
    Expectation,
    broken,
    matrix_instructions,
    multiplies_with,
    tile_stores,
)
from bench.operation import describe, find
from bench.sass import Loop
from tribp.kernels.conv3x3 import Box
from tribp.launch.arch import ARCHS, Arch
from tribp.launch.launches import Launch

from ..launch.plans import with_settings

BF16, FP32 = torch.bfloat16, torch.float32
DENSE, LAST_COLUMNS = ConvCase(FEW[0], BF16), ConvCase(FEW[0], BF16, last=False)
SINGLE, SMALL = ConvCase(FEW[0], FP32, tf32=True), ConvCase((256, 3, 64, 224, 224), FP32, tf32=True)
CHANNELS = ConvCase(DEPTHWISE, BF16, groups=384)

# On sm_80: the case, the direction and which of its launches, and what is changed about it.
GOOD = {
    "good conv": (DENSE, "forward", -1),
    "good depthwise": (CHANNELS, "forward", -1),
    "good pack": (LAST_COLUMNS, "forward", 0),
    "good relayout": (replace(LAST_COLUMNS, activation="sigmoid"), "backward", 0),
    "good few channels": (SMALL, "forward", -1),
}
BAD: dict[str, tuple[str, str, dict[str, Any]]] = {  # the good one it spoils, the complaint, the changes
    "conv, four warps": ("good conv", "spills", dict(BLOCK_J=256, warps=4)),
    "conv, one stage": ("good conv", "pipelined", dict(stages=1)),
    "conv, sixteen stages": ("good conv", "shared memory", dict(stages=16, BOX=Box(64, 1, 8))),
    "conv, narrow store": ("good conv", "wide stores", dict(VEC_STORE=1)),
    "conv, float32 without TF32": ("good conv", "matrix instructions", dict(PRECISION="ieee", single=True)),
    "few channels without TF32": ("good few channels", "matrix instructions", dict(PRECISION="ieee")),
    "depthwise, narrow load": ("good depthwise", "vectors", dict(VEC=1)),
    "pack, narrow load": ("good pack", "vectors", dict(VEC_P=1)),
    "pack, narrow store": ("good pack", "vectors", dict(VEC_DST=1)),
    "relayout, narrow load": ("good relayout", "wide loads", dict(VEC_P=1)),
    "relayout, narrow store": ("good relayout", "wide stores", dict(VEC_DST=1)),
}
ARCH = ARCHS["sm_80"]


def changed(launch: Launch, changes: dict[str, Any]) -> Launch:
    constants = {name: value for name, value in changes.items() if name.isupper()}
    return with_settings(launch, **constants)._replace(
        num_warps=changes.get("warps", launch.num_warps), num_stages=changes.get("stages", launch.num_stages)
    )


def plant() -> dict[str, list[str]]:
    """What is wrong with each. Runs in a process of its own, without the interpreter."""
    from bench.compile import read_launches

    good = {name: (case, OPERATION.launches(case, direction, ARCH)[at]) for name, (case, direction, at) in GOOD.items()}
    single = OPERATION.launches(SINGLE, "forward", ARCH)[-1]
    asked = {name: (launch, [*expectations(launch, case, ARCH)]) for name, (case, launch) in good.items()}
    for name, (of, _, changes) in BAD.items():
        case, launch = (SINGLE, single) if "single" in changes else good[of]
        asked[name] = changed(launch, changes), [*expectations(launch, case, ARCH)]
    codes = [code for code, _ in read_launches([launch for launch, _ in asked.values()], ARCH)]
    return {
        name: broken(code, [*ALWAYS, *expected])
        for (name, (_, expected)), code in zip(asked.items(), codes, strict=True)
    }


# -- without the compiler ---------------------------------------------------------------------------------------------


def names(case: ConvCase, direction: str, target: str) -> list[tuple[str, set[str]]]:
    """Of each launch the kernel, and what is expected of it."""
    arch = ARCHS[target]
    found = [(launch, expectations(launch, case, arch)) for launch in OPERATION.launches(case, direction, arch)]
    return [(launch.kernel.__name__, {e.name for e in expected}) for launch, expected in found]


@pytest.mark.parametrize("target", ARCHS)
def test_products_have_to_be_on_tensor_cores_pipelined_and_written_in_whole_vectors(target: str) -> None:
    whole = {"matrix instructions", "pipelined", "wide stores"}
    for direction in ("forward", "dgrad", "wgrad"):
        assert (direction, whole) in names(DENSE, direction, target)
    columns = whole - ({"wide stores"} if target == "gfx942" else set())
    assert names(LAST_COLUMNS, "forward", target)[0] == ("pack", {"vectors"})
    relayout = ("relayout", {"wide loads", "wide stores"})
    assert names(replace(LAST_COLUMNS, activation="sigmoid"), "backward", target)[0] == relayout
    assert names(LAST_COLUMNS, "forward", target)[-1] == ("forward", columns)
    few = ConvCase((256, 3, 64, 224, 224), BF16)
    assert names(few, "forward", target) == [("few_channels_forward", {"matrix instructions", "wide stores"})]
    assert names(few, "wgrad", target)[0] == ("few_channels_wgrad", {"matrix instructions"})
    float64 = ConvCase(FEW[0], torch.float64)
    assert ("matrix instructions" in names(float64, "dgrad", target)[-1][1]) == (target != "sm_100")


@pytest.mark.parametrize("target", ARCHS)
def test_depthwise_has_to_read_and_write_16_bytes_a_thread(target: str) -> None:
    for direction in ("forward", "dgrad", "wgrad"):
        assert names(CHANNELS, direction, target)[0] == (f"depthwise_{direction}", {"vectors"})
    narrow = ConvCase((64, 36, 36, 56, 56), BF16, groups=36)  # rows of 72 bytes
    assert names(narrow, "forward", target) == [("depthwise_forward", set())]


def test_rows_of_a_depthwise_box_are_counted_by_hand() -> None:
    box = dict(BOX_H=4, STEP_H=1, STEP_W=1)
    assert row_accesses(box, "depthwise_forward") == (4 * 3, 4)  # four rows under three taps, each of which ends one
    assert row_accesses(box, "depthwise_dgrad") == (4 * 3, 4)
    assert row_accesses(box, "depthwise_wgrad") == (4 + 6 * 3, 0)
    two = dict(BOX_H=4, STEP_H=2, STEP_W=2)
    assert row_accesses(two, "depthwise_forward") == (4 * 3, 2)  # every other row ends one
    assert row_accesses(two, "depthwise_wgrad") == (4 + 9 * 3, 0)
    # Of four classes each reads four rows; even columns meet tap 1, odd ones taps 0 and 2.
    assert row_accesses(two, "depthwise_dgrad") == (4 * (1 + 2) * 2, 4 * 4)


def test_everything_holds_what_is_compiled_otherwise() -> None:
    for operation in find():
        some, everything = (
            {(case.name, direction) for case, directions in operation.compiled(how) for direction in directions}
            for how in (False, True)
        )
        assert some < everything, operation.name
        if operation.name == "conv":
            directions = ("forward", "dgrad", "wgrad", "backward")
            assert {(case.name, direction) for case in operation.cases for direction in directions} <= everything


def test_settings_are_shown_in_words() -> None:
    def shown(case: ConvCase, direction: str, at: int = 0) -> list[str]:
        return describe(OPERATION.launches(case, direction, ARCH)[at]).split()

    case = ConvCase((64, 128, 256, 28, 28), BF16, stride=2, activation="sigmoid")
    (strided,) = OPERATION.launches(case, "forward", ARCH)
    box = "box" + "×".join(str(strided.named[name]) for name in ("BOX_N", "BOX_H", "BOX_W"))
    assert {box, "step2×2", "channels_last", "sigmoid"} <= set(describe(strided).split())
    assert not {"step2×2", "sigmoid", "diagonal"} & set(shown(DENSE, "forward"))
    grouped = ConvCase((64, 128, 128, 28, 28), BF16, groups=32)
    assert {"groups_per_tile8", "diagonal"} <= set(shown(grouped, "forward", -1))
    taps = OPERATION.launches(DENSE, "wgrad", ARCH)[0].named["TAPS"]
    assert (f"taps{taps}" in shown(DENSE, "wgrad")) == (taps != 1)
    assert {"src_pixels", "third_src_pixels"} <= set(shown(LAST_COLUMNS, "forward"))
    assert {"src_channels", "y_channels", "dst_channels"} <= set(
        shown(ConvCase(FEW[0], BF16, activation="sigmoid"), "dgrad")
    )


def test_settings_are_found_and_changed_by_name() -> None:
    launch = OPERATION.launches(ConvCase(FEW[0], BF16, activation="sigmoid"), "dgrad", ARCH)[0]
    config: Any = launch.constants["CONFIG"]
    assert launch.kernel.__name__ == "relayout"
    assert launch.named["BLOCK_P"] == config.BLOCK_P
    assert launch.named["SRC_CHANNELS"] is config.SRC.CHANNELS is True
    assert launch.named["N"] == FEW[0][0], "arguments too"
    assert "CONFIG" not in launch.named
    assert with_settings(launch, VEC_P=1).settings == launch.settings | {"VEC_P": 1} != launch.settings
    with pytest.raises((TypeError, ValueError), match="VECTOR"):  # Python 3.13 raises the first
        with_settings(launch, VECTOR=1)


def test_a_product_multiplies_in_its_loop() -> None:
    inside = Compiled(1000, counts={"HGMMA": 4}, loops=(Loop(4, 2, 4, True, 0),))
    alone = Compiled(1000, counts={"HGMMA": 4})
    without = Compiled(1000, counts={"FFMA": 4})
    expected = [multiplies_with("HGMMA", reason="")]
    assert broken(inside, expected) == []
    assert broken(alone, expected) == ["matrix instructions: matrix instructions, but outside every loop ()"]
    assert len(broken(without, expected)) == 1


def test_what_is_asked_of_a_products_tile() -> None:
    sm_80, sm_90, sm_100, amd = (ARCHS[name] for name in ("sm_80", "sm_90", "sm_100", "gfx942"))

    def instructions(*case: Any) -> object:
        found = matrix_instructions(*case)
        return found and found[0]

    assert instructions(128, BF16, sm_80) == ["HMMA"]
    assert instructions(64, BF16, sm_90) == ["HGMMA"]
    assert instructions(32, BF16, sm_90) == ["HGMMA", "HMMA"]
    assert instructions(128, FP32, sm_100) == ["UTCHMMA", "HMMA"]
    assert instructions(128, torch.float64, sm_90) == ["DMMA"]
    assert instructions(128, torch.float64, sm_100) is None
    assert instructions(16, torch.float64, amd) == ["v_mfma"]

    def stores(row: int, share: int, dtype: torch.dtype, arch: Arch) -> list[Expectation]:
        """Of rows of so many bytes, of a tile of which a thread of one warp has so many."""
        tile = share * (64 if arch is amd else 32) // dtype.itemsize
        named = {"y": torch.empty(0, dtype=dtype), "VEC_STORE": row // dtype.itemsize, "BLOCK": tile}
        return [*tile_stores(cast(Launch, SimpleNamespace(named=named, num_warps=1)), "y", ["BLOCK"], arch)]

    code = Compiled(1000, counts={"STG": 2, "STG.64": 2, "store": 2, "store.64": 2})
    for arch, dtype, complaints in ((sm_80, BF16, 1), (amd, BF16, 0), (amd, FP32, 1)):
        assert len(broken(code, stores(16, 32, dtype, arch))) == complaints
    for too_small in ((8, 32, BF16, sm_80), (16, 16, BF16, sm_80), (16, 32, torch.float64, amd)):
        assert not stores(*too_small)
