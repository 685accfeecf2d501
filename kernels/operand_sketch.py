"""sketch from a linear layer's operands X and dY: R and |G_c|^2 of G = dY^T X, which is not formed.

    rows kept      kept dY [tokens, out], summed X [tokens, in]        columns kept   kept X, summed dY
    S = summed P^T [tokens, rank]        R = kept^T S [channels, rank]
    |G_c|^2 from tiles of G, or from the Gram matrix K = summed summed^T [tokens, tokens]: kept_c^T K kept_c

S and K are float32. If the operands are bfloat16, they are multiplied by bfloat16 parts of S and K. S has two parts, 16
bits: with one part, 8 bits, the error of R would be larger than that of a G rounded to bfloat16, where tokens cancel. K
has all three parts, because its terms may be a thousand times a norm. If a sum is split over programs, its parts are
stored side by side and added in order, without atomics.
"""

from functools import lru_cache

import triton
import triton.language as tl

from .linear import tile_place
from .operands import gradient_tile
from .projected import NOT_AT_ALL, dot, projected_at_rank_1, projected_by_product
from .step import current_step
from .table import SEED, power_of_two

_ENOUGH = 256  # programs, two for each multiprocessor of an H100


@lru_cache(maxsize=1024)
def parts(programs: int, length: int, least: int) -> tuple[int, int]:
    """How many parts a sum of ``length`` terms is split into, and the length of a part, a multiple of ``least``. There
    are enough parts to fill a GPU with programs, but at most 8, and a part has about 4 * ``least`` terms or more."""
    wanted = min(8, -(-_ENOUGH // max(1, programs)), -(-length // (4 * least)))
    part = -(-length // (max(1, wanted) * least)) * least
    return -(-length // part) if length else 1, part


@lru_cache(maxsize=1024)
def collect_blocks(rank: int, tensor_cores: bool) -> dict[str, int]:
    """Tile sizes and warps of R = kept^T S. 32 tokens of S and of the operand take 24 KiB a stage."""
    if not tensor_cores:
        block_rank = min(max(16, power_of_two(rank)), 64)
        return {"BLOCK_CHANNELS": 64, "BLOCK_RANK": block_rank, "BLOCK_TOKENS": 16, "num_warps": 4, "num_stages": 2}
    block_rank = min(max(16, power_of_two(rank)), 128)
    return {
        "BLOCK_CHANNELS": 128,
        "BLOCK_RANK": block_rank,
        "BLOCK_TOKENS": 32,
        "num_warps": 8 if block_rank > 64 else 4,
        "num_stages": 3,
    }


def gram_blocks(tensor_cores: bool) -> dict[str, int]:
    """Tile sizes and warps of K. Tiles are 64 x 64; 256 tokens have ten of them on and below the diagonal."""
    return {"BLOCK_TOKENS": 64, "BLOCK_WIDTH": 64 if tensor_cores else 16, "num_warps": 4, "num_stages": 3}


def gram_is_cheaper(tokens: int, channels: int, width: int, in_parts: bool) -> bool:
    """Whether the norms are cheaper from K than from tiles of G.

    K takes the products of half of K, and of kept^T K, which has three bfloat16 parts if the operands are bfloat16. It
    must take less than a quarter of G's products: on an H100 this way makes half as many products a second, and it
    takes one launch more.
    """
    return 4 * tokens * (width / 2 + channels * (3 if in_parts else 1)) < channels * width


@triton.jit
def transposed_product(
    p_kept, p_S, o_channel, o_rank, first, last, channels, RANK,
    PARTS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_RANK: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """kept^T S ``[BLOCK_CHANNELS, BLOCK_RANK]`` over tokens ``first`` to ``last``. S ``[tokens, RANK]`` is float32."""
    m_channel, m_rank = (o_channel < channels)[None, :], (o_rank < RANK)[None, :]
    sums = tl.zeros([BLOCK_CHANNELS, BLOCK_RANK], tl.float32)
    for start in range(first, last, BLOCK_TOKENS):
        o_token = (start + tl.arange(0, BLOCK_TOKENS)).to(tl.int64)[:, None]
        m_token = o_token < last
        kept = tl.load(p_kept + o_token * channels + o_channel[None, :], mask=m_token & m_channel, other=0.0)
        S = tl.load(p_S + o_token * RANK + o_rank[None, :], mask=m_token & m_rank, other=0.0)
        if kept.dtype == tl.bfloat16:
            # Unrolled, because Triton pipelines only the loads of innermost loops.
            for _ in tl.static_range(PARTS):
                part = S.to(tl.bfloat16)
                sums = dot(tl.trans(kept), part, sums)
                S -= part.to(tl.float32)
        else:
            sums = dot(tl.trans(kept).to(tl.float32), S, sums, PRECISION)
    return sums


@triton.jit(do_not_specialize=["tokens", "step", "update_proj_gap"])
def project_kernel(
    p_row, p_summed, p_S, tokens, width, part, step, p_step, update_proj_gap,
    RANK: tl.constexpr, PROJECTION_KIND: tl.constexpr, PARTS: tl.constexpr, UNROLLED: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_RANK: tl.constexpr,
):  # fmt: skip
    """S = summed P^T ``[parts, tokens, RANK]`` of BLOCK_CHANNELS tokens, over ``part`` widths. P is not yet scaled.

    program_id(1) is the block of ranks, program_id(2) the part. ``p_row`` is the matrix's row of its table. Reads the
    operand once, and P from the cache, as ``sketch_kernel`` reads G.
    """
    o_token = tl.program_id(0).to(tl.int64) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    o_rank = tl.program_id(1) * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
    m_token = o_token < tokens
    first = tl.program_id(2) * part
    last = tl.minimum(first + part, width)
    p_tile = p_summed + o_token[:, None] * width
    if RANK == 1:
        epoch = (current_step(step, p_step) - 1) // update_proj_gap
        S, _ = projected_at_rank_1(
            p_tile, m_token, first, last, width, 1, p_row, tl.load(p_row + SEED), epoch,
            PROJECTION_KIND, True, False, BLOCK_CHANNELS, BLOCK_WIDTH,
        )  # fmt: skip
    else:
        S, _ = projected_by_product(
            p_tile, m_token, o_rank, first, last, width, 1, p_row,
            RANK, PROJECTION_KIND, PARTS, UNROLLED, NOT_AT_ALL, BLOCK_CHANNELS, BLOCK_WIDTH, BLOCK_RANK,
        )  # fmt: skip
    p_S += (tl.program_id(2).to(tl.int64) * tokens + o_token[:, None]) * RANK + o_rank[None, :]
    tl.store(p_S, S, mask=m_token[:, None] & (o_rank < RANK)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def collect_kernel(
    p_kept, p_S, p_R, tokens, channels, part, entry_scale, RANK: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_RANK: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """R = kept^T S ``[parts, channels, RANK]``, float32, over ``part`` tokens, times P's scale. program_id(1) is the
    block of ranks, program_id(2) the part. Reads the operand once for every BLOCK_RANK ranks."""
    o_channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    o_rank = tl.program_id(1) * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
    first = tl.program_id(2) * part
    R = transposed_product(
        p_kept, p_S, o_channel, o_rank, first, tl.minimum(first + part, tokens), channels, RANK,
        2, PRECISION, BLOCK_CHANNELS, BLOCK_RANK, BLOCK_TOKENS,
    )  # fmt: skip
    p_R += (tl.program_id(2).to(tl.int64) * channels + o_channel[:, None]) * RANK + o_rank[None, :]
    tl.store(p_R, R * entry_scale, mask=(o_channel < channels)[:, None] & (o_rank < RANK)[None, :])


@triton.jit(do_not_specialize=["tokens"])
def tile_norms_kernel(
    p_X, p_dY, p_norms, rows, columns, tokens, KEEPS_ROWS: tl.constexpr, PRECISION: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """One tile's share of |G_c|^2, float32 ``[tiles along the width, channels]``. Reads the operands as
    ``apply_operands_kernel`` does."""
    first_row, first_column = tile_place(rows, columns, BLOCK_ROWS, BLOCK_COLUMNS)
    o_row = first_row + tl.arange(0, BLOCK_ROWS)
    o_column = first_column + tl.arange(0, BLOCK_COLUMNS)
    G = gradient_tile(
        p_X, p_dY, o_row, o_column, rows, columns, tokens, PRECISION, BLOCK_ROWS, BLOCK_COLUMNS, BLOCK_TOKENS
    )
    if KEEPS_ROWS:
        p_norms += first_column // BLOCK_COLUMNS * rows + o_row
        tl.store(p_norms, tl.sum(G * G, 1), mask=o_row < rows)
    else:
        p_norms += first_row // BLOCK_ROWS * columns + o_column
        tl.store(p_norms, tl.sum(G * G, 0), mask=o_column < columns)


@triton.jit(do_not_specialize=["tokens"])
def gram_kernel(
    p_summed, p_K, tokens, row_length, width, part,
    PRECISION: tl.constexpr, BLOCK_TOKENS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """A tile of K = summed summed^T, float32 ``[parts, tokens, row_length]``, over ``part`` widths, and its mirror
    image.

    program_id(2) is the part. Programs above the diagonal do nothing. Rows are padded with zeros to whole tiles, so
    that they are aligned.
    """
    block, other = tl.program_id(0), tl.program_id(1)
    if other <= block:
        o_token = block.to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        o_other = other.to(tl.int64) * BLOCK_TOKENS + tl.arange(0, BLOCK_TOKENS)
        m_token, m_other = o_token < tokens, o_other < tokens
        K = tl.zeros([BLOCK_TOKENS, BLOCK_TOKENS], tl.float32)
        p_token, p_other = p_summed + o_token[:, None] * width, p_summed + o_other[:, None] * width
        first = tl.program_id(2) * part
        for start in range(first, tl.minimum(first + part, width), BLOCK_WIDTH):
            o_width = (start + tl.arange(0, BLOCK_WIDTH))[None, :]
            m_width = o_width < width
            X = tl.load(p_token + o_width, mask=m_token[:, None] & m_width, other=0.0)
            Z = tl.load(p_other + o_width, mask=m_other[:, None] & m_width, other=0.0)
            K = dot(X, tl.trans(Z), K, PRECISION)
        p_K += tl.program_id(2).to(tl.int64) * tokens * row_length
        tl.store(p_K + o_token[:, None] * row_length + o_other[None, :], K, mask=m_token[:, None])
        if other < block:
            tl.store(p_K + o_other[None, :] * row_length + o_token[:, None], K)


@triton.jit(do_not_specialize=["tokens"])
def gram_norms_kernel(
    p_kept, p_K, p_norms, tokens, row_length, channels, PRECISION: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_RANK: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
):  # fmt: skip
    """The share of BLOCK_RANK tokens in |G_c|^2 = sum_t (kept^T K)[c, t] kept[t, c], float32
    ``[blocks of tokens, channels]``. program_id(1) is the block of tokens."""
    o_channel = tl.program_id(0) * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    o_token = tl.program_id(1) * BLOCK_RANK + tl.arange(0, BLOCK_RANK)
    m_channel = o_channel < channels
    sums = transposed_product(
        p_kept, p_K, o_channel, o_token, 0, tokens, channels, row_length,
        3, PRECISION, BLOCK_CHANNELS, BLOCK_RANK, BLOCK_TOKENS,
    )  # fmt: skip
    mask = m_channel[:, None] & (o_token < tokens)[None, :]
    kept = tl.load(p_kept + o_token.to(tl.int64)[None, :] * channels + o_channel[:, None], mask=mask, other=0.0)
    p_norms += tl.program_id(1).to(tl.int64) * channels + o_channel
    tl.store(p_norms, tl.sum(sums * kept.to(tl.float32), 1), mask=m_channel)
