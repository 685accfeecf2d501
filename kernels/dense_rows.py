"""AdamW with one second moment a row, for dense parameters of two dimensions or more, in one launch; and the sums of
squares that it needs, in one before it.

A parameter is rows x columns here. No program may write a second moment that another has yet to read, so the first
launch, which reads every gradient anyway, puts them aside, and the second reads them there.
"""

import triton
import triton.language as tl

from .blockwise import BLOCK as CODES
from .blockwise import magnitudes, quantized
from .dense import block_bits
from .philox import EXP_AVG as EXP_AVG_STREAM
from .philox import WEIGHT as WEIGHT_STREAM
from .philox import round_nearest, round_stochastic
from .step import step_numbers
from .table import (
    COLUMNS,
    EXP_AVG,
    EXP_AVG_SQ,
    FIELDS,
    FIRST_CHANNEL,
    FIRST_CHANNEL_PROGRAM,
    FIRST_TILE_PROGRAM,
    GRADIENT_COLUMN_STRIDE,
    GRADIENT_ROW_STRIDE,
    ROUNDING_OFFSET,
    ROWS,
    SEED,
    STATE_COLUMN_STRIDE,
    STATE_ROW_STRIDE,
    WEIGHT,
    WEIGHT_COLUMN_STRIDE,
    WEIGHT_ROW_STRIDE,
)

BLOCK_ROWS = 16  # of the sums, each of which stays in one warp: 256 elements are 8 a thread
BLOCK_COLUMNS = 256
SEGMENT = 16384  # columns whose squares one program adds up: all of a row, except where it is longer than any embedding
SEGMENTS = 256  # of a row at most, since each program of the step adds up those of its rows again
LARGEST = tl.constexpr(1 << 30)
# What the table's row of a matrix has no room for, int64: the elements of a whole row, of which a part may be here, and
# if M is 8-bit the addresses of its absmaxes and of ``code_and_thresholds``. As arguments they would be too many.
ROW_FIELDS = tl.constexpr(3)
ROW_LENGTH, ABSMAX, CODE = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


