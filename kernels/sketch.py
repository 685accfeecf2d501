"""sketch: G -> R [channels, rank] and |G_c|^2, reading G once. If R need not leave the program, rescale follows at
once.

A program owns a block of channels, or two. ``projected.py`` has its loop over the width.
"""

import math

import triton
import triton.language as tl

from .projected import (
    SINGULAR_VECTORS,
    projected_at_rank_1,
    projected_by_product,
    projected_in_halves,
)
from .rescale import moved_moments, store_factors
from .step import current_step
from .table import (
    COLUMNS,
    EXP_AVG,
    EXP_AVG_SQ,
    FIELDS,
    FIRST_CHANNEL,
    FIRST_CHANNEL_PROGRAM,
    GRADIENT_COLUMN_STRIDE,
    GRADIENT_ROW_STRIDE,
    INTERPRETED,
    ROUNDING_OFFSET,
    ROWS,
    SEED,
    power_of_two,
)

FUSED_RANK = 256  # the largest R that a program keeps in registers: 64 x 256 float32 are 64 registers a thread


def blocks(rank: int, needs_more_registers: bool = False) -> dict[str, int]:
    """Tile sizes and warps for a rank.

    ``needs_more_registers``: for float32 and for svd's P, which take several products, and for unaligned rows, in which
    each entry has its own address.

    BLOCK_CHANNELS must depend on the rank only. It decides how the limiter's partial sums are grouped, and so their
    last bit, and a matrix must be updated to the same bits alone and in a batch.

    From rank 2 on P is read from the second-level cache once for every BLOCK_CHANNELS channels, or with HALVES once for
    twice as many. As one tile, R and G G^T of 128 channels do not fit the registers. Measured on an H100, 1.2 G entries
    of bfloat16: rank 64 0.96 ms (128 x 64 tiles on 8 warps 1.38), rank 128 1.21 (8 warps 1.54, 128 x 128 tiles 1.25),
    rank 256 2.08.
    """
    if rank == 1:
        # 64 channels share one row of normals: about 4 instructions for each element of the gradient.
        return {"BLOCK_CHANNELS": 64, "BLOCK_WIDTH": 128, "BLOCK_RANK": 1, "num_warps": 4}
    block_rank = min(max(16, power_of_two(rank)), FUSED_RANK)  # 16 fill a tensor core's tile
    return {
        "BLOCK_CHANNELS": 64,
        "BLOCK_WIDTH": 64 if needs_more_registers or block_rank > 64 else 128,
        "BLOCK_RANK": block_rank,
        "num_warps": 8 if block_rank > (32 if needs_more_registers else 128) else 4,
    }


def unrolls(block_rank: int, reads_svd: bool, has_asynchronous_products: bool, has_tensor_memory: bool) -> bool:
    """Whether the products with the parts of a float32 G, or of svd's P, are unrolled: see ``projected.product``.

    On sm_90 always. In a loop their left operand, in registers, would be written while a product reads it. On sm_100
    each product takes its own tensor memory: up to rank 128 they take at most the 512 columns that there are, at rank
    256 544. Elsewhere (sm_80) from rank 64 on every warp would convert all parts again: at rank 128 82 instructions an
    element instead of 25.
    """
    most = 32
    if has_asynchronous_products and not has_tensor_memory:
        most = FUSED_RANK
    elif has_tensor_memory and not reads_svd:
        most = 128
    return block_rank <= most


