"""States in 8 bits a number and parameters in 24, as `multi_tensor_step` reads and writes them.

BLOCK numbers, one after the other in memory, share a scale s, the largest of them: a float32 number that moves with
them exactly. A state of either sign is an int8 code q, x = s·q/(254 − |q|), finer towards 0; one that is never negative
a uint8 code, v = s·(q/255)². `tribp/optim/codes.py` says the same in torch.

Gonzalez Ortiz et al., "FlashOptim: Optimizers for Memory Efficient Training", 2026, from which both curves are. Other
than there, a code is rounded up or down at random, right on average: to nearest, an average whose step is less than
half a code, as every √v with β₂ = 0.999, would never fall. And no v > 0 becomes 0, beside an m that may not. Divisions
and roots are the fast ones: beside a code's step, their last place is nothing. But it may lift the largest number of a
block over the last code, where the next integer is 0 or of the other sign: hence the bounds.
"""

import triton
import triton.language as tl

from .common import reciprocal

SMALLEST = tl.constexpr(2.0**-110)  # scale, of which 255² times the reciprocal is finite
BLOCK = tl.constexpr(32)


@triton.constexpr_function
def is_code(dtype):
    return dtype == tl.int8 or dtype == tl.uint8


@triton.jit
def decode(q, scale, TYPE: tl.constexpr, PTX: tl.constexpr):
    """Codes, a block a row, and their scales: numbers in float32."""
    q = q.to(tl.float32)
    if TYPE == tl.int8:
        x = scale * (q * reciprocal(254.0 - tl.abs(q), PTX))
    else:
        x = (scale * (1.0 / 65025.0)) * (q * q)
    return x


@triton.jit
def encode(x, inside, random, TYPE: tl.constexpr, PTX: tl.constexpr):
    """The codes of numbers, a block a row, and the scales. random: 15 bits each. A block that holds NaN or
    a number from 1e36 on becomes NaN."""
    positive = x > 0.0  # float32 may make 0 of it
    x = x.to(tl.float32)
    # As integers the bits of |x| have its order, and those of NaN are largest.
    bits = tl.where(inside, x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 0)
    largest = tl.max(bits, 1, keep_dims=True).to(tl.float32, bitcast=True)
    scale = tl.where(largest < 1e36, tl.maximum(largest, SMALLEST), float("nan"))
    if TYPE == tl.int8:
        part = x * (254.0 / scale)
        q = tl.clamp(part * reciprocal(1.0 + tl.abs(part) * (1.0 / 254.0), PTX), -127.0, 127.0)
        q = round_at_random(q, 128, random) - 128
    else:
        q = tl.sqrt(x * (65025.0 / scale))
        q = round_at_random(tl.where(positive, tl.clamp(q, 1.0, 255.0), 0.0), 0, random)
    return q.to(TYPE), scale


@triton.jit
def round_at_random(x, OFFSET: tl.constexpr, random):
    """⌊x + OFFSET + random/2¹⁵⌋, which lies in [0, 255], in the last 8 bits of an integer.

    From 256 to 512 the last 15 bits of a float32 number are its fraction. Counted: two instructions; rounding and
    conversion are two of a unit that has a quarter of the others' width.
    """
    BITS: tl.constexpr = 0x43800000 + (OFFSET << 15)  # of 256 + OFFSET
    dither = ((random & 0x7FFF) | BITS).to(tl.float32, bitcast=True)
    return (x + dither).to(tl.int32, bitcast=True) >> 15


@triton.jit
def random_keys(seed, step, stream):
    """What two rows of `random_bits` of one tensor in one step begin with."""
    first, second, _, _ = tl.philox(seed, step.to(tl.uint32), stream.to(tl.uint32), 0, 0)
    return first, second


@triton.jit
def random_bits(i, key):
    """32 random bits for element i: Wellons' "lowbias32" of its number and the key.

    Counted: 12 instructions; Philox takes 100, and what they decide is a last place.
    """
    x = (i.to(tl.uint32) ^ key) + (i >> 32).to(tl.uint32) * 0x9E3779B9
    x = (x ^ (x >> 16)) * 0x7FEB352D
    x = (x ^ (x >> 15)) * 0x846CA68B
    return x ^ (x >> 16)


@triton.jit
def join(p, residual):
    """bfloat16 parameters and the 8 bits below them: float32.

    Of a parameter that somebody has set: 0 becomes no negative number, and an infinity stays one.
    """
    high = p.to(tl.uint16, bitcast=True).to(tl.int32)
    low = residual.to(tl.int32)
    low = tl.where(high & 0x7FFF == 0, tl.maximum(low, 0), low)
    low = tl.where(high & 0x7F80 == 0x7F80, 0, low)
    return ((high << 16) + (low << 8)).to(tl.float32, bitcast=True)


@triton.jit
def split(x, dither):
    """float32 → the nearest bfloat16 and the 8 bits below it; `dither`, in [0, 255], is added to the bits cut off."""
    bits = (x.to(tl.float32).to(tl.uint32, bitcast=True) + dither) >> 8
    bits = tl.where(x == x, bits, 0x7FC000)
    high = (bits + 128) >> 8
    low = bits.to(tl.int32) - (high.to(tl.int32) << 8)
    return high.to(tl.uint16).to(tl.bfloat16, bitcast=True), low.to(tl.int8)
