"""R = G P^T and |G_c|^2 of one program's channels, in registers: at rank 1, from rank 2 on, and for twice as many
channels. The program walks along the whole width, so that programs need not add up their results.

At rank 1 it multiplies and adds up, and P is made on the fly. From rank 2 on tensor cores make the product, and P is
read: 2 bytes an entry, from the second-level cache.
"""

import triton
import triton.language as tl

from .philox import gaussian_row, sign_words, signs
from .table import INTERPRETED, PROJECTION

_IEEE = tl.constexpr("ieee")  # triton 3.6 does not accept a plain string as a default

# Where P comes from.
GAUSSIAN = tl.constexpr(0)  # made in this kernel, at rank 1
RADEMACHER = tl.constexpr(1)  # the same
# In memory, of unit variance: float16 for a float16 G, else bfloat16. Rows are padded with zeros.
MATERIALISED = tl.constexpr(2)
SINGULAR_VECTORS = tl.constexpr(3)  # float32 in memory, rows of the width itself

ROW_MULTIPLE = tl.constexpr(128)  # rows are padded to a multiple of it, the width of the widest tile

# How |G_c|^2 is computed.
NOT_AT_ALL = tl.constexpr(0)
BY_SUM = tl.constexpr(1)  # of G's squares
BY_PRODUCT = tl.constexpr(2)  # as the diagonal of G G^T, from tensor cores


@triton.jit
def dot(a, b, accumulator, PRECISION: tl.constexpr = _IEEE):
    """accumulator + a b. ``PRECISION`` is for products of float32; those of half precision are always exact."""
    if INTERPRETED:
        return tl.dot(a.to(tl.float32), b.to(tl.float32), accumulator)
    else:
        return tl.dot(a, b, accumulator, input_precision=PRECISION)


@triton.jit
def product(G, P, R, PARTS: tl.constexpr, UNROLLED: tl.constexpr):
    """R + G P for a tile of G ``[channels, width]`` and of P ``[width, rank]``, on tensor cores.

    P has at most 8 significant bits, which bfloat16 and float16 hold exactly, so a half-precision G needs one product.
    A float32 G is the exact sum of three bfloat16 parts (8 + 8 + 8 bits), and PARTS of them are multiplied: with
    torch.set_float32_matmul_precision "highest" 3, "high" 2, "medium" 1. UNROLLED: not in a loop, inside of which
    Triton would pipeline no loads.
    """
    if G.dtype == tl.float32:
        if UNROLLED:
            # Subtracted, because Triton turns R + products into products that start at R. It leaves the last of those
            # pending on sm_90, and the next turn writes the registers with its part of G while it still reads them.
            G = -G
            products = tl.zeros(R.shape, tl.float32)
            for _ in tl.static_range(PARTS):
                part = G.to(tl.bfloat16)
                products = dot(part, P, products)
                G -= part.to(tl.float32)
            R -= products
        else:
            for _ in range(PARTS):
                part = G.to(tl.bfloat16)
                R = dot(part, P, R)
                G -= part.to(tl.float32)
        return R
    else:
        return dot(G, P, R)


