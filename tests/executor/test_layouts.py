"""wgmma's matrices and tensor copies' boxes, against writers of the documented layouts that go element by element."""

import itertools
from typing import Any

import numpy as np
import pytest

from . import mbarriers
from .arrays import UNSIGNED, Array
from .findings import RefusedError
from .tensor_copies import POISON, TensorCopies, TensorMap
from .wgmma import Descriptor, Product, Wgmma, WgmmaQueue, a_from_registers, d_to_matrix, d_to_registers, gather_tile

SIZE = 1 << 17
SWIZZLES = {16: 0, 32: 1, 64: 2, 128: 3}  # span: B of Swizzle<B, 4, 3>
Mode = tuple[Any, Any]  # shape and stride


def refuse(sentence: str) -> Any:
    raise AssertionError(sentence)


# Layouts as the ISA writes them: CuTe's nested shapes and strides, in elements (9.7.15.5.1.2.1.3).


def cute(coordinate: int, shape: Any, stride: Any) -> int:
    """CuTe's layout function of one mode: the coordinate, split colexicographically over a nested shape."""
    total = 0
    for size, step in zip(shape, stride, strict=True):
        total += coordinate % size * step
        coordinate //= size
    assert coordinate == 0
    return total


def swizzle(b: int, address: int) -> int:
    """Swizzle<B, 4, 3>: the bits from 4 + 3 on, B of them, onto those from 4 on."""
    return address ^ (address >> 3 & ((1 << b) - 1) << 4)


