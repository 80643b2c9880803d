"""What the heuristics choose, where a reason beside them names a shape."""

from dataclasses import replace
from typing import Any

import pytest

from tribp import versions
from tribp.launch.arch import ARCHS, ITEMSIZE, Arch
from tribp.launch.optim import MultiTensorProblem
from tribp.launch.tiles import fills_gpu
from tribp.ops.conv3x3.config import ConvProblem
from tribp.ops.linear.config import DgradProblem, ForwardProblem, WgradProblem

H100 = ARCHS["sm_90"]


def test_three_quarters_of_the_processors_are_enough() -> None:
    assert H100.processors == 132
    assert fills_gpu(99, H100)
    assert not fills_gpu(98, H100)


def tiles_of(m: int, n: int, arch: Arch, k: int = 512) -> set[tuple[int, int]]:
    """Of forward, dgrad and a convolution whose result is m × n."""
    facts: dict[str, Any] = dict(dtype="bfloat16", precision="ieee", arch=arch, vec=8, tma=True)
    forward = ForwardProblem(m, n, k, **facts).choose()
    dgrad = DgradProblem(m, k, n, **facts, may_fuse=False).choose()
    image = ConvProblem(
        1, m // 128, 128, n, 128, 1, 1, 1, **facts, along=True, whole=False, wide=True, stepped=False
    ).choose()  # fmt: skip
    return {(config.block_i, config.block_j) for config in (forward, dgrad, image)}


@pytest.mark.parametrize(("rows", "side"), [(13, 128), (12, 64)])
def test_products_take_the_largest_tile_that_fills_the_gpu(rows: int, side: int) -> None:
    """Nine columns of 128×128 tiles on 148 processors: 13 rows make 117 programs, 12 make 108."""
    assert tiles_of(128 * rows, 128 * 9, ARCHS["sm_100"]) == {(side, side)}


@pytest.mark.parametrize(("rows", "tile"), [(8, (128, 128)), (7, (64, 128)), (4, (64, 128)), (3, (64, 64))])
def test_products_by_wgmma_take_the_cheapest_tile(rows: int, tile: tuple[int, int]) -> None:
    """Nine columns: 72 programs of 128×128 on 132 processors, or 126 of 64×128, or 108 of 64×64.

    A tile more than a processor, and two programs take turns there.
    """
    assert tiles_of(128 * rows, 128 * 9, H100) == {tile}


def test_a_tile_that_reads_less_is_worth_idle_processors() -> None:
    """96 programs for 132 processors. 32×32 would fill them, and read twice as much."""
    assert tiles_of(512, 768, H100, 3072) == {(64, 64)}
    assert tiles_of(2048, 768, H100, 3072) == {(128, 128)}


@pytest.mark.parametrize(
    ("k", "tile"), [(1024, (128, 256)), (784, (256, 128)), (128, (128, 128))], ids=["wide", "tall", "narrow"]
)
def test_large_tiles_lie_so_that_the_least_is_outside(k: int, tile: tuple[int, int]) -> None:
    dgrad = DgradProblem(65536, 4096, k, "bfloat16", "ieee", H100, vec=8, tma=True, may_fuse=False).choose()
    assert (dgrad.block_i, dgrad.block_j) == tile
    forward = ForwardProblem(65536, k, 4096, "bfloat16", "ieee", H100, vec=8, tma=True).choose()
    assert (forward.block_i, forward.block_j) == tile
    assert (forward.persistent > 0) == (k > 128)


@pytest.mark.parametrize(("target", "most"), [("sm_80", 1024), ("sm_90", 1024), ("sm_100", 512)])
def test_short_sums_have_tiles_that_share_a_processor(target: str, most: int) -> None:
    arch = ARCHS[target]
    for k, columns in ((most, 128), (most + 1, 256)):
        problem = ForwardProblem(65536, 4096, k, "bfloat16", "ieee", arch, vec=8, tma=arch.has_tma)
        assert problem.choose().block_j == columns