@triton.jit
def row_of_P(p_row, seed, epoch, start, width, PROJECTION_KIND: tl.constexpr, COUNT: tl.constexpr):
    """COUNT entries of P at rank 1, from ``start`` on, float32: made here, or read from memory for svd."""
    if PROJECTION_KIND == GAUSSIAN:
        return gaussian_row(seed, epoch, 0, start, COUNT)
    elif PROJECTION_KIND == RADEMACHER:
        w0, w1, w2, w3 = sign_words(seed, epoch, 0, start)
        return signs(w0, w1, w2, w3, tl.arange(0, COUNT))
    else:
        o = start + tl.arange(0, COUNT)
        p_P = tl.load(p_row + PROJECTION).to(tl.pointer_type(tl.float32))
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
def projected_at_rank_1(
    p_tile, m_channel, first, last, width, width_stride, p_row, seed, epoch,
    PROJECTION_KIND: tl.constexpr, ALONG_ROWS: tl.constexpr, NORMS: tl.constexpr,
    BLOCK_CHANNELS: tl.constexpr, BLOCK_WIDTH: tl.constexpr,
):  # fmt: skip
    """R ``[BLOCK_CHANNELS, 1]`` of the channels at ``p_tile`` ``[BLOCK_CHANNELS, 1]``, over widths ``first`` (a
    multiple of 128) to ``last``, and with NORMS |G_c|^2. P is not yet scaled. ALONG_ROWS: widths are neighbours in
    memory."""
    # Runs of four are added in a thread's registers. The rest is added across threads once, at the end.
    squares = tl.zeros([BLOCK_CHANNELS, BLOCK_WIDTH // 4], tl.float32)
    products = tl.zeros([BLOCK_CHANNELS, BLOCK_WIDTH // 4], tl.float32)
    for start in range(first, last, BLOCK_WIDTH):
        o_width = start + tl.arange(0, BLOCK_WIDTH)
        mask = m_channel[:, None] & (o_width < width)[None, :]
        G = tl.load(p_tile + o_width[None, :] * width_stride, mask=mask, other=0.0).to(tl.float32)
        P = row_of_P(p_row, seed, epoch, start, width, PROJECTION_KIND, BLOCK_WIDTH)
        products += sum_of_four(G * P[None, :], ALONG_ROWS)
        if NORMS:
            squares += sum_of_four(G * G, ALONG_ROWS)
    return tl.sum(products, 1)[:, None], tl.sum(squares, 1)


@triton.jit
def diagonal(x):
    """The diagonal of a square tile."""
    o = tl.arange(0, x.shape[0])
    return tl.sum(tl.where(o[:, None] == o[None, :], x, 0.0), 1)


@triton.jit
def projected_by_product(
    p_tile, m_channel, o_rank, first, last, width, width_stride, p_row,
    RANK: tl.constexpr, PROJECTION_KIND: tl.constexpr, PARTS: tl.constexpr, UNROLLED: tl.constexpr,
    NORMS: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_RANK: tl.constexpr,
):  # fmt: skip
    """The same from rank 2 on, by tensor cores: R ``[BLOCK_CHANNELS, BLOCK_RANK]`` of the ranks ``o_rank``, and |G_c|^2
    as NORMS says."""
    R = tl.zeros([BLOCK_CHANNELS, BLOCK_RANK], tl.float32)
    squared_G = tl.zeros([BLOCK_CHANNELS], tl.float32)
    squares = tl.zeros([BLOCK_CHANNELS, BLOCK_CHANNELS if NORMS == BY_PRODUCT else 1], tl.float32)
    p_P = rows_of_P(p_row, o_rank, width, p_tile.dtype.element_ty, PROJECTION_KIND)
    m_rank = (o_rank < RANK)[None, :]
    for start in range(first, last, BLOCK_WIDTH):
        o_width = start + tl.arange(0, BLOCK_WIDTH)
        m_width = o_width < width
        G = tl.load(p_tile + o_width[None, :] * width_stride, mask=m_channel[:, None] & m_width[None, :], other=0.0)
        if NORMS == BY_PRODUCT:
            squares = dot(G, tl.trans(G), squares)
        elif NORMS == BY_SUM:
            squared_G += tl.sum(G.to(tl.float32) * G.to(tl.float32), 1)
        if PROJECTION_KIND == MATERIALISED:
            # P is padded with zeros along the width. A mask there would make each load one entry wide.
            P = tl.load(p_P + o_width[:, None], mask=m_rank, other=0.0)
            R = product(G, P, R, PARTS, UNROLLED)
        else:
            P = tl.load(p_P + o_width[:, None], mask=m_width[:, None] & m_rank, other=0.0)
            if G.dtype == tl.float16:
                G = G.to(tl.float32)
            R = product_with_float32(G, P, R, PARTS, UNROLLED)
    if NORMS == BY_PRODUCT:
        squared_G = diagonal(squares)
    return R, squared_G


@triton.jit
def rows_of_P(p_row, o_rank, width, GRADIENT: tl.constexpr, PROJECTION_KIND: tl.constexpr):
    """Where the rows ``o_rank`` of P begin, ``[1, ranks]``. Called before the loop over the width: if the address is
    loaded inside, sm_100 has one or two tiles fewer on their way."""
    address = tl.load(p_row + PROJECTION)
    if PROJECTION_KIND == MATERIALISED:
        p_P = tl.multiple_of(address.to(tl.pointer_type(tl.float16 if GRADIENT == tl.float16 else tl.bfloat16)), 16)
        return p_P + o_rank.to(tl.int64)[None, :] * ((width + ROW_MULTIPLE - 1) // ROW_MULTIPLE * ROW_MULTIPLE)
    else:
        return address.to(tl.pointer_type(tl.float32)) + o_rank.to(tl.int64)[None, :] * width


@triton.jit
def product_with_float32(G, P, R, PARTS: tl.constexpr, UNROLLED: tl.constexpr):
    """``product`` for svd's P, float32, which is multiplied in three bfloat16 parts too. On sm_100 triton 3.7 rounds a
    float32 product to TF32 if one operand was bfloat16, even with input_precision="ieee"."""
    if UNROLLED:
        for _ in tl.static_range(3):
            part = P.to(tl.bfloat16)
            R = product(G, part, R, PARTS, UNROLLED)
            P -= part.to(tl.float32)
    else:
        for _ in range(3):
            part = P.to(tl.bfloat16)
            R = product(G, part, R, PARTS, UNROLLED)
            P -= part.to(tl.float32)
    return R


@triton.jit
def projected_in_halves(
    p_tile, p_other, m_channel, m_other, o_rank, width, width_stride, p_row,
    RANK: tl.constexpr, BLOCK_CHANNELS: tl.constexpr, BLOCK_WIDTH: tl.constexpr, BLOCK_RANK: tl.constexpr,
):  # fmt: skip
    """The same for two blocks of channels that share each tile of P, which is then read half as often. G has half
    precision, P is ``MATERIALISED``. Each block's sums are its own, as if it were alone."""
    R = tl.zeros([BLOCK_CHANNELS, BLOCK_RANK], tl.float32)
    other_R = tl.zeros([BLOCK_CHANNELS, BLOCK_RANK], tl.float32)
    squares = tl.zeros([BLOCK_CHANNELS, BLOCK_CHANNELS], tl.float32)
    other_squares = tl.zeros([BLOCK_CHANNELS, BLOCK_CHANNELS], tl.float32)
    p_P = rows_of_P(p_row, o_rank, width, p_tile.dtype.element_ty, MATERIALISED)
    m_rank = (o_rank < RANK)[None, :]
    for start in range(0, width, BLOCK_WIDTH):
        o_width = start + tl.arange(0, BLOCK_WIDTH)
        m_width = (o_width < width)[None, :]
        G = tl.load(p_tile + o_width[None, :] * width_stride, mask=m_channel[:, None] & m_width, other=0.0)
        other_G = tl.load(p_other + o_width[None, :] * width_stride, mask=m_other[:, None] & m_width, other=0.0)
        P = tl.load(p_P + o_width[:, None], mask=m_rank, other=0.0)
        squares = dot(G, tl.trans(G), squares)
        R = dot(G, P, R)
        other_squares = dot(other_G, tl.trans(other_G), other_squares)
        other_R = dot(other_G, P, other_R)
    return R, diagonal(squares), other_R, diagonal(other_squares)
