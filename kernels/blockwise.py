"""rescale for 8-bit moments in bitsandbytes' blockwise format, with the same bits as ``core/moments_8bit.py``.

A block of 256 moments may end within a channel. A program therefore owns as many channels as fill whole blocks, and
makes two passes over them: channel by channel for the factors, then block by block to store the moments.

``p_code`` is the address of ``code_and_thresholds``: 2 KiB, which stay in cache.
"""

import triton
import triton.language as tl

from .rescale import own_channels, part_of_rows, squared_sketch, store_factors
from .table import EXP_AVG, EXP_AVG_SQ, FIRST_CHANNEL

BLOCK = tl.constexpr(256)
_BLOCKS_AT_ONCE = tl.constexpr(4)
_LEAST_NORMAL = tl.constexpr(2.0**-126)


@triton.jit
def dequantized(p_q, p_absmax, p_code, offsets, mask):
    """The float32 values at ``offsets`` from the start of the tensor, and 0 where ``mask`` is false."""
    entry = tl.load(p_code + tl.load(p_q + offsets, mask=mask, other=0).to(tl.int32))
    return entry * tl.load(p_absmax + offsets // BLOCK, mask=mask, other=0.0)


@triton.jit
def magnitudes(values):
    """|x|, and infinity for NaN, so that the maximum of a block is its absmax. ``tl.max`` alone would ignore NaN."""
    return tl.where(tl.abs(values) < float("inf"), tl.abs(values), float("inf"))


@triton.jit
def quantized(values, absmax, p_code):
    """uint8 indices of float32 ``values``. ``absmax`` broadcasts to them: a scalar, or one value for each block.

    Eight steps of a binary search count the thresholds below x. They decide ties too: a search among the entries needs
    a comparison with the middle of two at its end, and took a seventh more instructions.
    """
    is_normal = (absmax >= _LEAST_NORMAL) & (absmax < float("inf"))
    # div_rn rounds as PyTorch does; a plain division is approximate on NVIDIA. The products below are not added to
    # anything, so the compiler cannot fuse them.
    scale = tl.div_rn(1.0, tl.where(is_normal, absmax, 1.0))
    x = tl.where(is_normal, values, 0.0) * scale
    index = tl.zeros(x.shape, tl.int32)
    for step in tl.static_range(8):
        ahead = index + (128 >> step)
        index = tl.where(tl.load(p_code + (BLOCK - 1) + ahead) < x, ahead, index)
    return index.to(tl.uint8)


@triton.jit
def moved(values, R, keep, moves):
    """M + (1 - b1) (R - M) where ``moves`` is true, in finite channels, else M. Also for V, with R^2 in place of R."""
    return tl.where(moves, values + keep * (R - values), values)


@triton.jit
def store_moment(p_q, p_absmax, p_code, offsets, mask, values, moves):
    """Write float32 ``values [blocks, 256]``. Blocks in which nothing ``moves`` keep their bits. Otherwise a value of
    -absmax, which is no entry of the table, would shrink at each rounding."""
    absmax = tl.max(tl.where(mask, magnitudes(values), 0.0), 1)
    m_block = tl.max(tl.where(mask & moves, 1, 0), 1) > 0
    o_block = tl.min(offsets, 1) // BLOCK
    tl.store(p_absmax + o_block, absmax, mask=m_block)
    tl.store(p_q + offsets, quantized(values, absmax[:, None], p_code), mask=mask & m_block[:, None])


@triton.jit
def rescale_blockwise_kernel(
    p_table, p_absmax, p_programs, p_code, p_code_sq, p_projected, p_squared_norms, p_squared_R, p_factors, p_sums,
    p_previous, p_gradient_scale, keep1, keep2, eps,
    RANK: tl.constexpr, KEEPS_ROWS: tl.constexpr, PER_CHANNEL: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_RANK: tl.constexpr,
):  # fmt: skip
    """Moments and factors of one program's channels, from R ``[all channels, RANK]``, float32 in memory.

    ``p_absmax`` int64 ``[matrices, 2]`` has the addresses of the absmaxes of M and of V. ``p_squared_R`` float32
    ``[all channels]`` is scratch. Reads R three times; reads q twice and writes it once, one byte a moment.
    """
    matrix, p_row, channels, block = own_channels(p_table, p_programs, KEEPS_ROWS, BLOCK_CHANNELS)
    p_M = tl.load(p_row + EXP_AVG).to(tl.pointer_type(tl.uint8))
    p_V = tl.load(p_row + EXP_AVG_SQ).to(tl.pointer_type(tl.uint8))
    if ALIGNED:
        p_M, p_V = tl.multiple_of(p_M, 16), tl.multiple_of(p_V, 16)
    p_absmax_M = tl.load(p_absmax + matrix * 2).to(tl.pointer_type(tl.float32))
    p_absmax_V = tl.load(p_absmax + matrix * 2 + 1).to(tl.pointer_type(tl.float32))
    o_channel = block * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    m_channel = o_channel < channels
    first = tl.load(p_row + FIRST_CHANNEL)
    p_R = p_projected + first * RANK
    p_squared_R += first
    gradient_scale = 1.0
    if p_gradient_scale is not None:
        gradient_scale = tl.load(p_gradient_scale)

    squared_R = squared_sketch(p_R, o_channel, m_channel, gradient_scale, RANK, BLOCK_RANK)
    finite = (squared_R < float("inf"))[:, None]
    squared_N = tl.zeros([BLOCK_CHANNELS], tl.float32)
    for start in range(0, RANK, BLOCK_RANK):
        offsets, mask = part_of_rows(o_channel, m_channel, start + tl.arange(0, BLOCK_RANK), RANK)
        R = tl.load(p_R + offsets, mask=mask, other=0.0) * gradient_scale
        M = moved(dequantized(p_M, p_absmax_M, p_code, offsets, mask), R, keep1, finite)
        V = moved(dequantized(p_V, p_absmax_V, p_code_sq, offsets, mask), R * R, keep2, finite)
        N = M / (tl.sqrt(V) + eps)
        squared_N += tl.sum(N * N, 1)
    tl.store(p_squared_R + o_channel, squared_R, mask=m_channel)
    squared_G = tl.load(p_squared_norms + first + o_channel, mask=m_channel, other=0.0)
    store_factors(
        squared_N, squared_R, squared_G, p_row, matrix, tl.program_id(0), o_channel, m_channel,
        p_factors, p_sums, p_previous, gradient_scale, PER_CHANNEL,
    )  # fmt: skip

    tl.debug_barrier()  # all threads have read what is written next, and all see |R_c|^2
    first_element = block.to(tl.int64) * (BLOCK_CHANNELS * RANK)
    end = tl.minimum(channels.to(tl.int64) * RANK, first_element + BLOCK_CHANNELS * RANK)
    o_in_blocks = tl.arange(0, _BLOCKS_AT_ONCE)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    for start in range(0, BLOCK_CHANNELS * RANK, _BLOCKS_AT_ONCE * BLOCK):
        offsets = first_element + start + o_in_blocks
        mask = offsets < end
        R = tl.load(p_R + offsets, mask=mask, other=0.0) * gradient_scale
        moves = tl.load(p_squared_R + offsets // RANK, mask=mask, other=0.0) < float("inf")
        M = moved(dequantized(p_M, p_absmax_M, p_code, offsets, mask), R, keep1, moves)
        V = moved(dequantized(p_V, p_absmax_V, p_code_sq, offsets, mask), R * R, keep2, moves)
        store_moment(p_M, p_absmax_M, p_code, offsets, mask, M, moves)
        store_moment(p_V, p_absmax_V, p_code_sq, offsets, mask, V, moves)