@pytest.mark.parametrize(
    ("rows", "tile"), [(33, (128, 256, 4)), (34, (128, 128, 2)), (49, (128, 128, 2)), (50, (128, 256, 4))]
)
def test_programs_that_are_there_all_at_once_have_two_stages(rows: int, tile: tuple[int, int, int]) -> None:
    """Eight columns of 128×128: 272 to 392 programs on 132 processors, three for each; or half as many of 128×256."""
    forward = ForwardProblem(128 * rows, 1024, 2048, "bfloat16", "ieee", H100, vec=8, tma=True).choose()
    assert (forward.block_i, forward.block_j, forward.num_stages) == tile
    dgrad = DgradProblem(128 * rows, 2048, 1024, "bfloat16", "ieee", H100, vec=8, tma=True, may_fuse=False).choose()
    assert (dgrad.block_i, dgrad.block_j, dgrad.num_stages) == tile
    image = ConvProblem(
        1, rows, 128, 1024, 256, 1, 1, 1, "bfloat16", "ieee", H100,
        vec=8, tma=True, along=True, whole=False, wide=False, stepped=False,
    ).choose()  # fmt: skip
    assert (image.block_i, image.block_j, image.num_stages) == tile


def test_dgrad_of_four_programs_a_processor_is_shallow() -> None:
    def depth(m: int, n: int, k: int, **more: bool) -> int:
        facts = dict(may_fuse=False) | more
        return DgradProblem(m, n, k, "bfloat16", "ieee", H100, vec=8, tma=True, **facts).choose().block_l

    assert depth(8192, 1024, 1024) == depth(4096, 1024, 2048) == depth(8192, 512, 1024) == 32
    assert depth(8192, 1024, 1024, along=True) == depth(8192, 1024, 1024, for_lower=True) == 64
    assert depth(16384, 1024, 1024) == depth(6272, 1024, 1024) == 64


def test_dgrad_above_another_layer_shares_its_processor() -> None:
    """By fewer registers, where wgmma takes 16 bits; float32 may take what it needs, as without that layer."""

    def limit(dtype: str, precision: str, *, for_lower: bool) -> int | None:
        problem = DgradProblem(
            8192, 1024, 1024, dtype, precision, H100, vec=4, tma=True, may_fuse=False, along=True, for_lower=for_lower
        )  # fmt: skip
        config = problem.choose()
        assert config.block_i * config.block_j == 128 * 128
        return config.max_registers

    assert limit("bfloat16", "ieee", for_lower=True) == limit("float16", "ieee", for_lower=True) == 128
    if versions.descriptors_round_to_tf32():  # elsewhere mma.sync multiplies float32, in smaller tiles
        assert limit("float32", "tf32", for_lower=True) == limit("float32", "tf32", for_lower=False) == 255


@pytest.mark.parametrize(
    ("elements", "types", "expected"),
    [
        (8_000, ("float32",), (512, 1, 2)),
        (4_096_000, ("float32",), (512, 8, 2)),
        (10**8, ("float32",), (1024, 8, 4)),
        (10**8, ("bfloat16", "float32"), (512, 16, 2)),
        (10**8, ("bfloat16", "int8"), (512, 16, 2)),
        (10**8, ("float64",), (512, 8, 4)),
    ],
)
def test_steps_take_the_blocks_that_were_measured(
    elements: int, types: tuple[str, ...], expected: tuple[int, int, int]
) -> None:
    config = MultiTensorProblem(elements, types, False, H100).choose()
    assert (config.block, config.chunk_blocks, config.num_warps) == expected


def test_the_shapes_that_the_rule_names() -> None:
    """8192×1024×1024: 32 tiles of 128×256 in four parts are 128 programs. 64×512 images of 7×7: 100 of 128×128."""
    spare = 2 * 8192 * 1024
    wgrad = WgradProblem(
        8192, 1024, 1024, "bfloat16", "ieee", H100, vec=8, tma=True, may_fuse=True, spare=spare
    ).choose()  # fmt: skip
    assert (wgrad.block_i, wgrad.block_j, wgrad.splits, wgrad.fuse_dz) == (128, 256, 4, False)
    conv = ConvProblem(
        64, 7, 7, 512, 512, 1, 1, 1, "bfloat16", "ieee", H100,
        vec=8, tma=True, along=True, whole=False, wide=False, stepped=False,
    ).choose()  # fmt: skip
    assert (conv.block_i, conv.block_j) == (128, 128)


@pytest.mark.parametrize(
    ("m", "n", "k", "splits"), [(8192, 768, 3072, 3), (4096, 4096, 4096, 1), (8192, 1024, 1024, 4)]
)
def test_splits_leave_no_round_of_programs_half_empty(m: int, n: int, k: int, splits: int) -> None:
    """72 tiles of 128×256 on 132 processors: 216 programs are two rounds of a third of the sum each."""
    wgrad = WgradProblem(m, n, k, "bfloat16", "ieee", H100, vec=8, tma=True, may_fuse=False, spare=0).choose()
    assert (wgrad.block_i * wgrad.block_j, wgrad.splits) == (128 * 256, splits)


