"""AdamW in APOLLO's convention for the dense parameters, of any shape, in one launch; and squared norms before it.

A parameter whose gradient is not finite must not change at all, so its norm is computed before its first element is
written. Clipping by the norm of all gradients uses the same squared norms.
"""

import triton
import triton.language as tl

from .philox import EXP_AVG as EXP_AVG_STREAM
from .philox import EXP_AVG_SQ as EXP_AVG_SQ_STREAM
from .philox import WEIGHT as WEIGHT_STREAM
from .philox import round_nearest, round_stochastic, rounding_bits_by_row
from .step import step_numbers
from .table import (
    COLUMNS,
    EXP_AVG,
    EXP_AVG_SQ,
    FIELDS,
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

BLOCK = 4096  # elements a program of the step, and an iteration of the norm's loop; 16 a thread
NORM_PROGRAMS = 256  # at most so many programs share one matrix's norm: each dense program adds up their sums again


@triton.jit
def element_offsets(o, p_row, columns, ROW_FIELD: tl.constexpr, COLUMN_FIELD: tl.constexpr, ALIGNED: tl.constexpr):
    """Offsets in memory of the elements ``o`` (int64, row-major): ``o`` itself if ALIGNED, else by the strides."""
    if ALIGNED:
        return o
    else:
        return o // columns * tl.load(p_row + ROW_FIELD) + o % columns * tl.load(p_row + COLUMN_FIELD)


@triton.jit
def squared_norm_kernel(
    p_table, p_gradients, p_programs, p_parts, GRADIENT: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr, NORM_PROGRAMS: tl.constexpr,
):  # fmt: skip
    """Store one program's share of |G|_F^2 in ``p_parts [matrices, NORM_PROGRAMS]``, and 0 in shares without elements.

    ``p_programs`` holds each program's matrix and share. The program adds every NORM_PROGRAMS-th block of BLOCK
    elements, from block ``share`` on. Reads G.
    """
    program = tl.program_id(0)
    matrix = tl.load(p_programs + program * 2)
    share = tl.load(p_programs + program * 2 + 1)
    p_row = p_table + matrix.to(tl.int64) * FIELDS
    columns = tl.load(p_row + COLUMNS)
    elements = tl.load(p_row + ROWS) * columns
    p_G = tl.load(p_gradients + matrix).to(tl.pointer_type(GRADIENT))
    if ALIGNED:
        p_G, elements = tl.multiple_of(p_G, 16), tl.multiple_of(elements, 8)
    squares = tl.zeros([BLOCK], tl.float32)
    for start in range(share.to(tl.int64) * BLOCK, elements, NORM_PROGRAMS * BLOCK):
        o = start + tl.arange(0, BLOCK)
        offsets = element_offsets(o, p_row, columns, GRADIENT_ROW_STRIDE, GRADIENT_COLUMN_STRIDE, ALIGNED)
        G = tl.load(p_G + offsets, mask=o < elements, other=0.0).to(tl.float32)
        squares += G * G
    p_parts += matrix.to(tl.int64) * NORM_PROGRAMS
    tl.store(p_parts + share, tl.sum(squares, 0))
    if share == 0:
        o = tl.arange(0, NORM_PROGRAMS)
        tl.store(p_parts + o, tl.zeros([NORM_PROGRAMS], tl.float32), mask=(o > 0) & (o * BLOCK >= elements))


@triton.jit(do_not_specialize=["step"])
def dense_kernel(
    p_table, p_gradients, p_programs, p_parts, p_skipped, p_gradient_scale,
    step, step_size, decay, p_step, keep1, keep2, eps,
    WEIGHT_DTYPE: tl.constexpr, GRADIENT: tl.constexpr, STATE: tl.constexpr, ALIGNED: tl.constexpr,
    STOCHASTIC: tl.constexpr, BLOCK: tl.constexpr, NORM_PROGRAMS: tl.constexpr,
):  # fmt: skip
    """M <- b1 M + (1 - b1) G, V <- b2 V + (1 - b2) G^2, W <- W - h M / (sqrt(V) + eps), then W <- W - lr wd W.

    One program updates one block of a parameter, which is seen as rows x columns. Reads G, and reads and writes W, M
    and V.
    """
    program = tl.program_id(0)
    matrix = tl.load(p_programs + program)
    p_row = p_table + matrix.to(tl.int64) * FIELDS
    columns = tl.load(p_row + COLUMNS)
    elements = tl.load(p_row + ROWS) * columns
    p_W = tl.load(p_row + WEIGHT).to(tl.pointer_type(WEIGHT_DTYPE))
    p_M = tl.load(p_row + EXP_AVG).to(tl.pointer_type(STATE))
    p_V = tl.load(p_row + EXP_AVG_SQ).to(tl.pointer_type(STATE))
    p_G = tl.load(p_gradients + matrix).to(tl.pointer_type(GRADIENT))
    if ALIGNED:
        p_W, p_G = tl.multiple_of(p_W, 16), tl.multiple_of(p_G, 16)
        p_M, p_V = tl.multiple_of(p_M, 16), tl.multiple_of(p_V, 16)
        elements = tl.multiple_of(elements, 8)
    block = program - tl.load(p_row + FIRST_TILE_PROGRAM)
    first = block * BLOCK
    o = first + tl.arange(0, BLOCK)
    mask = o < elements
    p_G += element_offsets(o, p_row, columns, GRADIENT_ROW_STRIDE, GRADIENT_COLUMN_STRIDE, ALIGNED)
    p_W += element_offsets(o, p_row, columns, WEIGHT_ROW_STRIDE, WEIGHT_COLUMN_STRIDE, ALIGNED)
    o_state = element_offsets(o, p_row, columns, STATE_ROW_STRIDE, STATE_COLUMN_STRIDE, ALIGNED)
    G = tl.load(p_G, mask=mask, other=0.0).to(tl.float32)
    W = tl.load(p_W, mask=mask, other=0.0).to(tl.float32)
    M = tl.load(p_M + o_state, mask=mask, other=0.0).to(tl.float32)
    V = tl.load(p_V + o_state, mask=mask, other=0.0).to(tl.float32)

    o_parts = tl.arange(0, NORM_PROGRAMS)
    m_parts = o_parts * BLOCK < elements
    parts = tl.load(p_parts + matrix.to(tl.int64) * NORM_PROGRAMS + o_parts, mask=m_parts, other=0.0)
    squared_norm = tl.sum(parts, 0)
    if p_gradient_scale is not None:
        gradient_scale = tl.load(p_gradient_scale)
        G = G * gradient_scale
        squared_norm = squared_norm * gradient_scale
    moves = tl.abs(squared_norm) < float("inf")
    if block == 0:
        tl.store(p_skipped + matrix, tl.load(p_skipped + matrix) + tl.where(moves, 0, 1))
    t, h, decay = step_numbers(step, step_size, decay, p_step)
    M += keep1 * (G - M)
    V += keep2 * (G * G - V)
    W -= h * (M / (tl.sqrt(V) + eps))
    W -= decay * W
    mask = mask & (tl.broadcast_to(tl.abs(squared_norm), [BLOCK]) < float("inf"))  # as a block: see apply_kernel
    seed = tl.load(p_row + SEED)
    first += tl.load(p_row + ROUNDING_OFFSET)  # of a shard; without it all ranks would draw the same bits
    if STATE == tl.bfloat16:
        tl.store(p_M + o_state, round_stochastic(M, block_bits(seed, t, first, BLOCK, EXP_AVG_STREAM)), mask=mask)
        tl.store(p_V + o_state, round_stochastic(V, block_bits(seed, t, first, BLOCK, EXP_AVG_SQ_STREAM)), mask=mask)
    else:
        tl.store(p_M + o_state, M, mask=mask)
        tl.store(p_V + o_state, V, mask=mask)
    if STOCHASTIC:
        tl.store(p_W, round_stochastic(W, block_bits(seed, t, first, BLOCK, WEIGHT_STREAM)), mask=mask)
    else:
        tl.store(p_W, round_nearest(W, WEIGHT_DTYPE), mask=mask)


@triton.jit
def block_bits(seed, step, first, BLOCK: tl.constexpr, stream: tl.constexpr):
    """The rounding bits of BLOCK elements from ``first``, a multiple of 8."""
    return rounding_bits_by_row(seed, step, first, 0, 1, BLOCK, stream).reshape(BLOCK)
