"""Random words in a kernel: normals, signs and rounding bits, with the counters of ``core/philox.py``.

Everything random is a function of a key and of an entry's indices. The key is (seed, epoch) for the projection and
(seed, step) for rounding. The bits are therefore the same for every tile, device and batch.
"""

import triton
import triton.language as tl

from .table import INTERPRETED

# The third counter word of each use, as in ``Stream`` of core/philox.py. A test compares the two.
GAUSSIAN = tl.constexpr(0)
RADEMACHER = tl.constexpr(1)
WEIGHT = tl.constexpr(2)
EXP_AVG = tl.constexpr(3)
EXP_AVG_SQ = tl.constexpr(4)

_TWO_PI = tl.constexpr(6.283185307179586)
_ULP = tl.constexpr(2.0**-24)  # the spacing of the 24-bit uniforms


@triton.jit
def words(seed, key, c0, c1, stream: tl.constexpr):
    """Philox4x32-10 with the counter ``(c0, c1, stream, 0)`` and the key ``(seed, key)``: four uint32 words. c0 and c1
    broadcast."""
    seed = (seed.to(tl.int64) & 0xFFFFFFFF) | (key.to(tl.int64) << 32)
    zero = (tl.full([], 0, tl.int32) + (c0 + c1) * 0).to(
        tl.int32
    )  # of the common shape of c0 and c1, which may be scalars
    return tl.philox(seed, (zero + c0).to(tl.int32), (zero + c1).to(tl.int32), zero + stream, zero)


@triton.jit
def normals(word_radius, word_angle, dtype: tl.constexpr):
    """Two standard normals from two words (Box and Muller 1958), in ``dtype``: r cos and r sin.

    The uniforms have 24 bits, which float32 holds exactly. In float64 the results have the same bits as in PyTorch
    (core/projection.py). In float32 they are within 8e-7.
    """
    radius = tl.sqrt(-2.0 * tl.log(((word_radius >> 8) + 1).to(dtype) * _ULP))
    turn = word_angle.to(tl.int32, bitcast=True) >> 8  # signed, in 2**-24 of a turn
    if dtype == tl.float64:
        angle = turn.to(dtype) * (_TWO_PI * _ULP)
        return radius * tl.cos(angle), radius * tl.sin(angle)
    else:
        cosine, sine = cosine_and_sine(turn)
        return radius * cosine, radius * sine


@triton.jit
def cosine_and_sine(turn):
    """Cosine and sine, float32, of an angle in units of 2**-24 of a turn.

    The nearest quarter turn is subtracted exactly, and a polynomial gives the rest. tl.cos and tl.sin have a slow path
    in float64, for angles that do not occur here: an element of a rank-1 sketch would take 14 instructions instead of
    10.
    """
    quarter = (turn + 0x200000) >> 22
    x = (turn - (quarter << 22)).to(tl.float32) * (_TWO_PI * _ULP)  # -pi / 4 to pi / 4
    y = x * x
    sine = x + x * y * (-0.16666666 + y * (0.0083333310 + y * (-0.00019840874 + y * 2.7526e-06)))
    cosine = 1.0 + y * (-0.5 + y * (0.041666638 + y * (-0.0013888378 + y * 2.4760495e-05)))
    is_odd = (quarter & 1) != 0
    first, second = tl.where(is_odd, sine, cosine), tl.where(is_odd, cosine, sine)
    # In the four quarters cos is c, -s, -c, s, and sin is s, c, -s, -c.
    first = tl.where(((quarter + 1) & 2) != 0, -first, first)
    return first, tl.where((quarter & 2) != 0, -second, second)


@triton.jit
def gaussian_row(seed, epoch, rank_index, start, COUNT: tl.constexpr):
    """Entries ``start ... start + COUNT`` of one row of the unscaled projection, float32 ``[COUNT]``.

    ``start`` is a multiple of 4, because a call gives four neighbours.
    """
    calls = start // 4 + tl.arange(0, COUNT // 4)
    w0, w1, w2, w3 = words(seed, epoch, calls, rank_index, GAUSSIAN)
    n0, n1 = normals(w0, w1, tl.float32)
    n2, n3 = normals(w2, w3, tl.float32)
    return interleave4(n0, n1, n2, n3, COUNT)


