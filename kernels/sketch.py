"""sketch: G -> R [channels, rank] and |G_c|^2, reading G once. If R need not leave the program, rescale follows at
once.

A program owns a block of channels and walks along the whole width, so that programs need not add up their results.
Ranks below 16 multiply and accumulate, and P is made on the fly. From rank 16 on tensor cores make the product, and P
is read: 2 bytes an entry, from the second-level cache.
"""

import math

import triton
import triton.language as tl

from .philox import gaussian_row, sign_words, signs
from .rescale import moved_moments, store_factors
from .step import current_step
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

_IEEE = tl.constexpr("ieee")  # triton 3.6 does not accept a plain string as a default
# Where P comes from.
GAUSSIAN = tl.constexpr(0)  # made in this kernel; ranks below SMALL_RANK
RADEMACHER = tl.constexpr(1)  # the same. At rank 256 it would take 62 instructions an element; reading P takes 9
MATERIALISED = tl.constexpr(2)  # unit-variance bfloat16 in memory, rows padded to a multiple of 128 entries
SINGULAR_VECTORS = tl.constexpr(3)  # float32 in memory, rows of the width itself

SMALL_RANK = 16  # the least rank that fills a tensor-core tile
FUSED_RANK = 256  # the largest R that a program keeps in registers: 64 x 256 float32 are 64 registers a thread


def blocks(rank: int, needs_more_registers: bool = False) -> dict[str, int]:
    """Tile sizes and warps for a rank.

    ``needs_more_registers``: for float32 and for svd's P, which take several products, and for unaligned rows, in which
    each entry has its own address.

    BLOCK_CHANNELS must depend on the rank only. It decides how the limiter's partial sums are grouped, and so their
    last bit, and a matrix must be updated to the same bits alone and in a batch.

    From rank 16 on P is read from the second-level cache once for every BLOCK_CHANNELS channels. More would read it
    less often, but R and G G^T of 128 channels do not fit the registers. Measured on an H100, 1.2 G entries of
    bfloat16: rank 64 0.96 ms (128 x 64 tiles on 8 warps 1.38), rank 128 1.21 (8 warps 1.54, 128 x 128 tiles 1.25), rank
    256 2.08.
    """
    if rank < SMALL_RANK:
        # 64 channels share one row of normals: about 4 instructions for each element of the gradient.
        return {"BLOCK_CHANNELS": 64, "BLOCK_WIDTH": 128, "BLOCK_RANK": power_of_two(rank), "num_warps": 4}
    block_rank = min(power_of_two(rank), FUSED_RANK)
    return {
        "BLOCK_CHANNELS": 64,
        "BLOCK_WIDTH": 64 if needs_more_registers or block_rank > 64 else 128,
        "BLOCK_RANK": block_rank,
        "num_warps": 8 if block_rank > (32 if needs_more_registers else 128) else 4,
    }


def stages(rank: int) -> int:
    """How many tiles are in shared memory at a time, if there is much of it; a tile takes 40 KiB at rank 256. With 5
    tiles an H100 takes 2.08 ms, with 3 it takes 2.69."""
    return 5 if rank > 128 else 4 if rank > 64 else 3


