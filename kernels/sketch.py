"""sketch: G -> R [channels, rank] and |G_c|^2, reading G once; and, where R need not leave the program, rescale too.

A program owns a block of channels and walks along the whole width, so that nothing is summed between programs. Ranks
below 16 multiply and accumulate, and make P as they go; from 16 on the product is a tensor-core one, and P is read: 2
bytes an entry, from the second-level cache.
"""

import math

import triton
import triton.language as tl

from .philox import gaussian_row, sign_words, signs
from .rescale import current_step, moved_moments, store_factors
from .table import (
    COLUMNS,
    FIELDS,
    FIRST_CHANNEL,
    FIRST_CHANNEL_PROGRAM,
    GRADIENT_COLUMN_STRIDE,
    GRADIENT_ROW_STRIDE,
    INTERPRETED,
    PROJECTION,
    ROUNDING_OFFSET,
    ROWS,
    SEED,
    power_of_two,
)

_FIELDS = tl.constexpr(FIELDS)
_IEEE = tl.constexpr("ieee")  # triton 3.6 does not take a plain string for a default
# How P comes about.
GAUSSIAN = tl.constexpr(0)  # made here; ranks below SMALL_RANK
RADEMACHER = tl.constexpr(1)  # the same: 62 instructions an element at rank 256, where reading P takes 9
MATERIALISED = tl.constexpr(2)  # unit-variance bfloat16 in memory, rows padded to a multiple of 128 entries
SINGULAR_VECTORS = tl.constexpr(3)  # float32 in memory, rows of the width itself

SMALL_RANK = 16  # the least rank that fills a tensor-core tile
FUSED_RANK = 256  # the largest R that a program keeps in registers: 64 x 256 float32 are 64 registers a thread


def blocks(rank: int, needs_more_registers: bool = False) -> dict[str, int]:
    """Tile sizes and warps for a rank; ``heavy``: more registers for float32 and svd's P, of several products, and for
    unaligned rows, of which each entry has an address of its own.
    BLOCK_CHANNELS may depend on the rank alone: the grouping of the limiter's partial sums, and so their last bit,
    follows it, and a matrix must update alike alone and in a batch.

    From rank 16 on P comes from the second-level cache once for every BLOCK_CHANNELS, but of 128 channels R and G G^T
    do not fit the registers. On an H100, 1.2 G entries of bfloat16: rank 64 0.96 ms (128 x 64 tiles on 8 warps 1.38),
    rank 128 1.21 (8 warps 1.54, 128 x 128 tiles 1.25), rank 256 2.08.
    """
    if rank < SMALL_RANK:
        # 64 channels share one row of normals, so that one costs a gradient's element about 4 instructions.
        return {"BLOCK_CHANNELS": 64, "BLOCK_WIDTH": 128, "BLOCK_RANK": power_of_two(rank), "num_warps": 4}
    block_rank = min(power_of_two(rank), FUSED_RANK)
    return {
        "BLOCK_CHANNELS": 64,
        "BLOCK_WIDTH": 64 if needs_more_registers or block_rank > 64 else 128,
        "BLOCK_RANK": block_rank,
        "num_warps": 8 if block_rank > (32 if needs_more_registers else 128) else 4,
    }


def stages(rank: int) -> int:
    """How many tiles are in shared memory where there is much of it, 40 KiB each at rank 256: with 5 in place of 3 an
    H100 takes 2.08 ms, not 2.69."""
    return 5 if rank > 128 else 4 if rank > 64 else 3


