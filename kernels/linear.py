"""A linear layer with int8 weights: its forward, and the gradient of its input. W is dequantised tile by tile.

    y = x W^T + bias        dx = dy W        w = (q - zero) * scale, one scale and zero per group of the flattened W

A tile of W is float only in registers and shared memory. From memory only q is read, one byte a weight. W is rounded to
the dtype of the activations, and sums are float32. y is rounded once, after the bias is added.
"""

import math

import triton
import triton.language as tl

from .philox import round_nearest
from .projected import dot
from .table import power_of_two

# How many blocks of rows take turns at the same block of W. An H100 runs 264 programs at a time. With tiles of 128 x
# 128 and 11008 outputs they then read 8 blocks of x and 33 of W. Row by row they would read 4 of x and all 86 of W.
_ROW_BLOCKS_TOGETHER = tl.constexpr(8)


def blocks(rows: int, tensor_cores: bool) -> dict[str, int]:
    """Tile sizes and warps for ``rows`` rows of activations, which are padded to at least one tile.

    BLOCK_KEPT is along the side of W that the result keeps, BLOCK_SUMMED along the side that is summed over.
    """
    block_rows = max(16, power_of_two(rows))
    if not tensor_cores:
        # At most 32 rows: with 64, triton 3.7 on sm_100 makes TF32 products of an operand that was converted from 8 or
        # 16 bits, even with input_precision="ieee".
        block_rows = min(block_rows, 32)
        return {"BLOCK_ROWS": block_rows, "BLOCK_KEPT": 128, "BLOCK_SUMMED": 16, "num_warps": 4, "num_stages": 2}
    if rows <= 32:  # smaller tiles give more programs that read W
        return {"BLOCK_ROWS": block_rows, "BLOCK_KEPT": 64, "BLOCK_SUMMED": 64, "num_warps": 4, "num_stages": 3}
    # With BLOCK_SUMMED 64 a thread takes 134 registers on sm_90, and one program runs at a time. With 32 it takes 128,
    # and two programs run: one multiplies while the other dequantises. On sm_80 and gfx942, 64 spills.
    return {
        "BLOCK_ROWS": min(block_rows, 128),
        "BLOCK_KEPT": 128,
        "BLOCK_SUMMED": 32,
        "num_warps": 8 if rows > 64 else 4,
        "num_stages": 3,
    }


def run_length(group_size: int, columns: int, block: int) -> int:
    """The number of columns for which the tile of W may load one scale. A run of so many columns that starts at a
    multiple of it lies in one group, in every row. It is a power of two and at most ``block``: 128 for groups of 128, 4
    for groups of 12."""
    if group_size % columns == 0:
        return block  # a row lies in one group, and columns beyond its end do not count
    return math.gcd(group_size, columns, block)


@triton.jit
def tile_place(rows, kept, BLOCK_ROWS: tl.constexpr, BLOCK_KEPT: tl.constexpr):
    """This program's first row, int64, and its first index along the kept side of W."""
    # The program's index is given as a column of row 0, because swizzle2d only combines the two into one index.
    row_block, kept_block = tl.swizzle2d(
        0, tl.program_id(0), tl.cdiv(rows, BLOCK_ROWS), tl.cdiv(kept, BLOCK_KEPT), _ROW_BLOCKS_TOGETHER
    )
    return row_block.to(tl.int64) * BLOCK_ROWS, kept_block * BLOCK_KEPT


@triton.jit
def spread(values, RUN: tl.constexpr):
    """``values [rows, runs]``, each repeated for the RUN columns of its run: ``[rows, runs * RUN]``."""
    ROWS: tl.constexpr = values.shape[0]
    RUNS: tl.constexpr = values.shape[1]
    return tl.broadcast_to(values[:, :, None], [ROWS, RUNS, RUN]).reshape(ROWS, RUNS * RUN)