@triton.jit
def product(G, P, R, PARTS: tl.constexpr):
    """R + G P for a tile of G ``[channels, width]`` and of P ``[width, rank]``, on tensor cores.

    P has at most 8 significant bits, which bfloat16 and float16 hold exactly, so a half-precision G needs one product.
    A float32 G is the exact sum of three bfloat16 parts (8 + 8 + 8 bits), and PARTS of them are multiplied: with
    torch.set_float32_matmul_precision "highest" 3, "high" 2, "medium" 1.
    """
    if G.dtype == tl.float32:
        # A loop. Unrolled, each product would take its own tensor memory on sm_100: 576 columns, and there are 512.
        for _ in range(PARTS):
            part = G.to(tl.bfloat16)
            R = dot(part, P.to(tl.bfloat16), R)
            G -= part.to(tl.float32)
        return R
    else:
        return dot(G, P.to(G.dtype), R)


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr = _IEEE):
    """accumulator + a b. ``PRECISION`` is for products of float32; those of half precision are always exact."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator)
    else:
        return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def row_of_P(p_row, seed, epoch, index, start, width, PROJECTION_KIND: tl.constexpr, COUNT: tl.constexpr):
    """COUNT entries of row ``index`` of P, from ``start`` on, float32: made here, or read from memory for svd."""
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
    """``x [channels, width]`` summed to a quarter of its width. The four terms of a sum belong to one thread:
    neighbours if the width is contiguous, entries a quarter of the tile apart if the channels are."""
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
    """R = G P^T of the channels at ``p_tile`` ``[BLOCK_CHANNELS, 1]``, over widths ``first`` (a multiple of 128) to
    ``last``, and with NORMS |G_c|^2. P is not yet scaled. ALONG_ROWS: widths are neighbours in memory."""
    # In pairs, because triton 3.2 accepts no longer chains.
    BY_PRODUCT: tl.constexpr = (NORMS and RANK >= 16) and p_tile.dtype.element_ty != tl.float32
    R = tl.zeros([BLOCK_CHANNELS, BLOCK_RANK], tl.float32)
    squared_G = tl.zeros([BLOCK_CHANNELS], tl.float32)
    if RANK == 1:
        # Runs of four are added in a thread's registers. The rest is added across threads once, at the end.
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
        # For half precision |G_c|^2 is the diagonal of G G^T, from tensor cores. If it were added up from G's elements,
        # Triton 3.6 and 3.7 would keep one tile of G too few on sm_90, and copy the next tile over one that a product
        # still reads: on an H100 a seventh of R was wrong at rank 256. Tensor cores cut off 1e-5 of a sum of 4096
        # squares.
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
                # P is padded with zeros along the width. A mask there would make each load one entry wide.
                m_P = (o_rank < RANK)[None, :]
                P = tl.load(p_P + o_rank.to(tl.int64)[None, :] * padded + o_width[:, None], mask=m_P, other=0.0)
                R = product(G, P, R, PARTS)
            else:
                p_P = tl.load(p_row + PROJECTION).to(tl.pointer_type(tl.float32))
                m_P = m_width[:, None] & (o_rank < RANK)[None, :]
                P = tl.load(p_P + o_rank.to(tl.int64)[None, :] * width + o_width[:, None], mask=m_P, other=0.0)
                # P is multiplied in three bfloat16 parts too. On sm_100 triton 3.7 rounds a float32 product to TF32 if
                # one operand was bfloat16, even with input_precision="ieee".
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

    FUSED: the program continues with the moments and the factors, and R is never stored. It reads and writes M and V.

    Otherwise R ``[all channels, RANK]`` and |G_c|^2 ``[all channels]`` are stored, in float32. There is then a program
    for each block of ranks, and that of the first block stores the norms. A program of ``rescale`` owns SPLIT times as
    many channels, and program_id(1) says which part of them this one has.

    Reads 2 or 4 bytes for each element of the gradient, and P from the cache.
    """
    # The programs of a block of channels, one for each block of ranks, are neighbours: they read G from memory once.
    RANK_BLOCKS: tl.constexpr = (RANK + BLOCK_RANK - 1) // BLOCK_RANK
    program, rank_block = tl.program_id(0) // RANK_BLOCKS, tl.program_id(0) % RANK_BLOCKS
    matrix = tl.load(p_programs + program)
    p_row = p_table + matrix.to(tl.int64) * FIELDS
    rows, columns = tl.load(p_row + ROWS), tl.load(p_row + COLUMNS)
    row_stride = tl.load(p_row + GRADIENT_ROW_STRIDE)
    p_G = tl.load(p_gradients + matrix).to(tl.pointer_type(GRADIENT))
    if ALIGNED:
        # Triton does not know the alignment of an address from a table. Without this, loads would be one element wide.
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
    """The factor of R: 1 / sqrt(rank) if the kernel's P has entries of unit variance, 1 for svd's P."""
    return 1.0 if kind == SINGULAR_VECTORS.value else 1 / math.sqrt(rank)
