"""apply: the norm-growth limiter, then W <- W - h sqrt(scale) (s / l) G and W <- W - lr wd W, in place.

Every program adds up the partial sums of its matrix itself, all in the same order. That saves a launch before this one.
"""

import triton
import triton.language as tl

from .philox import WEIGHT as WEIGHT_STREAM
from .philox import round_nearest, round_stochastic, rounding_bits, rounding_bits_by_row
from .rescale import NORM_EPS
from .step import step_numbers
from .table import (
    COLUMNS,
    FIELDS,
    FIRST_CHANNEL,
    FIRST_CHANNEL_PROGRAM,
    FIRST_TILE_PROGRAM,
    GRADIENT_COLUMN_STRIDE,
    GRADIENT_ROW_STRIDE,
    ROUNDING_OFFSET,
    ROWS,
    SEED,
    UPDATE_NORM,
    WEIGHT,
    WEIGHT_COLUMN_STRIDE,
    WEIGHT_ROW_STRIDE,
)

_GROWTH_LIMIT = tl.constexpr(1.01)
_SUMS_BLOCK = tl.constexpr(128)  # how many partial sums are added at a time; a matrix of 4096 channels has 64


def blocks(columns: int, in_16_bits: bool) -> dict[str, int]:
    """Tile sizes and warps: 8192 elements a program. Wide matrices get wide tiles. Results do not depend on the tile,
    because only elementwise work does.

    ``in_16_bits``: W and G are bfloat16 or float16, and aligned. A thread then has 64 elements, eight 16-byte loads of
    each, for which it computes addresses, sums and factor once. An element takes 14.3 instructions on sm_100, and 26
    with stochastic rounding. With 32 elements a thread it took 21 and 34, and a B200 stays memory-bound below about 26.
    Of programs of 4 warps three or four fit a multiprocessor, of twice the size one or two. Of float32 or of unaligned
    rows 64 elements leave too few registers.
    """
    wide = columns > 128
    return {
        "BLOCK_ROWS": 16 if wide else 64,
        "BLOCK_COLUMNS": 512 if wide else 128,
        "num_warps": 4 if in_16_bits else 8,
    }


@triton.jit
def add_up(p_sums, first, count):
    """The sum of ``count`` partial sums, always in the same order."""
    total = tl.zeros([_SUMS_BLOCK], tl.float32)
    for start in range(0, count, _SUMS_BLOCK):
        o = start + tl.arange(0, _SUMS_BLOCK)
        total += tl.load(p_sums + first + o, mask=o < count, other=0.0)
    return tl.sum(total, 0)


@triton.jit
def add_up_three(p_sums, first, count):
    """The same for the three sums that one s per tensor needs. They lie side by side in memory."""
    total_0 = tl.zeros([_SUMS_BLOCK], tl.float32)
    total_1 = tl.zeros([_SUMS_BLOCK], tl.float32)
    total_2 = tl.zeros([_SUMS_BLOCK], tl.float32)
    for start in range(0, count, _SUMS_BLOCK):
        o = start + tl.arange(0, _SUMS_BLOCK)
        p = p_sums + (first + o) * 3
        total_0 += tl.load(p, mask=o < count, other=0.0)
        total_1 += tl.load(p + 1, mask=o < count, other=0.0)
        total_2 += tl.load(p + 2, mask=o < count, other=0.0)
    return tl.sum(total_0, 0), tl.sum(total_1, 0), tl.sum(total_2, 0)


