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
    ROUNDING_OFFSET,
    ROWS,
    SCALE,
    SEED,
    WEIGHT,
    ZERO,
    power_of_two,
)

# As in int8/weight.py, which explains the arithmetic. A test compares the bits of the two.
_LEAST_RANGE = tl.constexpr(1e-5)
_WHOLE = tl.constexpr(1.5 * 2.0**23)
_NOISE_UNIT = tl.constexpr(2.0**-16)


def blocks(group_size: int) -> dict[str, int]:
    """8192 elements a program, in whole groups. Each group is padded to a power of two."""
    group = power_of_two(group_size)
    return {"BLOCK_GROUPS": max(1, 8192 // group), "BLOCK_GROUP": group, "num_warps": 8}


@triton.jit
def fresh_grid(W):
    """The grid of each group, a row of ``W``: its scale, the reciprocal, and its zero point plus ``_WHOLE``."""
    low = tl.minimum(tl.min(W, 1), 0.0)
    high = tl.maximum(tl.max(W, 1), 0.0)
    scale = tl.div_rn(tl.maximum(high * 0.5 - low * 0.5, _LEAST_RANGE * 0.5), 127.5)
    inverse = tl.div_rn(1.0, scale)
    return scale, inverse, tl.minimum(-low * inverse, 255.0) + _WHOLE


@triton.jit
def low_byte(values):
    """The integers 0 to 255, uint8, that float32 ``values`` are above ``_WHOLE``."""
    return values.to(tl.int32, bitcast=True).to(tl.uint8)


@triton.jit
def load_groups(p_q, p_scale, p_zero, index, mask, o_group, m_group):
    """The float32 values of groups, one in a row."""
    q = tl.load(p_q + index, mask=mask, other=0).to(tl.float32)
    scale = tl.load(p_scale + o_group, mask=m_group, other=1.0)
    zero = tl.load(p_zero + o_group, mask=m_group, other=0)
    return (q - zero.to(tl.float32)[:, None]) * scale[:, None]


@triton.jit
def store_groups(
    W, before, bits, u, p_q, p_scale, p_zero, index, mask, o_group, m_group, BLOCK_GROUPS: tl.constexpr
):  # fmt: skip
    """Store groups, the rows of ``W`` (float32), with new scales and zero points. Rounded stochastically by ``bits``,
    or to the nearest if ``bits`` is None. Groups of which no bit differs from ``before`` are left as they are, and all
    are if u is not finite.

    Where a group is smaller than its row, W and ``before`` are 0 in the rest, which does not change the grid. For each
    element there is a product with a reciprocal, because a division takes 15 instructions.
    """
    # Not W - before, which a compiler may take together with the product that made it, and which is then not 0.
    flipped = W.to(tl.uint32, bitcast=True) ^ before.to(tl.uint32, bitcast=True)
    differs = tl.max(flipped, 1) > 0
    scale, inverse, zero = fresh_grid(W)
    offset = (zero - _WHOLE)[:, None]
    steps = tl.clamp(W * inverse[:, None], -offset, 255.0 - offset)
    if bits is not None:  # as signed numbers, odd ones
        steps += (bits | 1).to(tl.int16).to(tl.float32) * _NOISE_UNIT
    steps += zero[:, None]
    # Compared as a block: Triton's interpreter loses the type of a scalar comparison that is broadcast to a block.
    m_group = m_group & differs & (tl.broadcast_to(tl.abs(u), [BLOCK_GROUPS]) < float("inf"))
    tl.store(p_q + index, low_byte(steps), mask=mask & m_group[:, None])
    tl.store(p_scale + o_group, scale, mask=m_group)
    tl.store(p_zero + o_group, low_byte(zero), mask=m_group)


@triton.jit(do_not_specialize=["step"])
def apply_int8_kernel(
    p_table, p_gradients, p_programs, p_factors, p_sums, p_root_scales, p_previous, p_skipped, p_gradient_scale,
    step, step_size, decay, p_step,
    GRADIENT: tl.constexpr, KEEPS_ROWS: tl.constexpr, PER_CHANNEL: tl.constexpr, ALIGNED: tl.constexpr,
    USE_LIMITER: tl.constexpr, STOCHASTIC: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_GROUPS: tl.constexpr, BLOCK_GROUP: tl.constexpr,
):  # fmt: skip
    """One program updates some groups of W. ``p_root_scales`` is as in ``apply_kernel``.

    ALIGNED: rows of G are contiguous, start at multiples of 16 bytes and hold whole groups, and the group size is a
    power of two and at least 8. A group that the update does not change in float32 keeps its bits, because repeated
    rounding would make it drift. Reads G and q and writes q: 4 bytes an element with bfloat16 gradients, and 10 a group
    for scales and zero points.
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
    o_inside = tl.arange(0, BLOCK_GROUP)[None, :]
    m_group = o_group < rows * columns // GROUP
    index = o_group[:, None] * GROUP + o_inside
    mask = m_group[:, None] if GROUP == BLOCK_GROUP else m_group[:, None] & (o_inside < GROUP)
    if ALIGNED:
        p_G, p_q, G_row_stride = tl.multiple_of(p_G, 16), tl.multiple_of(p_q, 16), tl.multiple_of(G_row_stride, 8)
        # In 32 bits, because a 64-bit division takes about 70 instructions.
        groups_in_row = (columns // GROUP).to(tl.int32)
        in_matrix = o_group.to(tl.int32)
        row = (in_matrix // groups_in_row)[:, None]
        column = (in_matrix % groups_in_row)[:, None] * GROUP + o_inside
        G = tl.load(p_G + row.to(tl.int64) * G_row_stride + column, mask=mask, other=0.0).to(tl.float32)
    else:
        row = index // columns
        column = index - row * columns
        G_column_stride = tl.load(p_row + GRADIENT_COLUMN_STRIDE)
        G = tl.load(p_G + row * G_row_stride + column * G_column_stride, mask=mask, other=0.0).to(tl.float32)
    before = load_groups(p_q, p_scale, p_zero, index, mask, o_group, m_group)

    t, h, decay = step_numbers(step, step_size, decay, p_step)
    factor, u = tile_factor(
        p_row, p_factors, p_sums, p_root_scales, p_previous, p_skipped, p_gradient_scale,
        matrix, block, row, column, rows, columns, h,
        KEEPS_ROWS, PER_CHANNEL, USE_LIMITER, BLOCK_CHANNELS,
    )  # fmt: skip
    W = before - factor * G
    # Not W * (1 - decay): rounding 1 - decay errs the same way at every step.
    W -= decay * W

    bits = None
    if STOCHASTIC:
        seed = tl.load(p_row + SEED)
        first = tl.load(p_row + ROUNDING_OFFSET) * (columns if KEEPS_ROWS else rows)
        if ALIGNED:
            bits = rounding_bits_by_row(
                seed, t, first + first_group * GROUP, GROUP, BLOCK_GROUPS, BLOCK_GROUP, WEIGHT_STREAM
            )
        else:
            bits = rounding_bits(seed, t, first + index, WEIGHT_STREAM)
    if GROUP < BLOCK_GROUP:
        W, before = tl.where(mask, W, 0.0), tl.where(mask, before, 0.0)
    store_groups(W, before, bits, u, p_q, p_scale, p_zero, index, mask, o_group, m_group, BLOCK_GROUPS)
