"""apply for int8 weights: dequantise, limit, update, and store with new scales and zero points, in one launch.

w = (q - zero) * scale, with a scale (float32) and a zero point (uint8) per group of the row-major flattened weight
"""

import triton
import triton.language as tl

from .apply import tile_factor
from .philox import WEIGHT as WEIGHT_STREAM
from .philox import rounding_bits, rounding_bits_by_row
from .step import step_numbers
from .table import (
    COLUMNS,
    FIELDS,
    FIRST_TILE_PROGRAM,
    GRADIENT_COLUMN_STRIDE,
    GRADIENT_ROW_STRIDE,
    ROWS,
    SCALE,
    SEED,
    WEIGHT,
    ZERO,
    power_of_two,
)

_LEAST_RANGE = tl.constexpr(1e-5)


def blocks(group_size: int) -> dict[str, int]:
    """8192 elements a program, in whole groups. Each group is padded to a power of two."""
    group = power_of_two(group_size)
    return {"BLOCK_GROUPS": max(1, 8192 // group), "BLOCK_GROUP": group, "num_warps": 8}


@triton.jit
def fresh_grid(W, mask):
    """Scale and zero point of each group, a row of ``W`` where ``mask`` is true. The group's range, extended to include
    0, is 255 steps (as in ``quantized`` of int8/weight.py)."""
    low = tl.min(tl.where(mask, W, 0.0), 1)
    high = tl.max(tl.where(mask, W, 0.0), 1)
    low, high = tl.minimum(low, 0.0), tl.maximum(high, 0.0)
    span = high - low
    scale = tl.div_rn(tl.maximum(span, _LEAST_RANGE), 255.0)
    scale = tl.where(span < float("inf"), scale, tl.div_rn(high, 255.0) - tl.div_rn(low, 255.0))
    # Adding and subtracting 1.5 * 2**23 rounds to the nearest integer, ties to even.
    steps = tl.div_rn(low, scale)
    zero = -((steps + 12582912.0) - 12582912.0)
    return scale, tl.minimum(tl.maximum(zero, 0.0), 255.0)


@triton.jit
def store_groups(
    W, before, bits, u, p_q, p_scale, p_zero, index, mask, o_group, m_group, BLOCK_GROUPS: tl.constexpr
):  # fmt: skip
    """Store groups, the rows of ``W`` (float32), with new scales and zero points. Rounded stochastically by ``bits``,
    or to the nearest if ``bits`` is None. Groups that are equal to ``before`` keep their bits, and all do if u is not
    finite."""
    scale, zero = fresh_grid(W, mask)
    steps = tl.div_rn(W, scale[:, None])
    if bits is None:
        steps = (steps + 12582912.0) - 12582912.0
    else:
        down = tl.floor(steps)
        steps = down + tl.where(steps - down > bits.to(tl.float32) * 0.0000152587890625, 1.0, 0.0)
    steps = tl.minimum(tl.maximum(steps + zero[:, None], 0.0), 255.0)
    differs = tl.max(tl.where(mask & (W != before), 1, 0), 1)
    # Compared as a block: Triton's interpreter loses the type of a scalar comparison that is broadcast to a block.
    m_group = m_group & (differs > 0) & (tl.broadcast_to(tl.abs(u), [BLOCK_GROUPS]) < float("inf"))
    tl.store(p_q + index, steps.to(tl.uint8), mask=mask & m_group[:, None])
    tl.store(p_scale + o_group, scale, mask=m_group)
    tl.store(p_zero + o_group, zero.to(tl.uint8), mask=m_group)


@triton.jit(do_not_specialize=["step"])
def apply_int8_kernel(
    p_table, p_gradients, p_programs, p_factors, p_sums, p_previous, p_skipped, p_gradient_scale,
    step, step_size, decay, p_step, scale_before_limiter, scale_after_limiter,
    GRADIENT: tl.constexpr, KEEPS_ROWS: tl.constexpr, PER_CHANNEL: tl.constexpr, ALIGNED: tl.constexpr,
    USE_LIMITER: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_GROUPS: tl.constexpr, BLOCK_GROUP: tl.constexpr,
):  # fmt: skip
    """One program updates some groups of W. The two scales are as in ``apply_kernel``.

    ALIGNED: rows of G are contiguous, start at multiples of 16 bytes and hold whole groups, and the group size is a
    power of two. A group that the update does not change in float32 keeps its bits, because repeated rounding would
    make it drift. Reads G and q and writes q: 4 bytes an element with bfloat16 gradients, and 10 a group for scales and
    zero points.
    """
    program = tl.program_id(0)
    matrix = tl.load(p_programs + program)
    p_row = p_table + matrix.to(tl.int64) * FIELDS
    rows, columns = tl.load(p_row + ROWS), tl.load(p_row + COLUMNS)
    G_row_stride = tl.load(p_row + GRADIENT_ROW_STRIDE)
    p_G = tl.load(p_gradients + matrix).to(tl.pointer_type(GRADIENT))
    p_q = tl.load(p_row + WEIGHT).to(tl.pointer_type(tl.uint8))
    p_scale = tl.load(p_row + SCALE).to(tl.pointer_type(tl.float32))
    p_zero = tl.load(p_row + ZERO).to(tl.pointer_type(tl.uint8))

    block = program - tl.load(p_row + FIRST_TILE_PROGRAM)
    first_group = block.to(tl.int64) * BLOCK_GROUPS
    o_group = first_group + tl.arange(0, BLOCK_GROUPS)
    o_inside = tl.arange(0, BLOCK_GROUP)
    m_group = o_group < rows * columns // GROUP
    mask = m_group[:, None] & (o_inside < GROUP)[None, :]
    index = o_group[:, None] * GROUP + o_inside[None, :]
    if ALIGNED:
        p_G, p_q, G_row_stride = tl.multiple_of(p_G, 16), tl.multiple_of(p_q, 16), tl.multiple_of(G_row_stride, 8)
        row = (o_group * GROUP // columns)[:, None]
        first_column = tl.multiple_of(o_group * GROUP - row.reshape(BLOCK_GROUPS) * columns, 8)
        column = first_column[:, None] + o_inside[None, :]
        G = tl.load(p_G + row * G_row_stride + column, mask=mask, other=0.0).to(tl.float32)
    else:
        row = index // columns
        column = index - row * columns
        G_column_stride = tl.load(p_row + GRADIENT_COLUMN_STRIDE)
        G = tl.load(p_G + row * G_row_stride + column * G_column_stride, mask=mask, other=0.0).to(tl.float32)
    q = tl.load(p_q + index, mask=mask, other=0).to(tl.float32)
    old_scale = tl.load(p_scale + o_group, mask=m_group, other=1.0)
    old_zero = tl.load(p_zero + o_group, mask=m_group, other=0)
    before = (q - old_zero.to(tl.float32)[:, None]) * old_scale[:, None]

    t, h, decay = step_numbers(step, step_size, decay, p_step)
    factor, u = tile_factor(
        p_row, p_factors, p_sums, p_previous, p_skipped, p_gradient_scale, matrix, block, row, column, rows, columns,
        h, scale_before_limiter, scale_after_limiter, KEEPS_ROWS, PER_CHANNEL, USE_LIMITER, BLOCK_CHANNELS,
    )  # fmt: skip
    W = before - factor * G
    # Not W * (1 - decay): rounding 1 - decay errs the same way at every step.
    W -= decay * W

    bits = None
    if STOCHASTIC:
        seed = tl.load(p_row + SEED)
        if ALIGNED:
            bits = rounding_bits_by_row(seed, t, first_group * GROUP, GROUP, BLOCK_GROUPS, BLOCK_GROUP, WEIGHT_STREAM)
        else:
            bits = rounding_bits(seed, t, index, WEIGHT_STREAM)
    store_groups(W, before, bits, u, p_q, p_scale, p_zero, index, mask, o_group, m_group, BLOCK_GROUPS)