@pytest.mark.parametrize(
    ("m", "n", "k", "tile", "splits"),
    [
        (64, 128, 9216, (32, 32), 16),
        (8, 10, 100_000, (16, 16), 131),
        (64, 4096, 25088, (64, 128), 4),
        (256, 512, 32000, (128, 128), 16),  # by 128 programs of 32×32 it would read four times as much
        (64, 1024, 21841, (64, 128), 16),
        (64, 128, 1024, (32, 32), 1),  # a second launch would take as long
        (256, 1000, 2048, (64, 64), 1),
    ],
)
def test_long_sums_of_few_tiles_are_split(m: int, n: int, k: int, tile: tuple[int, int], splits: int) -> None:
    """So that there is a program a processor, of the largest tile that allows it; for dx as for y."""
    facts: dict[str, Any] = dict(vec=8 if k % 8 == 0 else 1, tma=k % 8 == 0)
    chosen = ForwardProblem(m, n, k, "bfloat16", "ieee", H100, **facts).choose()
    assert (chosen.block_i, chosen.block_j, chosen.splits) == (*tile, splits)
    assert chosen.splits * chosen.tiles(m, n) <= H100.processors
    dgrad = DgradProblem(m, k, n, "bfloat16", "ieee", H100, **facts, may_fuse=True)
    assert dgrad.is_split == (splits > 1)


@pytest.mark.parametrize(
    ("shape", "dtype", "precision", "arch", "tma", "tile", "splits"),
    [
        ((256, 512, 32000), "float32", "tf32x3", "sm_90", True, (32, 128), 4),
        ((8, 512, 20000), "float32", "tf32x3", "sm_90", False, (16, 32), 8),  # 128 columns spill
        ((64, 333, 4096), "float32", "tf32", "sm_90", False, (32, 32), 6),  # two warps of 64×64 load slowly
        ((128, 77, 1024), "float32", "tf32x3", "sm_90", True, (32, 32), 1),  # in parts slower by the model
        ((256, 1024, 2048), "float64", "ieee", "sm_90", True, (32, 32), 1),
        ((64, 1000, 4096), "bfloat16", "ieee", "sm_90", True, (64, 64), 8),
        ((64, 1000, 4096), "bfloat16", "ieee", "sm_80", False, (32, 32), 1),
        ((128, 333, 2047), "bfloat16", "ieee", "sm_90", False, (32, 32), 3),  # odd pitch
    ],
)
def test_parts_of_each_kind(
    shape: tuple[int, int, int], dtype: str, precision: str, arch: str, tma: bool, tile: tuple[int, int], splits: int
) -> None:
    vec = 1 if shape[2] % 2 else 4
    problem = ForwardProblem(*shape, dtype, precision, ARCHS[arch], vec, tma)
    chosen = problem.choose()
    assert (chosen.block_i, chosen.block_j, chosen.splits) == (*tile, splits)
    assert problem.is_legal(chosen)
    assert not problem.is_legal(replace(chosen, persistent=True, splits=2))
    assert splits == 1 or not tma or chosen.num_stages == 4, "a processor has one program"


