"""8-bit moments in a kernel: to and from bitsandbytes' blockwise format, with the bits of ``apollo_triton.blockwise``.

``p_code`` is the address of ``apollo_triton.blockwise.dynamic_code``: 1 KiB, which stays in cache.
"""

import triton
import triton.language as tl

BLOCK = 256

_BLOCK = tl.constexpr(BLOCK)
_LEAST_NORMAL = tl.constexpr(2.0**-126)


@triton.jit
def dequantized(p_q, p_absmax, p_code, offsets, mask):
    """float32 values of the elements ``offsets``, counted from the start of the tensor; a zero where masked off."""
    entry = tl.load(p_code + tl.load(p_q + offsets, mask=mask, other=0).to(tl.int32))
    return entry * tl.load(p_absmax + offsets // _BLOCK, mask=mask, other=0.0)


@triton.jit
def magnitudes(values):
    """|x|, infinite for NaN, so that the greatest of a block is its absmax: ``tl.max`` alone would pass over NaN."""
    return tl.where(tl.abs(values) < float("inf"), tl.abs(values), float("inf"))


@triton.jit
def quantized(values, absmax, p_code):
    """uint8 indices of float32 ``values``; ``absmax`` broadcasts to them: a scalar, or the blocks of one axis.

    Eight steps to the last entry that is not above x, then one comparison with the middle between it and the next.
    """
    is_normal = (absmax >= _LEAST_NORMAL) & (absmax < float("inf"))
    # Rounded as in PyTorch, where a plain division is approximate on NVIDIA. Nothing is added to the products here, so
    # the compiler has nothing to fuse them with.
    scale = tl.div_rn(1.0, tl.where(is_normal, absmax, 1.0))
    x = tl.where(is_normal, values, 0.0) * scale
    index = tl.zeros(x.shape, tl.int32)
    for step in tl.static_range(8):
        ahead = index + (128 >> step)
        index = tl.where(tl.load(p_code + ahead) <= x, ahead, index)
    following = tl.minimum(index + 1, _BLOCK - 1)
    middle = (tl.load(p_code + index) + tl.load(p_code + following)) * 0.5
    is_above = (x > middle) | ((x == middle) & (index % 2 == 1))  # ties to the even index
    return tl.where(is_above, following, index).to(tl.uint8)


@triton.jit
def requantize_kernel(p_values, p_q, p_absmax, p_code, count):
    """q (uint8) and absmax of ``count`` contiguous float32 values; a program a block of 256."""
    block = tl.program_id(0).to(tl.int64)
    offsets = block * _BLOCK + tl.arange(0, _BLOCK)
    mask = offsets < count
    values = tl.load(p_values + offsets, mask=mask, other=0.0)
    absmax = tl.max(magnitudes(values), 0)
    tl.store(p_absmax + block, absmax)
    tl.store(p_q + offsets, quantized(values, absmax, p_code), mask=mask)


@triton.jit
def dequantize_kernel(p_q, p_absmax, p_code, p_values, count):
    """``count`` contiguous float32 values of q (uint8) and absmax; a program a block of 256."""
    offsets = tl.program_id(0).to(tl.int64) * _BLOCK + tl.arange(0, _BLOCK)
    mask = offsets < count
    tl.store(p_values + offsets, dequantized(p_q, p_absmax, p_code, offsets, mask), mask=mask)