@triton.jit
def product(G, P, R, PARTS: tl.constexpr):
    """R + G P for a tile of G ``[channels, width]`` and of P ``[width, rank]``, on tensor cores.

    P holds at most 8 significant bits, exact in bfloat16 and float16, so a half-precision G needs one product. A
    float32 G is the exact sum of three bfloat16 (8 + 8 + 8 bits), of which PARTS are multiplied: by
    torch.set_float32_matmul_precision "highest" 3, "high" 2, "medium" 1.
    """
    if G.dtype == tl.float32:
        # A loop, not a list of products: on sm_100 each of a list takes tensor memory of its own, 576 of 512 columns.
        for _ in range(PARTS):
            part = G.to(tl.bfloat16)
            R = dot(part, P.to(tl.bfloat16), R)
            G -= part.to(tl.float32)
        return R
    else:
        return dot(G, P.to(G.dtype), R)


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr = _IEEE):
    """``PRECISION``: in what float32 is multiplied; half precision is exact in any."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator)
    else:
        return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def row_of_P(p_row, seed, epoch, index, start, width, PROJECTION_KIND: tl.constexpr, COUNT: tl.constexpr):
    """COUNT entries of row ``index`` of P from ``start``, float32: made here, or svd's from memory."""
    if PROJECTION_KIND == GAUSSIAN:
        return gaussian_row(seed, epoch, index, start, COUNT)
    elif PROJECTION_KIND == RADEMACHER:
        w0, w1, w2, w3 = sign_words(seed, epoch, index, start)
        return signs(w0, w1, w2, w3, tl.arange(0, COUNT))
    else:
        o = start + tl.arange(0, COUNT)
        p_P = tl.load(p_row + PROJECTION).to(tl.pointer_type(tl.float32)) + index * width
        return tl.load(p_P + o, mask=o < width, other=0.0)