def segments(columns: int) -> int:
    """How many parts a row's sum has."""
    blocks = -(-columns // BLOCK_COLUMNS)
    return -(-blocks // max(SEGMENT // BLOCK_COLUMNS, -(-blocks // SEGMENTS)))


def tiles(rows: int, columns: int) -> int:
    """How many parts of a parameter's rows the programs of the sums deal out."""
    return -(-rows // BLOCK_ROWS) * segments(columns)


@triton.jit
def segments_of(columns, BLOCK_COLUMNS: tl.constexpr, SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr):
    """How many parts a row's sum has, and the columns of each, as ``segments`` counts them."""
    blocks = tl.cdiv(columns, BLOCK_COLUMNS)
    length = tl.maximum(SEGMENT // BLOCK_COLUMNS, tl.cdiv(blocks, SEGMENTS))
    return tl.cdiv(blocks, length), length * BLOCK_COLUMNS


@triton.jit
def row_sums_kernel(
    p_table, p_gradients, p_programs, p_parts, p_row_parts, p_previous, GRADIENT: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, SEGMENT: tl.constexpr, SEGMENTS: tl.constexpr,
    NORM_PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Store |G_i|^2 of each row, in parts, and one program's share of |G|_F^2 in ``p_parts [matrices, NORM_PROGRAMS]``,
    with 0 in shares without a tile; and put V aside in ``p_previous``, float32 ``[all rows]``.

    ``p_programs`` holds each program's matrix and share. The program takes every NORM_PROGRAMS-th tile of BLOCK_ROWS
    rows and a segment of their columns, from tile ``share`` on. Reads G and V.
    """
    program = tl.program_id(0)
    matrix = tl.load(p_programs + program * 2)
    share = tl.load(p_programs + program * 2 + 1)
    p_row = p_table + matrix.to(tl.int64) * FIELDS
    rows, columns = tl.load(p_row + ROWS), tl.load(p_row + COLUMNS)
    p_G = tl.load(p_gradients + matrix).to(tl.pointer_type(GRADIENT))
    p_V = tl.load(p_row + EXP_AVG_SQ).to(tl.pointer_type(tl.float32))
    p_previous += tl.load(p_row + FIRST_CHANNEL)
    p_row_parts += tl.load(p_row + FIRST_CHANNEL_PROGRAM)
    if ALIGNED:
        p_G, columns = tl.multiple_of(p_G, 16), tl.multiple_of(columns, 8)
        row_stride, column_stride = columns, 1
    else:
        row_stride, column_stride = tl.load(p_row + GRADIENT_ROW_STRIDE), tl.load(p_row + GRADIENT_COLUMN_STRIDE)
    segments, length = segments_of(columns, BLOCK_COLUMNS, SEGMENT, SEGMENTS)
    tiles = tl.cdiv(rows, BLOCK_ROWS) * segments
    total = 0.0
    for tile in range(share.to(tl.int64), tiles, NORM_PROGRAMS):
        segment = tile % segments
        o_row = tile // segments * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)
        m_row = o_row < rows
        squares = tl.zeros([BLOCK_ROWS, BLOCK_COLUMNS], tl.float32)
        end = tl.minimum(columns, (segment + 1) * length)
        for start in range(segment * length, end, BLOCK_COLUMNS):
            o_column = start + tl.arange(0, BLOCK_COLUMNS)
            offsets = o_row[:, None] * row_stride + o_column[None, :] * column_stride
            G = tl.load(p_G + offsets, mask=m_row[:, None] & (o_column < end)[None, :], other=0.0).to(tl.float32)
            squares += G * G
        sums = tl.sum(squares, 1)
        tl.store(p_row_parts + o_row * segments + segment, sums, mask=m_row)
        total += tl.sum(sums, 0)
        if segment == 0:
            tl.store(p_previous + o_row, tl.load(p_V + o_row, mask=m_row, other=0.0), mask=m_row)
    p_parts += matrix.to(tl.int64) * NORM_PROGRAMS
    tl.store(p_parts + share, total)
    if share == 0:
        o = tl.arange(0, NORM_PROGRAMS)
        tl.store(p_parts + o, tl.zeros([NORM_PROGRAMS], tl.float32), mask=(o > 0) & (o >= tiles))


@triton.jit(do_not_specialize=["step"])
def dense_rows_kernel(
    p_table, p_row_fields, p_gradients, p_programs, p_parts, p_row_parts, p_previous, p_skipped, p_gradient_scale,
    step, step_size, decay, p_step, keep1, keep2, eps,
    WEIGHT_DTYPE: tl.constexpr, GRADIENT: tl.constexpr, STATE: tl.constexpr, ALIGNED: tl.constexpr,
    STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, SEGMENT: tl.constexpr,
    SEGMENTS: tl.constexpr, NORM_PROGRAMS: tl.constexpr,
):  # fmt: skip
    """M <- b1 M + (1 - b1) G, V_i <- b2 V_i + (1 - b2) mean_j G_ij^2, W <- W - h M / (sqrt(V_i) + eps), then
    W <- W - lr wd W.

    One program updates one block of a parameter's elements, wherever its rows end. Reads G, and reads and writes W and
    M. The program that has a row's first element writes its V. ``p_row_fields``: int64 ``[matrices, ROW_FIELDS]``.
    """
    program = tl.program_id(0)
    matrix = tl.load(p_programs + program)
    p_row = p_table + matrix.to(tl.int64) * FIELDS
    p_row_fields += matrix * ROW_FIELDS
    columns = tl.load(p_row + COLUMNS)
    elements = tl.load(p_row + ROWS) * columns
    p_W = tl.load(p_row + WEIGHT).to(tl.pointer_type(WEIGHT_DTYPE))
    p_M = tl.load(p_row + EXP_AVG).to(tl.pointer_type(STATE))
    p_V = tl.load(p_row + EXP_AVG_SQ).to(tl.pointer_type(tl.float32))
    p_G = tl.load(p_gradients + matrix).to(tl.pointer_type(GRADIENT))
    p_previous += tl.load(p_row + FIRST_CHANNEL)
    p_row_parts += tl.load(p_row + FIRST_CHANNEL_PROGRAM)
    block = program - tl.load(p_row + FIRST_TILE_PROGRAM)
    first = block * BLOCK
    # [blocks of 256, groups of 8, 8]: the elements of a group are one thread's, and where ALIGNED of one row.
    o_block = tl.arange(0, BLOCK // CODES)
    o_group = o_block[:, None, None] * CODES + tl.arange(0, CODES // 8)[None, :, None] * 8
    o_element = o_group + tl.arange(0, 8)[None, None, :]
    o = first + o_element
    mask = o < elements
    if ALIGNED:
        p_W, p_G, p_M = tl.multiple_of(p_W, 16), tl.multiple_of(p_G, 16), tl.multiple_of(p_M, 16)
        elements = tl.multiple_of(elements, 8)
        row, column = places(first, o_group, columns)
        p_G, p_W, p_M = p_G + o, p_W + o, p_M + o
        m_row = first + o_group < elements
    else:
        row, column = places(first, o_element, columns)
        p_G += row * tl.load(p_row + GRADIENT_ROW_STRIDE) + column * tl.load(p_row + GRADIENT_COLUMN_STRIDE)
        p_W += row * tl.load(p_row + WEIGHT_ROW_STRIDE) + column * tl.load(p_row + WEIGHT_COLUMN_STRIDE)
        p_M += row * tl.load(p_row + STATE_ROW_STRIDE) + column * tl.load(p_row + STATE_COLUMN_STRIDE)
        m_row = mask
    G = tl.load(p_G, mask=mask, other=0.0).to(tl.float32)
    W = tl.load(p_W, mask=mask, other=0.0).to(tl.float32)
    if STATE == tl.uint8:
        p_code = tl.load(p_row_fields + CODE).to(tl.pointer_type(tl.float32))
        p_absmax = tl.load(p_row_fields + ABSMAX).to(tl.pointer_type(tl.float32)) + first // CODES + o_block
        m_block = first + o_block * CODES < elements
        absmax = tl.load(p_absmax, mask=m_block, other=0.0)
        M = tl.load(p_code + tl.load(p_M, mask=mask, other=0).to(tl.int32)) * absmax[:, None, None]
    else:
        M = tl.load(p_M, mask=mask, other=0.0).to(tl.float32)

    segments, _ = segments_of(columns, BLOCK_COLUMNS, SEGMENT, SEGMENTS)
    V = tl.load(p_previous + row, mask=m_row, other=0.0)
    squared_row = tl.zeros_like(V)
    for segment in range(0, segments):
        squared_row += tl.load(p_row_parts + row * segments + segment, mask=m_row, other=0.0)
    squared_norm = tl.sum(tl.load(p_parts + matrix.to(tl.int64) * NORM_PROGRAMS + tl.arange(0, NORM_PROGRAMS)), 0)
    if p_gradient_scale is not None:
        gradient_scale = tl.load(p_gradient_scale)
        G = G * gradient_scale
        squared_row = squared_row * gradient_scale * gradient_scale
        squared_norm = squared_norm * gradient_scale
    moves = tl.abs(squared_norm) < float("inf")
    if block == 0:
        tl.store(p_skipped + matrix, tl.load(p_skipped + matrix) + tl.where(moves, 0, 1))
    t, h, decay = step_numbers(step, step_size, decay, p_step)
    M += keep1 * (G - M)
    V += keep2 * (squared_row / tl.load(p_row_fields + ROW_LENGTH).to(tl.float32) - V)
    W -= h * (M * (1.0 / (tl.sqrt(V) + eps)))
    W -= decay * W
    is_finite = tl.broadcast_to(tl.abs(squared_norm), [BLOCK // CODES]) < float("inf")  # as a block: see apply_kernel
    mask = mask & is_finite[:, None, None]
    tl.store(p_V + row, V, mask=m_row & is_finite[:, None, None] & (column == 0))
    seed = tl.load(p_row + SEED)
    first += tl.load(p_row + ROUNDING_OFFSET)  # of a shard; without it all ranks would draw the same bits
    if STATE == tl.uint8:
        absmax = tl.max(tl.max(tl.where(mask, magnitudes(M), 0.0), 2), 1)
        tl.store(p_absmax, absmax, mask=m_block & is_finite)
        tl.store(p_M, quantized(M, absmax[:, None, None], p_code), mask=mask)
    elif STATE == tl.bfloat16:
        bits = block_bits(seed, t, first, BLOCK, EXP_AVG_STREAM).reshape(BLOCK // CODES, CODES // 8, 8)
        tl.store(p_M, round_stochastic(M, bits), mask=mask)
    else:
        tl.store(p_M, M, mask=mask)
    if STOCHASTIC:
        bits = block_bits(seed, t, first, BLOCK, WEIGHT_STREAM).reshape(BLOCK // CODES, CODES // 8, 8)
        tl.store(p_W, round_stochastic(W, bits), mask=mask)
    else:
        tl.store(p_W, round_nearest(W, WEIGHT_DTYPE), mask=mask)


@triton.jit
def places(first, o, columns):
    """Rows and columns, int64, of the elements ``first + o``; ``o`` is int32, from 0 on.

    Rows are counted from that of ``first`` on by a division of small integers. One of 64 bits would take longer than
    all else that a program computes.
    """
    row = first // columns
    column = first - row * columns
    behind = o - tl.minimum(columns - column, LARGEST).to(tl.int32)  # elements behind the end of that row
    short = tl.minimum(columns, LARGEST).to(tl.int32)
    count = tl.maximum(behind, 0) // short
    rows = row + tl.where(behind < 0, 0, 1 + count)
    return rows, tl.where(behind < 0, column + o, behind - count * short)
