"""rescale: R -> the moments in place, the factors s, and the sums that the limiter needs.

If all of a channel's R is in one program's registers, ``sketch_kernel`` ends with ``moved_moments`` and
``store_factors``. ``rescale_kernel`` does the same from an R in memory: for ranks above 256, for sketches that were
summed over devices, for those that wait for the norm of all gradients, and for those of a layer's operands.
"""

import triton
import triton.language as tl

from .philox import EXP_AVG as EXP_AVG_STREAM
from .philox import EXP_AVG_SQ as EXP_AVG_SQ_STREAM
from .philox import round_stochastic, rounding_bits, rounding_bits_by_row
from .step import current_step
from .table import (
    COLUMNS,
    EXP_AVG,
    EXP_AVG_SQ,
    FIELDS,
    FIRST_CHANNEL,
    FIRST_CHANNEL_PROGRAM,
    ROUNDING_OFFSET,
    ROWS,
    SEED,
    UPDATE_NORM,
)

NORM_EPS = tl.constexpr(1e-8)


@triton.jit
def part_of_rows(o_channel, m_channel, o_rank, RANK: tl.constexpr):
    """Offsets and mask of ``[channels, ranks]`` in R and in the moments, whose rows have RANK numbers."""
    return o_channel.to(tl.int64)[:, None] * RANK + o_rank[None, :], m_channel[:, None] & (o_rank < RANK)[None, :]


@triton.jit
def moved_moments(
    R, finite, p_row, channel, o_channel, o_rank, m_channel, step, keep1, keep2, eps,
    RANK: tl.constexpr, STATE: tl.constexpr, ALIGNED: tl.constexpr,
):  # fmt: skip
    """M <- b1 M + (1 - b1) R, V <- b2 V + (1 - b2) R^2 in place; returns N = M / (sqrt(V) + eps), ``R``'s shape.

    ``channel`` is the index of the matrix's first channel in the whole parameter, for the rounding bits. Channels that
    are not ``finite`` keep their moments. bfloat16 moments are rounded stochastically when they are stored; N is
    computed from the unrounded ones.
    """
    p_M = tl.load(p_row + EXP_AVG).to(tl.pointer_type(STATE))
    p_V = tl.load(p_row + EXP_AVG_SQ).to(tl.pointer_type(STATE))
    if ALIGNED:
        p_M, p_V = tl.multiple_of(p_M, 16), tl.multiple_of(p_V, 16)
    offsets, mask = part_of_rows(o_channel, m_channel, o_rank, RANK)
    M = tl.load(p_M + offsets, mask=mask, other=0.0).to(tl.float32)
    V = tl.load(p_V + offsets, mask=mask, other=0.0).to(tl.float32)
    M = tl.where(finite[:, None], M + keep1 * (R - M), M)
    V = tl.where(finite[:, None], V + keep2 * (R * R - V), V)
    if STATE == tl.bfloat16:
        seed = tl.load(p_row + SEED)
        if RANK % 8 == 0:
            first = (channel + tl.min(o_channel, 0)) * RANK + tl.min(o_rank, 0)
            bits_M = rounding_bits_by_row(seed, step, first, RANK, R.shape[0], R.shape[1], EXP_AVG_STREAM)
            bits_V = rounding_bits_by_row(seed, step, first, RANK, R.shape[0], R.shape[1], EXP_AVG_SQ_STREAM)
        else:
            index = channel * RANK + offsets
            bits_M = rounding_bits(seed, step, index, EXP_AVG_STREAM)
            bits_V = rounding_bits(seed, step, index, EXP_AVG_SQ_STREAM)
        tl.store(p_M + offsets, round_stochastic(M, bits_M), mask=mask)
        tl.store(p_V + offsets, round_stochastic(V, bits_V), mask=mask)
    else:
        tl.store(p_M + offsets, M, mask=mask)
        tl.store(p_V + offsets, V, mask=mask)
    return M / (tl.sqrt(V) + eps)


@triton.jit
def store_factors(
    squared_N, squared_R, squared_G, p_row, matrix, program, o_channel, m_channel,
    p_factors, p_sums, p_previous, gradient_scale, PER_CHANNEL: tl.constexpr,
):  # fmt: skip
    """Store s_c = |N_c| / (|R_c| + 1e-8) and the program's share of u^2. For one s per tensor store the program's
    shares of |N|^2, |R|^2 and |G|^2 instead.

    ``squared_G`` is of the unscaled gradient. It is multiplied by ``gradient_scale`` twice, because the square of that
    might underflow. The first program of a matrix copies u_prev to ``p_previous``, so that in ``apply`` one program may
    write u_prev while others read the copy.
    """
    squared_G = squared_G * gradient_scale * gradient_scale
    if PER_CHANNEL:
        s = tl.sqrt(squared_N) / (tl.sqrt(squared_R) + NORM_EPS)
        tl.store(p_factors + tl.load(p_row + FIRST_CHANNEL) + o_channel, s, mask=m_channel)
        store_sum(p_sums + program, s * s * squared_G)
    else:
        store_sum(p_sums + program * 3, squared_N)
        store_sum(p_sums + program * 3 + 1, squared_R)
        store_sum(p_sums + program * 3 + 2, squared_G)
    if program == tl.load(p_row + FIRST_CHANNEL_PROGRAM):
        tl.store(p_previous + matrix, tl.load(tl.load(p_row + UPDATE_NORM).to(tl.pointer_type(tl.float32))))