@triton.jit
def norm_and_factor(
    p_row, p_sums, channels, scale_before_limiter, PER_CHANNEL: tl.constexpr, BLOCK_CHANNELS: tl.constexpr
):
    """u of a matrix, and its s; 1 in place of s if each channel has its own."""
    first_sum = tl.load(p_row + FIRST_CHANNEL_PROGRAM)
    count = tl.maximum((channels + BLOCK_CHANNELS - 1) // BLOCK_CHANNELS, 1)
    if PER_CHANNEL:
        return tl.sqrt(add_up(p_sums, first_sum, count)) * scale_before_limiter, 1.0
    else:
        squared_N, squared_R, squared_G = add_up_three(p_sums, first_sum, count)
        s = tl.sqrt(squared_N) / (tl.sqrt(squared_R) + NORM_EPS)
        return s * scale_before_limiter * tl.sqrt(squared_G), s


@triton.jit
def limited(factor, u, p_row, p_previous, p_skipped, matrix, block, USE_LIMITER: tl.constexpr):
    """``factor`` / l, with l = max(u / (u_prev + 1e-8), 1.01) / 1.01 (Fira, arXiv 2410.01623, equation 6).

    The first program of a matrix writes u_prev. If u is not finite, the weight must not change; the first program then
    counts the matrix as skipped.
    """
    moves = tl.abs(u) < float("inf")
    if USE_LIMITER:
        previous = tl.load(p_previous + matrix)
        growth = tl.maximum(u / (previous + NORM_EPS), _GROWTH_LIMIT) / _GROWTH_LIMIT
        limiter = tl.where(previous > 0, growth, 1.0)
        factor = factor / limiter
        if block == 0:
            norm = tl.where(moves & (u > 0), u / limiter, previous)
            tl.store(tl.load(p_row + UPDATE_NORM).to(tl.pointer_type(tl.float32)), norm)
    if block == 0:
        tl.store(p_skipped + matrix, tl.load(p_skipped + matrix) + tl.where(moves, 0, 1))
    return factor


@triton.jit
def tile_factor(
    p_row, p_factors, p_sums, p_root_scales, p_previous, p_skipped, p_gradient_scale,
    matrix, block, row, column, rows, columns, h,
    KEEPS_ROWS: tl.constexpr, PER_CHANNEL: tl.constexpr, USE_LIMITER: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
):  # fmt: skip
    """The factor of a tile of G, which includes scale, limiter and step size, of the shape of ``row``, of ``column`` or
    a scalar; and u. ``row`` and ``column`` are the places of the tile's elements, in shapes that broadcast to it.

    ``p_root_scales`` has two numbers of each matrix, which multiply s before the limiter and after it: sqrt(scale) and
    1, or 1 and sqrt(scale).
    """
    p_root_scales += 2 * matrix
    scale_before_limiter, scale_after_limiter = tl.load(p_root_scales), tl.load(p_root_scales + 1)
    u, s = norm_and_factor(
        p_row, p_sums, rows if KEEPS_ROWS else columns, scale_before_limiter, PER_CHANNEL, BLOCK_CHANNELS
    )
    if PER_CHANNEL:
        p_s = p_factors + tl.load(p_row + FIRST_CHANNEL)
        if KEEPS_ROWS:
            s = tl.load(p_s + row, mask=row < rows, other=0.0)
        else:
            s = tl.load(p_s + column, mask=column < columns, other=0.0)
    factor = limited(s * scale_before_limiter, u, p_row, p_previous, p_skipped, matrix, block, USE_LIMITER)
    factor = factor * (h * scale_after_limiter)
    if p_gradient_scale is not None:
        factor = factor * tl.load(p_gradient_scale)
    return factor, u


@triton.jit
def store_weight(
    p_W, W, mask, u, p_row, t, first_row, first_column, rows, columns,
    KEEPS_ROWS: tl.constexpr, BY_EIGHTS: tl.constexpr, STOCHASTIC: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """Store the tile W, float32, rounded to the dtype of ``p_W``. If u is not finite nothing is stored. BY_EIGHTS: the
    row length is a multiple of 8, so that 8 neighbours share a call for random bits."""
    # Compared as a block: Triton's interpreter loses the type of a scalar comparison that is broadcast to a block.
    mask = mask & (tl.broadcast_to(tl.abs(u), [BLOCK_ROWS, BLOCK_COLUMNS]) < float("inf"))
    if STOCHASTIC:
        seed = tl.load(p_row + SEED)
        first = (
            tl.load(p_row + ROUNDING_OFFSET) * (columns if KEEPS_ROWS else rows) + first_row * columns + first_column
        )
        if BY_EIGHTS:
            bits = rounding_bits_by_row(seed, t, first, columns, BLOCK_ROWS, BLOCK_COLUMNS, WEIGHT_STREAM)
        else:
            in_tile = tl.arange(0, BLOCK_ROWS).to(tl.int64)[:, None] * columns + tl.arange(0, BLOCK_COLUMNS)[None, :]
            bits = rounding_bits(seed, t, first + in_tile, WEIGHT_STREAM)
        tl.store(p_W, round_stochastic(W, bits), mask=mask)
    else:
        tl.store(p_W, round_nearest(W, p_W.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["step"])
def apply_kernel(
    p_table, p_gradients, p_programs, p_factors, p_sums, p_root_scales, p_previous, p_skipped, p_gradient_scale,
    step, step_size, decay, p_step,
    WEIGHT_DTYPE: tl.constexpr, GRADIENT: tl.constexpr, KEEPS_ROWS: tl.constexpr, PER_CHANNEL: tl.constexpr,
    ALIGNED: tl.constexpr, USE_LIMITER: tl.constexpr, STOCHASTIC: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """One tile of W: the limiter, then the update.

    ``p_root_scales`` is float32 ``[matrices, 2]`` (``tile_factor``). A matrix whose u is not finite does not change. An
    empty shard of a matrix has one program, for its u_prev. Reads G and W and writes W: 6 bytes an element in bfloat16.
    """
    program = tl.program_id(0)
    matrix = tl.load(p_programs + program)
    p_row = p_table + matrix.to(tl.int64) * FIELDS
    rows, columns = tl.load(p_row + ROWS), tl.load(p_row + COLUMNS)
    W_row_stride, G_row_stride = tl.load(p_row + WEIGHT_ROW_STRIDE), tl.load(p_row + GRADIENT_ROW_STRIDE)
    p_W = tl.load(p_row + WEIGHT).to(tl.pointer_type(WEIGHT_DTYPE))
    p_G = tl.load(p_gradients + matrix).to(tl.pointer_type(GRADIENT))
    if ALIGNED:
        p_W, p_G, columns = tl.multiple_of(p_W, 16), tl.multiple_of(p_G, 16), tl.multiple_of(columns, 8)
        W_row_stride, G_row_stride = tl.multiple_of(W_row_stride, 8), tl.multiple_of(G_row_stride, 8)
        W_column_stride = 1
        G_column_stride = 1
    else:
        W_column_stride = tl.load(p_row + WEIGHT_COLUMN_STRIDE)
        G_column_stride = tl.load(p_row + GRADIENT_COLUMN_STRIDE)

    # In 32 bits, because a 64-bit division takes about 70 instructions.
    block = (program - tl.load(p_row + FIRST_TILE_PROGRAM)).to(tl.int32)
    tiles_in_row = tl.maximum((columns + BLOCK_COLUMNS - 1) // BLOCK_COLUMNS, 1).to(tl.int32)
    tile_row = block // tiles_in_row
    first_row = tile_row.to(tl.int64) * BLOCK_ROWS
    first_column = (block - tile_row * tiles_in_row).to(tl.int64) * BLOCK_COLUMNS
    o_row = first_row + tl.arange(0, BLOCK_ROWS).to(tl.int64)
    o_column = first_column + tl.arange(0, BLOCK_COLUMNS)
    mask = (o_row < rows)[:, None] & (o_column < columns)[None, :]
    p_W += o_row[:, None] * W_row_stride + o_column[None, :] * W_column_stride
    p_G += o_row[:, None] * G_row_stride + o_column[None, :] * G_column_stride
    # The loads are issued before the sums are added up, which then takes no extra time.
    G = tl.load(p_G, mask=mask, other=0.0).to(tl.float32)
    W = tl.load(p_W, mask=mask, other=0.0).to(tl.float32)

    t, h, decay = step_numbers(step, step_size, decay, p_step)
    factor, u = tile_factor(
        p_row, p_factors, p_sums, p_root_scales, p_previous, p_skipped, p_gradient_scale, matrix, block,
        o_row[:, None], o_column[None, :], rows, columns, h,
        KEEPS_ROWS, PER_CHANNEL, USE_LIMITER, BLOCK_CHANNELS,
    )  # fmt: skip
    W -= factor * G
    # Not W * (1 - decay): rounding 1 - decay errs the same way at every step.
    W -= decay * W
    store_weight(
        p_W, W, mask, u, p_row, t, first_row, first_column, rows, columns,
        KEEPS_ROWS, ALIGNED, STOCHASTIC, BLOCK_ROWS, BLOCK_COLUMNS,
    )  # fmt: skip