@triton.jit
def sum_of_four(x, ALONG_ROWS: tl.constexpr):
    """``x [channels, width]`` to a quarter of its width, adding what one thread holds: neighbours where the width is
    contiguous, entries a quarter of the tile apart where channels are."""
    if ALONG_ROWS:
        return tl.sum(x.reshape(x.shape[0], x.shape[1] // 4, 4), 2)
    else:
        return tl.sum(x.reshape(x.shape[0], 4, x.shape[1] // 4), 1)


@triton.jit
def projected(
    p_tile, m_channel, o_rank, first, last, width, width_stride, p_row, seed, epoch,
    RANK: tl.constexpr, PROJECTION_KIND: tl.constexpr, ALONG_ROWS: tl.constexpr, PARTS: tl.constexpr,
    NORMS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_RANK: tl.constexpr,
):  # fmt: skip
    """G P^T of the channels at ``p_tile``, ``[BLOCK_CHANNELS, 1]``, over widths ``first`` (a multiple of 128) to
    ``last``, and with NORMS |G_c|^2; ALONG_ROWS: widths are neighbours in memory. P is not yet scaled."""
    # In pairs: triton 3.2 takes no longer chains.
    BY_PRODUCT: tl.constexpr = (NORMS and RANK >= 16) and p_tile.dtype.element_ty != tl.float32
    R = tl.zeros([BLOCK_CHANNELS, BLOCK_RANK], tl.float32)
    squared_G = tl.zeros([BLOCK_CHANNELS], tl.float32)
    if RANK == 1:
        # Runs of four are added up in a thread's registers, and what is left across threads once, at the end.
        squares = tl.zeros([BLOCK_CHANNELS, BLOCK_WIDTH // 4], tl.float32)
        products = tl.zeros([BLOCK_CHANNELS, BLOCK_WIDTH // 4], tl.float32)
        for start in range(first, last, BLOCK_WIDTH):
            o_width = start + tl.arange(0, BLOCK_WIDTH)
            mask = m_channel[:, None] & (o_width < width)[None, :]
            G = tl.load(p_tile + o_width[None, :] * width_stride, mask=mask, other=0.0).to(tl.float32)
            P = row_of_P(p_row, seed, epoch, 0, start, width, PROJECTION_KIND, BLOCK_WIDTH)
            products += sum_of_four(G * P[None, :], ALONG_ROWS)
            if NORMS:
                squares += sum_of_four(G * G, ALONG_ROWS)
        squared_G = tl.sum(squares, 1)
        R = tl.sum(products, 1)[:, None]
    elif RANK < 16:
        for start in range(first, last, BLOCK_WIDTH):
            o_width = start + tl.arange(0, BLOCK_WIDTH)
            mask = m_channel[:, None] & (o_width < width)[None, :]
            G = tl.load(p_tile + o_width[None, :] * width_stride, mask=mask, other=0.0).to(tl.float32)
            if NORMS:
                squared_G += tl.sum(G * G, 1)
            for index in tl.static_range(RANK):
                P = row_of_P(p_row, seed, epoch, index, start, width, PROJECTION_KIND, BLOCK_WIDTH)
                R += tl.where(o_rank == index, tl.sum(G * P[None, :], 1)[:, None], 0.0)
    else:
        # Of half precision |G_c|^2 is the diagonal of G G^T, on tensor cores. Were it added up from G's elements,
        # Triton 3.6 and 3.7 would keep one tile of G too few on sm_90, and copy the next over one that a product still
        # reads: on an H100 a seventh of R was wrong at rank 256. Tensor cores cut off 1e-5 of a sum of 4096 squares.
        products = tl.zeros([BLOCK_CHANNELS, BLOCK_CHANNELS if BY_PRODUCT else 1], tl.float32)
        for start in range(first, last, BLOCK_WIDTH):
            o_width = start + tl.arange(0, BLOCK_WIDTH)
            m_width = o_width < width
            mask = m_channel[:, None] & m_width[None, :]
            G = tl.load(p_tile + o_width[None, :] * width_stride, mask=mask, other=0.0)
            if BY_PRODUCT:
                products = dot(G, tl.trans(G), products)
            elif NORMS:
                squared_G += tl.sum(G * G, 1)
            if PROJECTION_KIND == MATERIALISED:
                p_P = tl.multiple_of(tl.load(p_row + PROJECTION).to(tl.pointer_type(tl.bfloat16)), 16)
                padded = (width + 127) // 128 * 128
                # Padded with zeros along the width: a mask there would make the loads an entry wide.
                m_P = (o_rank < RANK)[None, :]
                P = tl.load(p_P + o_rank.to(tl.int64)[None, :] * padded + o_width[:, None], mask=m_P, other=0.0)
                R = product(G, P, R, PARTS)
            else:
                p_P = tl.load(p_row + PROJECTION).to(tl.pointer_type(tl.float32))
                m_P = m_width[:, None] & (o_rank < RANK)[None, :]
                P = tl.load(p_P + o_rank.to(tl.int64)[None, :] * width + o_width[:, None], mask=m_P, other=0.0)
                # Three bfloat16 parts of P as well: a float32 product with one operand from bfloat16 is rounded to TF32
                # on sm_100 by triton 3.7, input_precision="ieee" or not.
                if G.dtype == tl.float16:
                    G = G.to(tl.float32)
                for _ in range(3):
                    part = P.to(tl.bfloat16)
                    R = product(G, part, R, PARTS)
                    P -= part.to(tl.float32)
        if BY_PRODUCT:
            o = tl.arange(0, BLOCK_CHANNELS)
            squared_G = tl.sum(tl.where(o[:, None] == o[None, :], products, 0.0), 1)
    return R, squared_G


@triton.jit(do_not_specialize=["step", "update_proj_gap"])
def sketch_kernel(
    p_table, p_gradients, p_programs, p_projected, p_squared_norms, p_factors, p_sums, p_previous, p_gradient_scale,
    step, p_step, update_proj_gap, keep1, keep2, eps, entry_scale,
    RANK: tl.constexpr, GRADIENT: tl.constexpr, STATE: tl.constexpr, PROJECTION_KIND: tl.constexpr,
    KEEPS_ROWS: tl.constexpr, PER_CHANNEL: tl.constexpr, ALIGNED: tl.constexpr, PARTS: tl.constexpr,
    FUSED: tl.constexpr, SPLIT: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_RANK: tl.constexpr,
):  # fmt: skip
    """R = G P^T (rows kept) or (P G)^T (columns kept) of one program's channels, and |G_c|^2 (paper, algorithm 1).

    FUSED: goes on to the moments and the factors, and R is never stored. Else stores R ``[all channels, RANK]`` and
    |G_c|^2 ``[all channels]``, float32; there are then programs for every block of ranks, the first of which stores the
    norms, and program_id(1) is which of SPLIT parts of what a program of ``rescale`` owns.
    Reads 2 or 4 bytes a gradient's element, and P from the cache; FUSED reads and writes M and V as well.
    """
    # Blocks of ranks next to each other, so that those of one block of channels read G from memory once together.
    RANK_BLOCKS: tl.constexpr = (RANK + BLOCK_RANK - 1) // BLOCK_RANK
    program, rank_block = tl.program_id(0) // RANK_BLOCKS, tl.program_id(0) % RANK_BLOCKS
    matrix = tl.load(p_programs + program)
    p_row = p_table + matrix.to(tl.int64) * _FIELDS
    rows, columns = tl.load(p_row + ROWS), tl.load(p_row + COLUMNS)
    row_stride = tl.load(p_row + GRADIENT_ROW_STRIDE)
    p_G = tl.load(p_gradients + matrix).to(tl.pointer_type(GRADIENT))
    if ALIGNED:
        # An address from a table has lost its alignment, and loads would be an element wide.
        p_G = tl.multiple_of(p_G, 16)
        columns, row_stride = tl.multiple_of(columns, 8), tl.multiple_of(row_stride, 8)
        column_stride = 1
    else:
        column_stride = tl.load(p_row + GRADIENT_COLUMN_STRIDE)
    if KEEPS_ROWS:
        channels, width, channel_stride, width_stride = rows, columns, row_stride, column_stride
    else:
        channels, width, channel_stride, width_stride = columns, rows, column_stride, row_stride

    block = program - tl.load(p_row + FIRST_CHANNEL_PROGRAM)
    o_channel = (block * SPLIT + tl.program_id(1)) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    m_channel = o_channel < channels
    o_rank = rank_block * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
    t = current_step(step, p_step)
    epoch = (t - 1) // update_proj_gap
    seed = tl.load(p_row + SEED)
    p_tile = p_G + o_channel.to(tl.int64)[:, None] * channel_stride

    R, squared_G = projected(
        p_tile, m_channel, o_rank, 0, width, width, width_stride, p_row, seed, epoch,
        RANK, PROJECTION_KIND, KEEPS_ROWS, PARTS, True, BLOCK_CHANNELS, BLOCK_WIDTH, BLOCK_RANK,
    )  # fmt: skip
    R = R * entry_scale
    if FUSED:
        gradient_scale = 1.0
        if p_gradient_scale is not None:
            gradient_scale = tl.load(p_gradient_scale)
        R = R * gradient_scale
        squared_R = tl.sum(R * R, 1)
        channel = tl.load(p_row + ROUNDING_OFFSET)
        N = moved_moments(
            R, squared_R < float("inf"), p_row, channel, o_channel, o_rank, m_channel, t, keep1, keep2, eps,
            RANK, STATE, ALIGNED,
        )  # fmt: skip
        store_factors(
            tl.sum(N * N, 1), squared_R, squared_G, p_row, matrix, program, o_channel, m_channel,
            p_factors, p_sums, p_previous, gradient_scale, PER_CHANNEL,
        )  # fmt: skip
    else:
        o_R = tl.load(p_row + FIRST_CHANNEL) + o_channel
        m_R = m_channel[:, None] & (o_rank < RANK)[None, :]
        tl.store(p_projected + o_R[:, None] * RANK + o_rank[None, :], R, mask=m_R)
        if rank_block == 0:
            tl.store(p_squared_norms + o_R, squared_G, mask=m_channel)


def entry_scale(rank: int, kind: int) -> float:
    """What R is multiplied by: 1 / sqrt(rank) where the kernel's entries have unit variance, 1 for svd's."""
    return 1.0 if kind == SINGULAR_VECTORS.value else 1 / math.sqrt(rank)
