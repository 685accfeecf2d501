"""The two directions of the blockwise format as separate kernels, to compare them with their PyTorch twin."""

from __future__ import annotations

import triton
import triton.language as tl
from apollo_triton.kernels.blockwise import BLOCK, dequantized, magnitudes, quantized


@triton.jit
def requantize_kernel(p_values, p_q, p_absmax, p_code, count):
    """q (uint8) and absmax of ``count`` contiguous float32 values. Each program has a block of 256."""
    block = tl.program_id(0).to(tl.int64)
    offsets = block * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    values = tl.load(p_values + offsets, mask=mask, other=0.0)
    absmax = tl.max(magnitudes(values), 0)
    tl.store(p_absmax + block, absmax)
    tl.store(p_q + offsets, quantized(values, absmax, p_code), mask=mask)


@triton.jit
def dequantize_kernel(p_q, p_absmax, p_code, p_values, count):
    """``count`` contiguous float32 values from q (uint8) and absmax. Each program has a block of 256."""
    offsets = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = offsets < count
    tl.store(p_values + offsets, dequantized(p_q, p_absmax, p_code, offsets, mask), mask=mask)