def canonical(rows: int, k: int, itemsize: int, span: int, mn_major: bool, lead: int, stride: int) -> tuple[Mode, Mode]:
    """(shape, stride) of the rows, and of k, from the table; leading and stride in bytes."""
    T, LBO, SBO, S = 16 // itemsize, lead // itemsize, stride // itemsize, span // 16
    if mn_major and span == 16:
        return ((T, 1, rows // T), (1, T, SBO)), ((8, k // 8), (1 * T, LBO))
    if mn_major:
        return ((T, S, rows // (T * S)), (1, T, LBO)), ((8, k // 8), (S * T, SBO))
    if span == 16:
        return ((8, rows // 8), (1 * T, SBO)), ((T, k // T), (1, LBO))
    return ((8, rows // 8), (S * T, SBO)), ((T, k // T), (1, T))


def place(smem: Array, start: int, matrix: Array, span: int, modes: tuple[Mode, Mode]) -> None:
    """Write a matrix (rows, k) of uint16 or uint32 element by element."""
    written = set()
    for r, c in itertools.product(*map(range, matrix.shape)):
        at = swizzle(SWIZZLES[span], start + (cute(r, *modes[0]) + cute(c, *modes[1])) * matrix.itemsize)
        assert at not in written
        written.add(at)
        smem[at : at + matrix.itemsize] = np.frombuffer(matrix[r, c].tobytes(), np.uint8)


def tile(smem: Array, start: int, matrix: Array, span: int, mn_major: bool) -> Descriptor:
    """Place it with gaps, so that a mix-up of the two offsets shows."""
    (rows, k), itemsize, pattern = matrix.shape, matrix.itemsize, 8 * span  # pattern: 8 rows, or k's, of one span
    if mn_major:
        lead, stride = (128, 16 * k + 128) if span == 16 else (pattern * max(4, k // 8 + 1), pattern)
    else:
        lead, stride = (16 * rows + 128, 128) if span == 16 else (16, pattern * 2)
    place(smem, start, matrix, span, canonical(rows, k, itemsize, span, mn_major, lead, stride))
    return Descriptor(start, lead, stride, 0, span)


TILES = [
    *itertools.product([64, 256], [16, 32, 64, 128], [False, True], [2]),
    *itertools.product([96], [16, 32, 64, 128], [False], [4]),
]


@pytest.mark.parametrize(("rows", "span", "mn_major", "itemsize"), TILES)
def test_tiles_lie_as_the_isa_says(rows: int, span: int, mn_major: bool, itemsize: int) -> None:
    rng = np.random.default_rng(rows + span)
    smem = rng.integers(0, 256, SIZE, dtype=np.uint8)
    matrix = rng.integers(0, 1 << 8 * itemsize, (rows, 32 // itemsize), dtype=UNSIGNED[itemsize])
    descriptor = tile(smem, 3 * 1024, matrix, span, mn_major)
    assert np.array_equal(gather_tile(smem, descriptor, rows, 32 // itemsize, itemsize, mn_major), matrix)


@pytest.mark.parametrize(
    ("exact", "span", "mn_major", "itemsize", "leading", "stride"),
    [  # the ISA's worked examples, figures 166 to 170: exact layout, LBO, SBO
        ((((8, 2), (4, 32)), ((4, 4), (1, 64))), 16, False, 4, 64 * 4, 32 * 4),
        ((((8, 2), (8, 64)), ((4, 4), (1, 4))), 32, False, 4, 16, 64 * 4),
        ((((8, 1, 2), (1, 8, 64)), ((8, 2), (8, 128))), 16, True, 2, 128 * 2, 64 * 2),
        ((((8, 2, 2), (1, 8, 128)), ((8, 2), (16, 256))), 32, True, 2, 128 * 2, 256 * 2),
        ((((8, 4, 2), (1, 8, 256)), ((8, 2), (32, 512))), 64, True, 2, 256 * 2, 512 * 2),
    ],
)
def test_the_worked_examples_of_the_isa(
    exact: tuple[Mode, Mode], span: int, mn_major: bool, itemsize: int, leading: int, stride: int
) -> None:
    rows, k = int(np.prod(exact[0][0])), 32 // itemsize
    smem = np.zeros(SIZE, np.uint8)
    matrix = np.arange(rows * k, dtype=UNSIGNED[itemsize]).reshape(rows, k)
    place(smem, 1024, matrix, span, exact)
    descriptor = Descriptor(1024, leading, stride, 0, span)
    assert np.array_equal(gather_tile(smem, descriptor, rows, k, itemsize, mn_major), matrix)


@pytest.mark.parametrize("itemsize", [2, 4])
def test_the_next_k_begins_inside_the_pattern(itemsize: int) -> None:
    """A 128-byte row holds 4 steps of k; step i starts 32·i bytes on, and the swizzle stays that of the address."""
    k = 128 // itemsize
    matrix = np.random.default_rng(5).integers(0, 1 << 16, (64, k)).astype(UNSIGNED[itemsize])
    smem = np.zeros(SIZE, np.uint8)
    place(smem, 4096, matrix, 128, canonical(64, k, itemsize, 128, False, 16, 1024))
    for step in range(4):
        part = gather_tile(smem, Descriptor(4096 + 32 * step, 16, 1024, 0, 128), 64, k // 4, itemsize, False)
        assert np.array_equal(part, matrix[:, step * k // 4 : (step + 1) * k // 4])


def test_descriptors_are_decoded_as_the_isa_numbers_their_bits() -> None:
    bits = 0x3FFF | 0x1234 << 16 | 0x2345 << 32 | 5 << 49 | 2 << 62
    assert Descriptor.decode(bits) == Descriptor(0x3FFF << 4, 0x1234 << 4, 0x2345 << 4, 5, 64)
    assert Descriptor.decode(bits).encode() == bits
    # Triton's constant for a K-major tile of 128-byte rows.
    assert Descriptor.decode(4611686293305294848) == Descriptor(0, 0, 1024, 0, 128)


# Fragments: the ISA's formulas, thread by thread (9.7.15.5.1.1).


def a_registers(matrix: Array) -> Array:
    """A of 16 bits (64 × 16) or of 32 (64 × 8)."""
    registers = np.zeros((4, 128), np.uint32)
    per = 4 // matrix.itemsize
    for thread, i in itertools.product(range(128), range(4 * per)):
        warp, lane = divmod(thread, 32)
        row = warp * 16 + lane // 4 + 8 * (i // per % 2)
        column = lane % 4 * per + i % per + 4 * per * (i // per // 2)
        registers[i // per, thread] |= np.uint32(int(matrix[row, column]) << 16 * (i % per))
    return registers


@pytest.mark.parametrize("itemsize", [2, 4])
def test_a_comes_from_registers_as_the_isa_says(itemsize: int) -> None:
    matrix = np.arange(64 * 32 // itemsize, dtype=UNSIGNED[itemsize]).reshape(64, -1)
    assert np.array_equal(a_from_registers(a_registers(matrix), itemsize), matrix)


@pytest.mark.parametrize("n", [8, 256])
@pytest.mark.parametrize("half", [False, True])
def test_d_lies_in_registers_as_the_isa_says(n: int, half: bool) -> None:
    matrix = np.arange(64 * n).reshape(64, n).astype(np.float16 if half else np.float32)
    per = 2 if half else 1
    registers = np.zeros((n // 2 // per, 128), np.uint32)
    bits = matrix.view(np.uint16 if half else np.uint32)
    for thread, i in itertools.product(range(128), range(n // 2)):
        warp, lane = divmod(thread, 32)
        row, column = warp * 16 + lane // 4 + (8 if i % 4 >= 2 else 0), 8 * (i // 4) + lane % 4 * 2 + i % 2
        registers[i // per, thread] |= np.uint32(int(bits[row, column]) << (16 * (i % 2) if half else 0))
    assert np.array_equal(d_to_matrix(registers, n, half), matrix)
    assert np.array_equal(d_to_registers(matrix), registers)


# Products.


def as_bits(values: Array, kind: str) -> Array:
    """float32 values that the type holds exactly."""
    if kind == "f16":
        return values.astype(np.float16).view(np.uint16)
    bits = np.ascontiguousarray(values.astype(np.float32)).view(np.uint32)
    return (bits >> 16).astype(np.uint16) if kind == "bf16" else bits


WAYS = [  # type, A from registers, A and B transposed: tf32 and registers are not
    *itertools.product(["bf16", "f16"], [False], [0, 1], [0, 1]),
    *itertools.product(["bf16", "f16"], [True], [0], [0, 1]),
    *itertools.product(["tf32"], [False, True], [0], [0]),
]


@pytest.mark.parametrize(("kind", "in_registers", "trans_a", "trans_b"), WAYS)
@pytest.mark.parametrize("n", [8, 128])
def test_products(kind: str, n: int, in_registers: bool, trans_a: int, trans_b: int) -> None:
    form = Wgmma.parse(f"wgmma.mma_async.sync.aligned.m64n{n}k{8 if kind == 'tf32' else 16}.f32.{kind}.{kind}")
    rng = np.random.default_rng(n)
    a = rng.integers(-8, 9, (64, form.k)).astype(np.float32)  # small integers: every sum is exact
    b = rng.integers(-8, 9, (form.k, n)).astype(np.float32)
    d = rng.integers(-99, 99, (64, n)).astype(np.float32)
    smem = np.zeros(SIZE, np.uint8)
    span_b = 64 if trans_b and n % 32 == 0 else 16 if trans_b else 32
    left: Any = tile(smem, 1024, as_bits(a, kind), 128, bool(trans_a)).encode()
    left = a_registers(as_bits(a, kind)) if in_registers else left
    right = tile(smem, 1 << 16, as_bits(b.T.copy(), kind), span_b, bool(trans_b)).encode()
    for accumulate, sign, late in itertools.product([True, False], [1, -1], [True, False]):
        queue = WgmmaQueue(smem, refuse, late=late)
        queue.fence()
        product = Product(form, "d", left, right, (trans_a, trans_b), sign)
        registers = queue.issue(product, d_to_registers(d), accumulate)
        queue.commit()
        arrived = queue.wait(0, lambda _: left)
        assert len(arrived) == late
        registers = arrived[0][1] if late else registers
        assert np.array_equal(d_to_matrix(registers, n, False), sign * (a @ b) + (d if accumulate else 0))


def test_float16_accumulators_and_the_cut_of_tf32() -> None:
    ones = np.ones((64, 16), np.float16).view(np.uint16)
    form = Wgmma.parse("wgmma.mma_async.sync.aligned.m64n8k16.f16.f16.f16")
    assert form.multiply(ones, ones[:8], None).dtype == np.float16
    assert (form.multiply(ones, ones[:8], None) == 16).all()
    form = Wgmma.parse("wgmma.mma_async.sync.aligned.m64n8k8.f32.tf32.tf32")
    almost = np.full((64, 8), 1 + 2**-10 - 2**-20, np.float32)  # cut: 1; rounded: 1 + 2^-10
    assert (form.multiply(almost.view(np.uint32), np.ones((8, 8), np.float32).view(np.uint32), None) == 8).all()


def test_results_arrive_at_the_wait_and_add_up_in_order() -> None:
    """As Triton pipelines: D is in flight across wait_group 1, and arrives with its last group."""
    form = Wgmma.parse("wgmma.mma_async.sync.aligned.m64n8k16.f32.f16.f16")
    smem, ones = np.zeros(SIZE, np.uint8), np.ones((64, 16), np.float16).view(np.uint16)
    a, b = (tile(smem, start, m, 16, False).encode() for start, m in ((1024, ones), (8192, ones[:8].copy())))
    queue = WgmmaQueue(smem, refuse)
    registers = np.zeros((4, 128), np.uint32)
    queue.fence()
    for _ in range(5):
        registers = queue.issue(Product(form, "d", a, b), registers, True)
        queue.commit()
        assert queue.wait(1, refuse) == []
        assert np.isnan(d_to_matrix(registers, 8, False)).all()
    queue.issue(Product(form, "e", a, b), np.zeros((4, 128), np.uint32), True)
    queue.commit()
    ((name, d),) = queue.wait(1, refuse)
    assert name == "d"
    assert (d_to_matrix(d, 8, False) == 80).all()
    ((name, e),) = queue.wait(0, refuse)
    assert (d_to_matrix(e, 8, False) == 16).all()
    queue.finish()


# Tensor copies.


class Ram:
    """Global memory that knows where it ends, byte by byte."""

    def __init__(self, size: int, base: int = 1 << 20) -> None:
        self.bytes, self.base = np.zeros(size, np.uint8), base

    def gather(self, addresses: Array, nbytes: int) -> Array:
        at = addresses - self.base
        assert nbytes > 0
        assert (at >= 0).all()
        assert (at + nbytes <= len(self.bytes)).all()
        return self.bytes[at[:, None] + np.arange(nbytes)]

    def scatter(self, addresses: Array, rows: Array) -> None:
        self.gather(addresses, rows.shape[1])
        self.bytes[(addresses - self.base)[:, None] + np.arange(rows.shape[1])] = rows


BOXES = [
    # dims, box (innermost first), itemsize, swizzle, coordinates
    ((200, 50), (64, 32), 2, 3, (0, 0)),
    ((200, 50), (64, 32), 2, 3, (192, 40)),
    ((200, 50), (64, 32), 2, 3, (-8, -3)),
    ((200, 50), (64, 32), 2, 3, (200, 0)),
    ((200, 50), (64, 32), 2, 3, (-64, 60)),
    ((96, 50), (32, 16), 2, 2, (70, 45)),
    ((96, 50), (16, 16), 2, 1, (90, 35)),
    ((96, 50), (40, 16), 2, 0, (90, 35)),
    ((33, 20), (32, 8), 4, 3, (5, 17)),
    ((34, 20), (16, 8), 8, 3, (30, -5)),
    ((100,), (64,), 4, 0, (70,)),
    ((40, 7, 5), (32, 4, 2), 4, 3, (16, 5, -1)),
    ((72, 6, 1, 5, 3), (64, 4, 1, 2, 2), 2, 3, (64, -1, 0, 4, 2)),
]


def map_of(dims: Any, box: Any, itemsize: int, mode: int, ram: Ram) -> TensorMap:
    """Strides in units of 16 bytes, with a gap."""
    strides, size = [], dims[0] * itemsize
    for dim in dims[1:]:
        strides.append(-(-size // 16) * 16 + 16)
        size = strides[-1] * dim
    assert size <= len(ram.bytes)
    return TensorMap(ram.base, {2: 1, 4: 2, 8: 4}[itemsize], dims, tuple(strides), box, mode)


def pairs(tensor: TensorMap, coordinates: tuple[int, ...], at: int) -> list[tuple[int, int | None]]:
    """Of every element of a box: its byte in shared memory, and in the tensor (None: it lies outside)."""
    found: list[tuple[int, int | None]] = []
    for n, index in enumerate(itertools.product(*(range(size) for size in reversed(tensor.box)))):
        place = [c + i for c, i in zip(coordinates, reversed(index), strict=True)]
        inside = all(0 <= x < dim for x, dim in zip(place, tensor.dims, strict=True))
        byte = place[0] * tensor.itemsize + sum(x * s for x, s in zip(place[1:], tensor.strides, strict=True))
        found.append((swizzle(tensor.swizzle, at + n * tensor.itemsize), byte if inside else None))
    return found


@pytest.mark.parametrize(("dims", "box", "itemsize", "mode", "coordinates"), BOXES)
@pytest.mark.parametrize("late", [True, False])
def test_loads(dims: Any, box: Any, itemsize: int, mode: int, coordinates: Any, late: bool) -> None:
    rng = np.random.default_rng(0)
    ram = Ram(1 << 17)
    ram.bytes[:] = rng.integers(1, 256, len(ram.bytes))
    tensor = map_of(dims, box, itemsize, mode, ram)
    smem = rng.integers(0, 256, SIZE, dtype=np.uint8)
    expected, to, barrier = smem.copy(), 1024 + 128, SIZE - 64
    copies = TensorCopies(smem, ram, refuse, late=late)
    mbarriers.init(smem, barrier, 1)
    mbarriers.expect_bytes(smem, barrier, tensor.box_bytes)
    mbarriers.arrive(smem, barrier)
    copies.load(tensor, [c % (1 << 32) for c in coordinates], to, barrier)
    if late:
        assert (smem[to : to + tensor.box_bytes] == POISON).all()
        assert not copies.try_wait(barrier, 0)  # as late as can be: the first time in vain
    assert copies.try_wait(barrier, 0)
    copies.finish()
    for shared, byte in pairs(tensor, coordinates, to):
        expected[shared : shared + itemsize] = 0 if byte is None else ram.bytes[byte : byte + itemsize]
    assert np.array_equal(smem[: SIZE - 64], expected[: SIZE - 64])


@pytest.mark.parametrize(("dims", "box", "itemsize", "mode", "coordinates"), BOXES)
@pytest.mark.parametrize("late", [True, False])
def test_stores(dims: Any, box: Any, itemsize: int, mode: int, coordinates: Any, late: bool) -> None:
    ram = Ram(1 << 17)
    tensor = map_of(dims, box, itemsize, mode, ram)
    smem = np.random.default_rng(1).integers(1, 256, SIZE, dtype=np.uint8)
    copies = TensorCopies(smem, ram, refuse, late=late)
    copies.store(7, tensor, coordinates, 2048)
    copies.commit(7)
    if late:
        assert not ram.bytes.any()
    copies.wait(7, 0, read=True)
    copies.finish()
    expected = np.zeros_like(ram.bytes)
    for shared, byte in pairs(tensor, coordinates, 2048):
        if byte is not None:
            expected[byte : byte + itemsize] = smem[shared : shared + itemsize]
    assert np.array_equal(ram.bytes, expected)


def test_a_load_over_what_a_store_still_reads_is_reported() -> None:
    said: list[str] = []
    ram, smem = Ram(1 << 16), np.ones(SIZE, np.uint8)
    tensor = map_of((64, 8), (64, 8), 2, 3, ram)
    copies = TensorCopies(smem, ram, said.append)
    mbarriers.init(smem, 0, 1)
    copies.store(0, tensor, (0, 0), 1024)
    copies.load(tensor, (0, 0), 1024, 0)
    assert "still reads" in said[0]


def test_a_loaded_tile_is_what_wgmma_reads() -> None:
    """A box of 64 bf16 a row under the 128-byte swizzle is a K-major tile, and an MN-major one read the other way."""
    ram = Ram(1 << 17)
    matrix = np.random.default_rng(3).integers(0, 1 << 16, (128, 64), dtype=np.uint16)
    ram.bytes[: matrix.nbytes] = matrix.view(np.uint8).ravel()
    smem = np.zeros(SIZE, np.uint8)
    mbarriers.init(smem, 0, 1)
    tensor = TensorMap(ram.base, 9, (64, 128), (128,), (64, 128), 3)
    TensorCopies(smem, ram, refuse, late=False).load(tensor, (0, 0), 4096, 0)
    for step in range(4):
        part = gather_tile(smem, Descriptor(4096 + 32 * step, 16, 1024, 0, 128), 128, 16, 2, False)
        assert np.array_equal(part, matrix[:, 16 * step : 16 * step + 16])
    for step in range(8):  # 16 rows of memory are 16 k's, 64 columns are m
        part = gather_tile(smem, Descriptor(4096 + 2048 * step, 0, 1024, 0, 128), 64, 16, 2, True)
        assert np.array_equal(part, matrix[16 * step : 16 * step + 16].T)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(address=(1 << 20) + 8), "base address"),
        (dict(strides=(136,)), "stride"),
        (dict(strides=(1 << 40,)), "below"),
        (dict(box=(64, 257)), "box"),
        (dict(box=(36, 8), swizzle=0), "multiple of 16"),
        (dict(box=(64, 8), swizzle=2), "swizzle"),
        (dict(dims=(64, 0)), "dimension"),
        (dict(strides=(128, 256)), "rank"),
    ],
)
def test_maps_that_the_driver_refuses(changes: dict[str, Any], words: str) -> None:
    good: dict[str, Any] = dict(address=1 << 20, data_type=9, dims=(64, 8), strides=(128,), box=(64, 8), swizzle=3)
    TensorMap(**good)
    with pytest.raises(RefusedError, match=words):
        TensorMap(**(good | changes))


def test_an_mbarrier_completes_when_arrivals_and_bytes_are_there() -> None:
    smem = np.zeros(64, np.uint8)
    mbarriers.init(smem, 8, 2)
    assert not mbarriers.passed(smem, 8, 0)
    assert mbarriers.passed(smem, 8, 1)  # the phase before the first: what a producer waits for at first
    mbarriers.arrive(smem, 8)
    mbarriers.expect_bytes(smem, 8, 96)
    mbarriers.arrive(smem, 8)
    mbarriers.expect_bytes(smem, 8, -32)
    assert not mbarriers.passed(smem, 8, 0)
    assert "64 bytes" in str(mbarriers.Mbarrier.at(smem, 8))
    mbarriers.expect_bytes(smem, 8, -64)
    assert mbarriers.passed(smem, 8, 0)
    assert not mbarriers.passed(smem, 8, 1)
    mbarriers.expect_bytes(smem, 8, -64)  # bytes may come before they are expected
    mbarriers.arrive(smem, 8, 2)
    assert not mbarriers.passed(smem, 8, 1)
    mbarriers.expect_bytes(smem, 8, 64)
    assert mbarriers.passed(smem, 8, 1)