def stages(rank: int, tile: int) -> int:
    """How many tiles of ``tile`` bytes are in shared memory at a time, if there is much of it. With 5 tiles an H100
    takes 2.08 ms at rank 256, with 3 it takes 2.69."""
    return min(5 if rank > 128 else 4 if rank > 64 else 3, (200 << 10) // tile)


def programs_at_a_time(rank: int) -> int:
    """How many blocks of channels a program may take: the number that a matrix has is a multiple of it."""
    return 2 if rank > 128 else 1


@triton.jit(do_not_specialize=["step", "update_proj_gap"])
def sketch_kernel(
    p_table, p_gradients, p_programs, p_projected, p_squared_norms, p_factors, p_sums, p_previous, p_gradient_scale,
    step, p_step, update_proj_gap, keep1, keep2, eps, entry_scale,
    RANK: tl.constexpr, GRADIENT: tl.constexpr, STATE: tl.constexpr, PROJECTION_KIND: tl.constexpr,
    KEEPS_ROWS: tl.constexpr, PER_CHANNEL: tl.constexpr, ALIGNED: tl.constexpr, PARTS: tl.constexpr,
    UNROLLED: tl.constexpr, NORMS: tl.constexpr, FUSED: tl.constexpr, SPLIT: tl.constexpr, HALVES: tl.constexpr,
    PREFETCH: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_RANK: tl.constexpr,
):  # fmt: skip
    """R = G P^T (rows kept) or (P G)^T (columns kept) of one program's channels, and |G_c|^2 (paper, algorithm 1).

    FUSED: the program continues with the moments and the factors, and R is never stored. It reads and writes M and V.

    Otherwise R ``[all channels, RANK]`` and |G_c|^2 ``[all channels]`` are stored, in float32. There is then a program
    for each block of ranks, and that of the first block stores the norms. A program of ``rescale`` owns SPLIT blocks of
    channels of this kernel. HALVES: a program has two blocks of channels, one after the other. PREFETCH: it fetches the
    moments of the second while it is at those of the first.

    Reads 2 or 4 bytes for each element of the gradient, and P from the cache.
    """
    # The programs of a block of channels, one for each block of ranks, are neighbours: they read G from memory once.
    RANK_BLOCKS: tl.constexpr = (RANK + BLOCK_RANK - 1) // BLOCK_RANK
    block, rank_block = tl.program_id(0) // RANK_BLOCKS, tl.program_id(0) % RANK_BLOCKS
    if HALVES:
        block *= 2
    program = block // SPLIT
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

    first = (block - tl.load(p_row + FIRST_CHANNEL_PROGRAM) * SPLIT) * BLOCK_CHANNELS
    o_channel = first + tl.arange(0, BLOCK_CHANNELS)
    m_channel = o_channel < channels
    o_rank = rank_block * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
    t = current_step(step, p_step)
    p_tile = p_G + o_channel.to(tl.int64)[:, None] * channel_stride
    if HALVES:
        o_other = o_channel + BLOCK_CHANNELS
        m_other = o_other < channels
        R, squared_G, other_R, other_squared_G = projected_in_halves(
            p_tile, p_tile + BLOCK_CHANNELS * channel_stride, m_channel, m_other, o_rank, width, width_stride, p_row,
            RANK, BLOCK_CHANNELS, BLOCK_WIDTH, BLOCK_RANK,
        )  # fmt: skip
    elif RANK == 1:
        epoch = (t - 1) // update_proj_gap
        R, squared_G = projected_at_rank_1(
            p_tile, m_channel, 0, width, width, width_stride, p_row, tl.load(p_row + SEED), epoch,
            PROJECTION_KIND, KEEPS_ROWS, True, BLOCK_CHANNELS, BLOCK_WIDTH,
        )  # fmt: skip
    else:
        R, squared_G = projected_by_product(
            p_tile, m_channel, o_rank, 0, width, width, width_stride, p_row,
            RANK, PROJECTION_KIND, PARTS, UNROLLED, NORMS, BLOCK_CHANNELS, BLOCK_WIDTH, BLOCK_RANK,
        )  # fmt: skip
    if FUSED and PREFETCH:
        prefetch_moments(p_row, first + BLOCK_CHANNELS, channels, RANK, STATE, BLOCK_CHANNELS, BLOCK_RANK)
    finish(
        R, squared_G, p_row, matrix, program, rank_block, o_channel, m_channel, o_rank,
        p_projected, p_squared_norms, p_factors, p_sums, p_previous, p_gradient_scale,
        t, keep1, keep2, eps, entry_scale, RANK, STATE, PER_CHANNEL, ALIGNED, FUSED,
    )  # fmt: skip
    if HALVES:
        finish(
            other_R, other_squared_G, p_row, matrix, program + 1, rank_block, o_other, m_other, o_rank,
            p_projected, p_squared_norms, p_factors, p_sums, p_previous, p_gradient_scale,
            t, keep1, keep2, eps, entry_scale, RANK, STATE, PER_CHANNEL, ALIGNED, FUSED,
        )  # fmt: skip


@triton.jit
def prefetch_moments(
    p_row, first, channels, RANK: tl.constexpr, STATE: tl.constexpr, BLOCK_CHANNELS: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
):  # fmt: skip
    """Fetch M and V of BLOCK_CHANNELS channels from ``first`` on into the second-level cache, 128 bytes a line."""
    if not INTERPRETED:
        SIZE: tl.constexpr = 2 if STATE == tl.bfloat16 else 4
        size = tl.minimum(channels - first, BLOCK_CHANNELS) * (RANK * SIZE)
        if size > 0:
            o_line = tl.arange(0, BLOCK_CHANNELS * BLOCK_RANK * SIZE // 128).to(tl.int64) * 128
            offsets = first.to(tl.int64) * (RANK * SIZE) + tl.minimum(o_line, size - 1)
            tl.inline_asm_elementwise(
                "prefetch.global.L2 [$1]; prefetch.global.L2 [$2]; mov.u32 $0, 0;", "=r,l,l",
                [tl.load(p_row + EXP_AVG) + offsets, tl.load(p_row + EXP_AVG_SQ) + offsets],
                dtype=tl.int32, is_pure=False, pack=1,
            )  # fmt: skip


@triton.jit
def finish(
    R, squared_G, p_row, matrix, program, rank_block, o_channel, m_channel, o_rank,
    p_projected, p_squared_norms, p_factors, p_sums, p_previous, p_gradient_scale,
    t, keep1, keep2, eps, entry_scale,
    RANK: tl.constexpr, STATE: tl.constexpr, PER_CHANNEL: tl.constexpr, ALIGNED: tl.constexpr, FUSED: tl.constexpr,
):  # fmt: skip
    """What a block of channels does with its R: moments and factors if FUSED, else it stores R and the norms."""
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