@triton.jit
def store_sum(p, values):
    """Store the sum of a vector, as a vector of one element. On sm_100 Triton 3.7 cannot compile a scalar sum of a
    tensor core's results ("parent layout must have at least rank >= 2")."""
    tl.store(p + tl.arange(0, 1), tl.sum(values[None, :], 1))


@triton.jit
def own_channels(p_table, p_programs, KEEPS_ROWS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr):
    """The program's matrix, the address of its row of the table, how many channels it has, and the index of the
    program's block of them."""
    program = tl.program_id(0)
    matrix = tl.load(p_programs + program)
    p_row = p_table + matrix.to(tl.int64) * FIELDS
    channels = tl.load(p_row + ROWS) if KEEPS_ROWS else tl.load(p_row + COLUMNS)
    return matrix, p_row, channels, program - tl.load(p_row + FIRST_CHANNEL_PROGRAM)


@triton.jit
def squared_sketch(p_R, o_channel, m_channel, gradient_scale, RANK: tl.constexpr, BLOCK_RANK: tl.constexpr):
    """|R_c|^2 of a block of channels."""
    squared_R = tl.zeros([o_channel.shape[0]], tl.float32)
    for start in range(0, RANK, BLOCK_RANK):
        offsets, mask = part_of_rows(o_channel, m_channel, start + tl.arange(0, BLOCK_RANK), RANK)
        R = tl.load(p_R + offsets, mask=mask, other=0.0) * gradient_scale
        squared_R += tl.sum(R * R, 1)
    return squared_R


@triton.jit(do_not_specialize=["step"])
def rescale_kernel(
    p_table, p_programs, p_projected, p_squared_norms, p_factors, p_sums, p_previous, p_gradient_scale,
    step, p_step, keep1, keep2, eps,
    RANK: tl.constexpr, STATE: tl.constexpr, KEEPS_ROWS: tl.constexpr, PER_CHANNEL: tl.constexpr,
    ALIGNED: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_RANK: tl.constexpr,
):  # fmt: skip
    """Moments and factors of one program's channels, from R ``[all channels, RANK]``, float32 in memory.

    Reads R twice and |G_c|^2 once; reads and writes M and V. Source: arXiv 2412.05270, algorithm 1.
    """
    matrix, p_row, channels, block = own_channels(p_table, p_programs, KEEPS_ROWS, BLOCK_CHANNELS)
    o_channel = block * BLOCK_CHANNELS + tl.arange(0, BLOCK_CHANNELS)
    m_channel = o_channel < channels
    first = tl.load(p_row + FIRST_CHANNEL)
    p_R = p_projected + first * RANK
    gradient_scale = 1.0
    if p_gradient_scale is not None:
        gradient_scale = tl.load(p_gradient_scale)
    t = current_step(step, p_step)

    squared_R = squared_sketch(p_R, o_channel, m_channel, gradient_scale, RANK, BLOCK_RANK)
    finite = squared_R < float("inf")
    squared_N = tl.zeros([BLOCK_CHANNELS], tl.float32)
    channel = tl.load(p_row + ROUNDING_OFFSET)
    for start in range(0, RANK, BLOCK_RANK):
        o_rank = start + tl.arange(0, BLOCK_RANK)
        offsets, mask = part_of_rows(o_channel, m_channel, o_rank, RANK)
        R = tl.load(p_R + offsets, mask=mask, other=0.0) * gradient_scale
        N = moved_moments(
            R, finite, p_row, channel, o_channel, o_rank, m_channel, t, keep1, keep2, eps, RANK, STATE, ALIGNED
        )
        squared_N += tl.sum(N * N, 1)
    squared_G = tl.load(p_squared_norms + first + o_channel, mask=m_channel, other=0.0)
    store_factors(
        squared_N, squared_R, squared_G, p_row, matrix, tl.program_id(0), o_channel, m_channel,
        p_factors, p_sums, p_previous, gradient_scale, PER_CHANNEL,
    )  # fmt: skip