@triton.jit
def weight_tile(
    p_q, p_scale, p_zero, first_row, first_column, rows, columns, DTYPE: tl.constexpr,
    GROUP: tl.constexpr, RUN: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr,
):  # fmt: skip
    """A tile of W in DTYPE, ``[BLOCK_ROWS, BLOCK_COLUMNS]``: zero beyond the last row, finite beyond the last
    column."""
    o_row = (first_row + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    o_column = first_column + tl.arange(0, BLOCK_COLUMNS)
    o_run = first_column + tl.arange(0, BLOCK_COLUMNS // RUN) * RUN
    m_row = (o_row < rows)[:, None]
    mask = m_row & (o_column < columns)[None, :]
    q = tl.load(p_q + o_row[:, None] * columns + o_column[None, :], mask=mask, other=0)
    m_run = m_row & (o_run < columns)[None, :]
    group = (o_row[:, None] * columns + o_run[None, :]) // GROUP
    scale = tl.load(p_scale + group, mask=m_run, other=0.0)
    zero = tl.load(p_zero + group, mask=m_run, other=0)
    W = (q.to(tl.float32) - spread(zero.to(tl.float32), RUN)) * spread(scale, RUN)
    return round_nearest(W, DTYPE)


@triton.jit(do_not_specialize=["rows"])
def forward_kernel(
    p_x, p_q, p_scale, p_zero, p_bias, p_y, rows, outputs, inputs,
    GROUP: tl.constexpr, RUN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEPT: tl.constexpr, BLOCK_SUMMED: tl.constexpr,
):  # fmt: skip
    """y ``[rows, outputs]`` = x ``[rows, inputs]`` W^T + bias.

    Reads q once for every BLOCK_ROWS rows, and x once for every BLOCK_KEPT outputs.
    """
    first_row, first_output = tile_place(rows, outputs, BLOCK_ROWS, BLOCK_KEPT)
    o_row = first_row + tl.arange(0, BLOCK_ROWS)
    o_output = first_output + tl.arange(0, BLOCK_KEPT)
    m_row = (o_row < rows)[:, None]
    sums = tl.zeros([BLOCK_ROWS, BLOCK_KEPT], tl.float32)
    for start in range(0, inputs, BLOCK_SUMMED):
        o_input = start + tl.arange(0, BLOCK_SUMMED)
        x = tl.load(p_x + o_row[:, None] * inputs + o_input[None, :], mask=m_row & (o_input < inputs)[None, :], other=0)
        W = weight_tile(
            p_q, p_scale, p_zero, first_output, start, outputs, inputs, x.dtype, GROUP, RUN, BLOCK_KEPT, BLOCK_SUMMED
        )
        sums = dot(x, tl.trans(W), sums, PRECISION)
    if p_bias is not None:
        sums += tl.load(p_bias + o_output, mask=o_output < outputs, other=0).to(tl.float32)[None, :]
    p_y_tile = p_y + o_row[:, None] * outputs + o_output[None, :]
    tl.store(p_y_tile, round_nearest(sums, p_y.dtype.element_ty), mask=m_row & (o_output < outputs)[None, :])


@triton.jit(do_not_specialize=["rows"])
def input_gradient_kernel(
    p_gradient, p_q, p_scale, p_zero, p_result, rows, outputs, inputs,
    GROUP: tl.constexpr, RUN: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_KEPT: tl.constexpr, BLOCK_SUMMED: tl.constexpr,
):  # fmt: skip
    """dx ``[rows, inputs]`` = dy ``[rows, outputs]`` W. Reads q and dy as often as ``forward_kernel`` reads q and x."""
    first_row, first_input = tile_place(rows, inputs, BLOCK_ROWS, BLOCK_KEPT)
    o_row = first_row + tl.arange(0, BLOCK_ROWS)
    o_input = first_input + tl.arange(0, BLOCK_KEPT)
    m_row = (o_row < rows)[:, None]
    sums = tl.zeros([BLOCK_ROWS, BLOCK_KEPT], tl.float32)
    for start in range(0, outputs, BLOCK_SUMMED):
        o_output = start + tl.arange(0, BLOCK_SUMMED)
        G = tl.load(
            p_gradient + o_row[:, None] * outputs + o_output[None, :],
            mask=m_row & (o_output < outputs)[None, :],
            other=0,
        )
        W = weight_tile(
            p_q, p_scale, p_zero, start, first_input, outputs, inputs, G.dtype, GROUP, RUN, BLOCK_SUMMED, BLOCK_KEPT
        )
        sums = dot(G, W, sums, PRECISION)
    p_tile = p_result + o_row[:, None] * inputs + o_input[None, :]
    tl.store(p_tile, round_nearest(sums, p_result.dtype.element_ty), mask=m_row & (o_input < inputs)[None, :])
