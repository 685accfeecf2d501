"""Writes P to memory, once per refresh: for ranks from 2 on, whose sketch reads P with tensor cores."""

import triton
import triton.language as tl

from .philox import GAUSSIAN, interleave4, normals, round_nearest, sign_words, signs, words
from .step import current_step

BLOCK_CALLS = 256  # Philox calls a program, four widths each


@triton.jit(do_not_specialize=["seed", "step", "update_proj_gap", "force", "start"])
def projection_kernel(
    p_projection, seed, step, p_step, update_proj_gap, force, start, width, row_length,
    SIGNS: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Write P from column ``start`` on, ``[rank, row_length]``: normals of variance 1, or with SIGNS +-1.

    program_id(0) is the rank index. The sketch multiplies by 1 / sqrt(rank), so that the entries stay exact in the 8
    bits of bfloat16. A float16 P has the same entries, of which those below 6e-5 are rounded once more. Normals are
    computed in float64, so that they round as in PyTorch. That happens once in ``update_proj_gap`` steps (1 M entries
    at rank 256 and width 4096). If t is on the device, nothing is written between refreshes unless ``force`` is set.
    """
    t = current_step(step, p_step)
    if (force != 0) | ((t - 1) % update_proj_gap == 0):
        rank_index, epoch = tl.program_id(0), (t - 1) // update_proj_gap
        o = tl.program_id(1) * (4 * BLOCK) + tl.arange(0, 4 * BLOCK) - start % 4
        if SIGNS:
            column = start + o
            w0, w1, w2, w3 = sign_words(seed, epoch, rank_index, column)
            P = signs(w0, w1, w2, w3, column % 128)
        else:
            calls = start // 4 + tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
            w0, w1, w2, w3 = words(seed, epoch, calls, rank_index, GAUSSIAN)
            n0, n1 = normals(w0, w1, tl.float64)
            n2, n3 = normals(w2, w3, tl.float64)
            P = interleave4(n0, n1, n2, n3, 4 * BLOCK).to(tl.float32)
        P = round_nearest(tl.where(o < width, P, 0.0), tl.bfloat16)
        P = P.to(p_projection.dtype.element_ty)
        tl.store(p_projection + rank_index.to(tl.int64) * row_length + o, P, mask=(o >= 0) & (o < row_length))
