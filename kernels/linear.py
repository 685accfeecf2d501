"""A linear layer with an int8 weight, forward and input gradient: tiles of W are dequantised in registers.

    y = x W^T + bias        dx = dy W        W[o, i] = (q - zero) * scale, a scale and a zero point per group

The weight gradient is dy^T x, a float product like any other, and PyTorch's.
"""

import triton
import triton.language as tl

from .philox import round_nearest
from .table import INTERPRETED, power_of_two

_TILES_AT_ONCE = tl.constexpr(8)  # row tiles that run side by side, so that a tile of W is read from the cache


def blocks(rows: int, columns: int, group_size: int, itemsize: int, forward: bool) -> dict[str, int | bool]:
    """Tile sizes for activations of so many rows and a weight of so many columns.

    BY_ROW: the part of a weight's row that is in a tile lies in one group, so that a scale is loaded once a row.
    """
    inner = 128 // itemsize  # along the sum: 128 bytes of x
    # Float32 products are made without tensor cores, whose operands fill the registers at a smaller tile.
    across = 64 if itemsize == 4 or (group_size % 128 and not forward) else 128
    in_tile = inner if forward else across
    tile_rows = min(64 if itemsize == 4 else 128, max(16, power_of_two(rows)))
    by_row = columns % group_size == 0 and group_size % in_tile == 0
    return {
        "BY_ROW": by_row,
        "BLOCK_ROWS": tile_rows,
        "BLOCK_ACROSS": across,
        "BLOCK_INNER": inner,
        "num_warps": 8 if tile_rows == 128 or itemsize == 4 else 4,
        # Three of a scale an element take 147 KB of shared memory, where most GPUs have 99.
        "num_stages": 3 if by_row else 1,
    }


@triton.jit
def weight_tile(
    p_q, p_scale, p_zero, first_inner, first_across, outputs, columns,
    FORWARD: tl.constexpr, GROUP: tl.constexpr, BY_ROW: tl.constexpr,
    BLOCK_INNER: tl.constexpr, BLOCK_ACROSS: tl.constexpr,
):  # fmt: skip
    """Float32 W^T (FORWARD) or W: ``[inner, across]``, 0 beyond its ends."""
    o_inner = (first_inner + tl.arange(0, BLOCK_INNER))[:, None]
    o_across = (first_across + tl.arange(0, BLOCK_ACROSS))[None, :]
    if FORWARD:
        o_out, o_in, first_in = o_across.to(tl.int64), o_inner, first_inner
    else:
        o_out, o_in, first_in = o_inner.to(tl.int64), o_across, first_across
    mask = (o_out < outputs) & (o_in < columns)
    index = o_out * columns + o_in
    q = tl.load(p_q + index, mask=mask, other=0)
    if BY_ROW:
        group, mask = (o_out * columns + first_in) // GROUP, o_out < outputs
    else:
        group = index // GROUP
    scale = tl.load(p_scale + group, mask=mask, other=0.0)
    zero = tl.load(p_zero + group, mask=mask, other=0)
    return (q.to(tl.float32) - zero.to(tl.float32)) * scale


@triton.jit
def linear_kernel(
    p_x, p_q, p_scale, p_zero, p_bias, p_y, rows, outputs, columns,
    FORWARD: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr, BY_ROW: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_ACROSS: tl.constexpr, BLOCK_INNER: tl.constexpr,
):  # fmt: skip
    """One tile of y ``[rows, outputs]`` from x ``[rows, columns]`` (FORWARD), or of dx from dy the other way round.

    Sums in float32 and rounds once, bias included. In half precision W is rounded to it for the tensor cores.
    """
    inner, across = (columns, outputs) if FORWARD else (outputs, columns)
    tiles_down, tiles_across = tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(across, BLOCK_ACROSS)
    program = tl.program_id(0)
    first_tile = program // (_TILES_AT_ONCE * tiles_across) * _TILES_AT_ONCE
    side_by_side = tl.minimum(tiles_down - first_tile, _TILES_AT_ONCE)
    in_band = program % (_TILES_AT_ONCE * tiles_across)
    o_row = (first_tile + in_band % side_by_side) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
    o_row = o_row.to(tl.int64)
    first_across = in_band // side_by_side * BLOCK_ACROSS
    o_across = first_across + tl.arange(0, BLOCK_ACROSS)

    total = tl.zeros([BLOCK_ROWS, BLOCK_ACROSS], tl.float32)
    for start in range(0, inner, BLOCK_INNER):
        o_inner = start + tl.arange(0, BLOCK_INNER)
        m_x = (o_row < rows)[:, None] & (o_inner < inner)[None, :]
        x = tl.load(p_x + o_row[:, None] * inner + o_inner[None, :], mask=m_x, other=0.0)
        W = weight_tile(
            p_q, p_scale, p_zero, start, first_across, outputs, columns,
            FORWARD, GROUP, BY_ROW, BLOCK_INNER, BLOCK_ACROSS,
        )  # fmt: skip
        W = round_nearest(W, x.dtype)
        if INTERPRETED:
            total = tl.dot(x.to(tl.float32), W.to(tl.float32), total)
        else:
            total = tl.dot(x, W, total, input_precision=PRECISION)
    if p_bias is not None:
        total += tl.load(p_bias + o_across, mask=o_across < across, other=0.0).to(tl.float32)[None, :]
    m_y = (o_row < rows)[:, None] & (o_across < across)[None, :]
    tl.store(p_y + o_row[:, None] * across + o_across[None, :], round_nearest(total, p_y.dtype.element_ty), mask=m_y)
