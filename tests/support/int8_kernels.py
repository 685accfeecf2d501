"""Requantising as a kernel of its own, to compare its bits with its PyTorch twin."""

from __future__ import annotations

import triton
import triton.language as tl
from apollo_triton.kernels.int8 import store_groups


@triton.jit
def requantize_kernel(
    p_values, p_bits, p_q, p_scale, p_zero, GROUP: tl.constexpr, BLOCK_GROUP: tl.constexpr, BLOCK_GROUPS: tl.constexpr
):  # fmt: skip
    """q, scales and zero points of BLOCK_GROUPS groups of float32 values. ``p_bits``: int32; None for the nearest."""
    o_group = tl.arange(0, BLOCK_GROUPS)
    o_inside = tl.arange(0, BLOCK_GROUP)[None, :]
    m_group = o_group >= 0
    mask = m_group[:, None] & (o_inside < GROUP)
    index = o_group[:, None] * GROUP + o_inside
    W = tl.load(p_values + index, mask=mask, other=0.0)
    before = tl.where(mask, float("nan"), 0.0)  # every group differs
    bits = None
    if p_bits is not None:
        bits = tl.load(p_bits + index, mask=mask, other=0)
    u = tl.full([], 1.0, tl.float32)
    store_groups(W, before, bits, u, p_q, p_scale, p_zero, index, mask, o_group, m_group, BLOCK_GROUPS)