@pytest.mark.parametrize(
    ("shape", "arch", "dtype", "precision", "tile", "splits"),
    [
        ((1, 7, 512, 512), "sm_90", "bfloat16", "ieee", (64, 64), 9),
        ((8, 7, 512, 512), "sm_90", "bfloat16", "ieee", (128, 128), 8),
        ((2, 16, 1280, 1280), "sm_90", "bfloat16", "ieee", (128, 128), 3),
        ((16, 7, 512, 512), "sm_90", "bfloat16", "ieee", (128, 128), 4),  # whole, 112 boxes of 64, not 104
        ((64, 7, 512, 512), "sm_90", "bfloat16", "ieee", (128, 128), 1),  # measured: a program a processor already
        ((1, 14, 256, 256), "sm_90", "bfloat16", "ieee", (32, 32), 1),  # a second launch would take as long
        ((1, 7, 512, 512), "sm_90", "float32", "tf32x3", (32, 128), 9),
        ((1, 7, 512, 512), "sm_90", "float64", "ieee", (64, 64), 9),
        ((1, 7, 512, 512), "sm_80", "bfloat16", "ieee", (64, 64), 9),
        ((1, 16, 64, 1280), "sm_80", "float32", "tf32x3", (64, 64), 22),  # 128×64 by four warps spills
        ((1, 7, 512, 512), "gfx942", "bfloat16", "ieee", (64, 64), 9),
    ],
)
def test_convolutions_of_few_pixels_are_in_parts(
    shape: tuple[int, int, int, int], arch: str, dtype: str, precision: str, tile: tuple[int, int], splits: int
) -> None:
    """n images of side² pixels, j columns, sums over nine taps of l channels."""
    (n, side, j, l), gpu = shape, ARCHS[arch]
    facts: dict[str, Any] = dict(vec=16 // ITEMSIZE[dtype], tma=gpu.has_tma, whole=False, stepped=False)
    for wide in (False, True):
        problem = ConvProblem(n, side, side, j, l, 1, 1, 1, dtype, precision, gpu, along=True, wide=wide, **facts)
        chosen = problem.choose()
        assert (chosen.block_i, chosen.block_j, chosen.splits) == (*tile, splits)
        assert problem.is_legal(chosen)
        if splits > 1:
            assert not problem.is_legal(replace(chosen, flat=False)), "taps have a loop of their own"
            if precision == "tf32x3" and not gpu.has_tma:
                large = problem.adjusted(replace(chosen, block_i=128, block_j=64, box=(1, 16, 8)))
                assert problem.is_legal(replace(large, splits=1))
                assert not problem.is_legal(large)
            several: list[dict[str, Any]] = [dict(classes=4), dict(group_tiles=2), dict(groups_per_tile=2)]
            for changes in several:
                assert problem._replace(**changes).choose().splits == 1
                assert not problem._replace(**changes).is_legal(chosen)


@pytest.mark.parametrize(
    ("arch", "dtype", "costly", "columns"),
    [
        ("gfx942", "float64", True, 64), ("gfx942", "float64", False, 128), ("gfx942", "float32", True, 128),
        ("sm_100", "bfloat16", True, 128), ("sm_100", "bfloat16", False, 256),
    ],
)  # fmt: skip
def test_costly_activations_have_room(arch: str, dtype: str, costly: bool, columns: int) -> None:
    """Beside 128×256 on sm_100, and 128×128 in float64 on gfx942, a tanh spills."""
    gpu = ARCHS[arch]
    precision = "tf32x3" if dtype == "float32" else "ieee"
    vec = 16 // ITEMSIZE[dtype]
    problem = ForwardProblem(4096, 4096, 4096, dtype, precision, gpu, vec, gpu.has_tma, costly=costly)
    chosen = problem.choose()
    assert (chosen.block_i, chosen.block_j) == (128, columns)
    assert not (costly and problem.is_legal(replace(chosen, block_j=2 * columns)))


def test_dx_in_parts_saves_what_it_costs() -> None:
    """dgrad forms the lower layer's dz in its launch, and its own on load: `forward` needs a pass for each."""
    facts: dict[str, Any] = dict(dtype="bfloat16", precision="ieee", arch=H100, vec=8, tma=True)
    long, short = ((256, 32000, 512), (16, 2448, 1024))
    assert DgradProblem(*long, **facts, may_fuse=True, for_lower=True).is_split
    assert DgradProblem(*short, **facts, may_fuse=False).is_split
    assert not DgradProblem(*short, **facts, may_fuse=False, for_lower=True).is_split
    assert not DgradProblem(*short, **facts, may_fuse=True).is_split


def tile_of(n: int, side: int, arch: Arch = H100, dtype: str = "bfloat16", **more: Any) -> tuple[int, int, int]:
    """Pixels, stages and warps of 64 columns."""
    facts: dict[str, Any] = dict(vec=8, tma=arch.has_tma, along=True, whole=False, wide=False, stepped=False) | more
    config = ConvProblem(n, side, side, 64, 64, 1, 1, 1, dtype, "ieee", arch, **facts).choose()
    assert config.block_j == 64
    return config.block_i, config.num_stages, config.num_warps


def test_64_columns_take_the_tile_that_was_measured() -> None:
    assert tile_of(256, 56) == tile_of(256, 56, dtype="float16") == tile_of(256, 56, wide=True) == (128, 3, 4)
    assert tile_of(256, 56, stepped=True) == (128, 3, 4)
    assert tile_of(17, 28) == (128, 4, 4), "105 programs, each alone on its processor"
    assert tile_of(11, 28) == (128, 4, 4), "68 programs; of 64×64 some processors would have two"
    assert tile_of(10, 28) == (64, 4, 4), "123 programs, each alone on its processor"
    assert tile_of(256, 56, ARCHS["sm_100"]) == (256, 4, 8), "not measured"