@triton.jit
def interleave4(x0, x1, x2, x3, COUNT: tl.constexpr):
    """``[x0[0], x1[0], x2[0], x3[0], x0[1], ...]`` of four vectors of a quarter of COUNT."""
    return tl.join(tl.join(x0, x2), tl.join(x1, x3)).reshape(COUNT)


@triton.jit
def sign_words(seed, epoch, rank_indices, start):
    """The four words with the signs of the 128 widths that include ``start``: 32 a word, lowest bit first."""
    return words(seed, epoch, start // 128 + rank_indices * 0, rank_indices, RADEMACHER)


@triton.jit
def signs(w0, w1, w2, w3, offsets):
    """+1.0 if the bit at ``offsets`` (0 to 127) of the 128 is set, else -1.0. Words and offsets broadcast."""
    low = tl.where(offsets < 32, w0, w1)
    high = tl.where(offsets < 96, w2, w3)
    bits = tl.where(offsets < 64, low, high) >> (offsets % 32).to(tl.uint32)
    return (bits & 1).to(tl.float32) * 2.0 - 1.0


@triton.jit
def rounding_bits(seed, step, index, stream: tl.constexpr):
    """The 16 random bits of each element, as int32. ``index`` (int64) is its index in the whole parameter."""
    calls = index // 8
    w0, w1, w2, w3 = words(seed, step, calls & 0xFFFFFFFF, calls >> 32, stream)
    lane = (index % 8).to(tl.int32)
    word = tl.where(lane < 4, tl.where(lane < 2, w0, w1), tl.where(lane < 6, w2, w3))
    return ((word >> ((lane % 2) * 16).to(tl.uint32)) & 0xFFFF).to(tl.int32)


@triton.jit
def rounding_bits_by_row(
    seed, step, first, row_length, ROWS: tl.constexpr, COLUMNS: tl.constexpr, stream: tl.constexpr
):
    """``rounding_bits`` of a tile ``[ROWS, COLUMNS]`` that starts at element ``first`` of a parameter with rows of
    ``row_length``. Both are multiples of 8, so that one call gives the bits of eight neighbours."""
    o_row = tl.arange(0, ROWS).to(tl.int64) * (row_length // 8)
    calls = first // 8 + o_row[:, None] + tl.arange(0, COLUMNS // 8)[None, :]
    w0, w1, w2, w3 = words(seed, step, calls & 0xFFFFFFFF, calls >> 32, stream)
    low = tl.join(tl.join(w0 & 0xFFFF, w2 & 0xFFFF), tl.join(w1 & 0xFFFF, w3 & 0xFFFF))
    high = tl.join(tl.join(w0 >> 16, w2 >> 16), tl.join(w1 >> 16, w3 >> 16))
    return tl.join(low, high).reshape(ROWS, COLUMNS).to(tl.int32)


@triton.jit
def round_stochastic(values, bits):
    """float32 to bfloat16, up or down with probability equal to the fraction lost. inf and NaN stay what they are."""
    # A bfloat16 is the upper half of a float32: adding 16 random bits carries with the right probability.
    rounded = ((values.to(tl.int32, bitcast=True) + bits) & -65536).to(tl.float32, bitcast=True)
    return tl.where(tl.abs(values) < float("inf"), rounded, values).to(tl.bfloat16)


@triton.jit
def round_nearest(values, dtype: tl.constexpr):
    """float32 to ``dtype``, to nearest, ties to even. Triton's interpreter (3.2 to 3.7) would truncate to bfloat16."""
    if INTERPRETED and dtype == tl.bfloat16:
        raw = values.to(tl.int32, bitcast=True)
        rounded = ((raw + 0x7FFF + ((raw >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
        return tl.where(tl.abs(values) < float("inf"), rounded, values).to(tl.bfloat16)
    else:
        return values.to(dtype)
