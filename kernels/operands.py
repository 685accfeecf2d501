"""apply from a linear layer's operands X and dY: a tile of G = dY^T X is formed in registers, and updates its tile of
W.

    W [rows, columns] <- W - c G, then W <- W - lr wd W        X [tokens, columns], dY [tokens, rows], contiguous

c is the step's factor, one per row, one per column or one for all (kernels/apply.py). A backward pass makes this matrix
product anyway. Here its epilogue reads and writes W instead of writing G: 4 bytes a parameter in bfloat16 instead of
10.
"""

from functools import lru_cache

import triton
import triton.language as tl

from .apply import store_weight, tile_factor
from .int8 import load_groups, store_groups
from .linear import tile_place
from .philox import WEIGHT as WEIGHT_STREAM
from .philox import rounding_bits_by_row
from .projected import dot
from .step import step_numbers
from .table import (
    COLUMNS,
    ROUNDING_OFFSET,
    ROWS,
    SCALE,
    SEED,
    WEIGHT,
    WEIGHT_COLUMN_STRIDE,
    WEIGHT_ROW_STRIDE,
    ZERO,
)


@lru_cache(maxsize=1024)
def blocks(itemsize: int, tensor_cores: bool, has_large_shared_memory: bool) -> dict[str, int]:
    """Tile sizes and warps of the product G. ``has_large_shared_memory``: a program may use 144 KiB of shared memory.

    Measured on an H100, W [4096, 4096], 8192 tokens, bfloat16 (torch.mm of G alone takes 0.342 ms): 128 x 256 x 64
    takes 0.388 ms, 256 x 128 x 64 0.475, 128 x 128 x 64 0.547 on 8 warps and 0.479 on 4, 128 x 128 x 32 0.884.
    """
    if not tensor_cores:  # float32 on ordinary instructions: 32 sums a thread
        return {"BLOCK_ROWS": 64, "BLOCK_COLUMNS": 64, "BLOCK_TOKENS": 16, "num_warps": 4, "num_stages": 2}
    if not has_large_shared_memory:  # 48 KiB
        return {
            "BLOCK_ROWS": 128,
            "BLOCK_COLUMNS": 128,
            "BLOCK_TOKENS": 64 // itemsize,
            "num_warps": 8,
            "num_stages": 3,
        }
    return {"BLOCK_ROWS": 128, "BLOCK_COLUMNS": 256, "BLOCK_TOKENS": 128 // itemsize, "num_warps": 8, "num_stages": 3}


def int8_blocks(group_size: int, itemsize: int, tensor_cores: bool, has_large_shared_memory: bool) -> dict[str, int]:
    """The same for int8 weights. A tile's rows are whole groups. Requantising takes several registers an element, so
    more than 8192 elements at a time spill. It is done on half a tile at a time, or on all of it if a row is one
    group."""
    tiles = blocks(itemsize, tensor_cores, has_large_shared_memory)
    columns = max(tiles["BLOCK_COLUMNS"], group_size)
    at_a_time = columns if group_size == columns else columns // 2
    return tiles | {"BLOCK_ROWS": min(64, 8192 // at_a_time), "BLOCK_COLUMNS": columns}


@triton.jit
def gradient_tile(
    p_X, p_dY, o_row, o_column, rows, columns, tokens, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """G = dY^T X at ``o_row`` and ``o_column``, float32 sums that are never rounded. Zero beyond the ends."""
    m_row, m_column = (o_row < rows)[None, :], (o_column < columns)[None, :]
    o_token = tl.arange(0, BLOCK_TOKENS).to(tl.int64)[:, None]
    p_dY += o_token * rows + o_row[None, :]
    p_X += o_token * columns + o_column[None, :]
    G = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
    for start in range(0, tokens, BLOCK_TOKENS):
        m_token = o_token < tokens - start
        dY = tl.load(p_dY, mask=m_token & m_row, other=0.0)
        X = tl.load(p_X, mask=m_token & m_column, other=0.0)
        G = dot(tl.trans(dY), X, G, PRECISION)
        p_dY += BLOCK_TOKENS * rows
        p_X += BLOCK_TOKENS * columns
    return G


@triton.jit
def halves(tile):
    """The left and the right half of a tile's columns. An epilogue that loads W for one half at a time does not
    spill."""
    return tl.split(tl.permute(tile.reshape(tile.shape[0], 2, tile.shape[1] // 2), (0, 2, 1)))


@triton.jit
def update(
    p_W, difference, decay, u, p_row, t, first_row, first_column, rows, columns, W_row_stride, W_column_stride,
    KEEPS_ROWS: tl.constexpr, ALIGNED: tl.constexpr, STOCHASTIC: tl.constexpr,
):  # fmt: skip
    """W <- W - difference, then W <- W - decay W, for the tile that begins at ``first_row`` and ``first_column``."""
    BLOCK_ROWS: tl.constexpr = difference.shape[0]
    BLOCK_COLUMNS: tl.constexpr = difference.shape[1]
    o_row = first_row + tl.arange(0, BLOCK_ROWS)
    o_column = first_column + tl.arange(0, BLOCK_COLUMNS)
    mask = (o_row < rows)[:, None] & (o_column < columns)[None, :]
    p_W += o_row[:, None] * W_row_stride + o_column[None, :].to(tl.int64) * W_column_stride
    W = tl.load(p_W, mask=mask, other=0.0).to(tl.float32)
    W -= difference
    # Not W * (1 - decay): rounding 1 - decay errs the same way at every step.
    W -= decay * W
    store_weight(
        p_W, W, mask, u, p_row, t, first_row, first_column, rows, columns,
        KEEPS_ROWS, ALIGNED, STOCHASTIC, BLOCK_ROWS, BLOCK_COLUMNS,
    )  # fmt: skip


@triton.jit
def update_int8(
    p_q, p_scale, p_zero, difference, decay, u, p_row, t, first_row, first_column, rows, columns,
    KEEPS_ROWS: tl.constexpr, STOCHASTIC: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """The same for int8 weights: the tile is reshaped to ``[groups, GROUP]``."""
    BLOCK_ROWS: tl.constexpr = difference.shape[0]
    BLOCK_COLUMNS: tl.constexpr = difference.shape[1]
    GROUPS: tl.constexpr = BLOCK_ROWS * BLOCK_COLUMNS // GROUP
    o_row = first_row + tl.arange(0, BLOCK_ROWS)
    o_run = first_column + tl.arange(0, BLOCK_COLUMNS // GROUP) * GROUP
    m_group = ((o_row < rows)[:, None] & (o_run < columns)[None, :]).reshape(GROUPS)
    o_group = ((o_row[:, None] * columns + o_run[None, :]) // GROUP).reshape(GROUPS)
    index = o_group[:, None] * GROUP + tl.arange(0, GROUP)[None, :]
    mask = m_group[:, None]
    before = load_groups(p_q, p_scale, p_zero, index, mask, o_group, m_group)
    W = before - difference.reshape(GROUPS, GROUP)
    W -= decay * W
    bits = None
    if STOCHASTIC:
        first = (
            tl.load(p_row + ROUNDING_OFFSET) * (columns if KEEPS_ROWS else rows) + first_row * columns + first_column
        )
        seed = tl.load(p_row + SEED)
        bits = rounding_bits_by_row(seed, t, first, columns, BLOCK_ROWS, BLOCK_COLUMNS, WEIGHT_STREAM)
        bits = bits.reshape(GROUPS, GROUP)
    store_groups(W, before, bits, u, p_q, p_scale, p_zero, index, mask, o_group, m_group, GROUPS)


@triton.jit
def sizes(p_row, ROWS_BY_EIGHTS: tl.constexpr, COLUMNS_BY_EIGHTS: tl.constexpr):
    """Rows and columns of the matrix. The compiler is told of multiples of 8, so that rows of dY and X are loaded 16
    bytes at a time."""
    rows, columns = tl.load(p_row + ROWS).to(tl.int32), tl.load(p_row + COLUMNS).to(tl.int32)
    if ROWS_BY_EIGHTS:
        rows = tl.multiple_of(rows, 8)
    if COLUMNS_BY_EIGHTS:
        columns = tl.multiple_of(columns, 8)
    return rows, columns


@triton.jit(do_not_specialize=["tokens", "step"])
def apply_operands_kernel(
    p_row, p_X, p_dY, p_factors, p_sums, p_root_scales, p_previous, p_skipped, tokens,
    step, step_size, decay, p_step,
    WEIGHT_DTYPE: tl.constexpr, KEEPS_ROWS: tl.constexpr, PER_CHANNEL: tl.constexpr, ALIGNED: tl.constexpr,
    ROWS_BY_EIGHTS: tl.constexpr, USE_LIMITER: tl.constexpr, STOCHASTIC: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """One program updates one tile of W. ``p_root_scales``, and a u that is not finite, are as in ``apply_kernel``.

    ``p_row`` is the matrix's row of its table. ALIGNED: rows of W are contiguous, start at multiples of 16 bytes and
    hold a multiple of 8 elements. Reads X once for every BLOCK_ROWS rows and dY once for every BLOCK_COLUMNS columns;
    reads and writes W.
    """
    rows, columns = sizes(p_row, ROWS_BY_EIGHTS, ALIGNED)
    p_W = tl.load(p_row + WEIGHT).to(tl.pointer_type(WEIGHT_DTYPE))
    W_row_stride = tl.load(p_row + WEIGHT_ROW_STRIDE)
    if ALIGNED:
        p_W, W_row_stride = tl.multiple_of(p_W, 16), tl.multiple_of(W_row_stride, 8)
        W_column_stride = 1
    else:
        W_column_stride = tl.load(p_row + WEIGHT_COLUMN_STRIDE)
    first_row, first_column = tile_place(rows, columns, BLOCK_ROWS, BLOCK_COLUMNS)
    o_row = first_row + tl.arange(0, BLOCK_ROWS)
    o_column = first_column + tl.arange(0, BLOCK_COLUMNS)
    G = gradient_tile(
        p_X, p_dY, o_row, o_column, rows, columns, tokens, PRECISION, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_TOKENS
    )
    t, h, decay = step_numbers(step, step_size, decay, p_step)
    factor, u = tile_factor(
        p_row, p_factors, p_sums, p_root_scales, p_previous, p_skipped, None, 0, tl.program_id(0),
        o_row[:, None], o_column[None, :], rows, columns, h,
        KEEPS_ROWS, PER_CHANNEL, USE_LIMITER, BLOCK_CHANNELS,
    )  # fmt: skip
    left, right = halves(factor * G)
    update(
        p_W, left, decay, u, p_row, t, first_row, first_column, rows, columns, W_row_stride, W_column_stride,
        KEEPS_ROWS, ALIGNED, STOCHASTIC,
    )  # fmt: skip
    update(
        p_W, right, decay, u, p_row, t, first_row, first_column + BLOCK_COLUMNS // 2, rows, columns,
        W_row_stride, W_column_stride, KEEPS_ROWS, ALIGNED, STOCHASTIC,
    )  # fmt: skip


@triton.jit(do_not_specialize=["tokens", "step"])
def apply_int8_operands_kernel(
    p_row, p_X, p_dY, p_factors, p_sums, p_root_scales, p_previous, p_skipped, tokens,
    step, step_size, decay, p_step,
    KEEPS_ROWS: tl.constexpr, PER_CHANNEL: tl.constexpr, ALIGNED: tl.constexpr, ROWS_BY_EIGHTS: tl.constexpr,
    USE_LIMITER: tl.constexpr, STOCHASTIC: tl.constexpr, PRECISION: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
    GROUP: tl.constexpr, BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """The same for int8 weights, stored with new scales and zero points as in ``apply_int8_kernel``.

    GROUP is a power of two and divides the columns of W and of the tile, so that a tile owns whole groups. Reads and
    writes q: 2 bytes a parameter, and 10 a group.
    """
    rows, columns = sizes(p_row, ROWS_BY_EIGHTS, ALIGNED)
    p_q = tl.load(p_row + WEIGHT).to(tl.pointer_type(tl.uint8))
    p_scale = tl.load(p_row + SCALE).to(tl.pointer_type(tl.float32))
    p_zero = tl.load(p_row + ZERO).to(tl.pointer_type(tl.uint8))
    if ALIGNED:
        p_q = tl.multiple_of(p_q, 16)
    first_row, first_column = tile_place(rows, columns, BLOCK_ROWS, BLOCK_COLUMNS)
    o_row = first_row + tl.arange(0, BLOCK_ROWS)
    o_column = first_column + tl.arange(0, BLOCK_COLUMNS)
    G = gradient_tile(
        p_X, p_dY, o_row, o_column, rows, columns, tokens, PRECISION, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_TOKENS
    )
    t, h, decay = step_numbers(step, step_size, decay, p_step)
    factor, u = tile_factor(
        p_row, p_factors, p_sums, p_root_scales, p_previous, p_skipped, None, 0, tl.program_id(0),
        o_row[:, None], o_column[None, :], rows, columns, h,
        KEEPS_ROWS, PER_CHANNEL, USE_LIMITER, BLOCK_CHANNELS,
    )  # fmt: skip
    if GROUP < BLOCK_COLUMNS:
        left, right = halves(factor * G)
        update_int8(
            p_q, p_scale, p_zero, left, decay, u, p_row, t, first_row, first_column, rows, columns,
            KEEPS_ROWS, STOCHASTIC, GROUP,
        )  # fmt: skip
        first_column += BLOCK_COLUMNS // 2
    else:
        right = factor * G
    update_int8(
        p_q, p_scale, p_zero, right, decay, u, p_row, t, first_row, first_column, rows, columns,
        KEEPS_ROWS, STOCHASTIC, GROUP,
    )  # fmt: skip
