"""8-bit moments in bitsandbytes' blockwise dynamic format: one byte an element, and one float32 for every 256 elements.

A tensor in row-major order is cut into blocks of 256 elements. Each block stores its absmax, the largest magnitude in
it. Each element x stores an index into a table of 256 float32: that of the entry nearest to x / absmax. The tables are
those of Dettmers et al., "8-bit optimizers via block-wise quantization" (arXiv 2110.02861), after Dettmers,
arXiv 1511.04561.

Three rules fix the bits where "nearest" leaves a choice:

- x / absmax is x times the float32 reciprocal of absmax, as in bitsandbytes' CUDA kernel: one division a block.
- The midpoint of two entries is rounded to float32, and a tie goes to the even index, as in that kernel's search.
  bitsandbytes' PyTorch and Triton kernels give ties to the lower index. Its CPU library (0.50) does not find the
  nearest entry: it first rounds x / absmax to one of 65536 equal steps from -1 to 1. 0 then becomes 1.6e-5 or 2.1e-5 of
  absmax, and the small entries of the tables are never used. We do not follow it.
- If a block's absmax is not a normal number, all its elements get the entry 0. If absmax is 0 or subnormal (below
  1.2e-38; its reciprocal might overflow), the block then reads as zeros. If the block holds an infinity or a NaN, its
  absmax is infinite, and the block reads as NaN. bitsandbytes writes -0.99 absmax for the zeros of subnormal blocks
  and for NaN.
"""

from __future__ import annotations

from functools import cache
from math import gcd
from typing import NamedTuple

import torch
from torch import Tensor

BLOCK = 256
_DECADES = 7
_LEAST_NORMAL = 2.0**-126


def dynamic_code(signed: bool, device: torch.device | str = "cpu") -> Tensor:
    """The sorted table ``[256]``, float32: signed from -0.993 to 1 for the first moment, unsigned from 0 to 1 for the
    second.

    The first call for a device copies the table there. Later calls share that copy: do not write to it.

    >>> dynamic_code(signed=True)[[0, 126, 127, 128, 255]]
    tensor([-9.9297e-01, -5.5000e-07,  0.0000e+00,  5.5000e-07,  1.0000e+00])
    """
    return _dynamic_code(bool(signed), torch.device(device))


@cache
def _dynamic_code(signed: bool, device: torch.device) -> Tensor:
    """Decade e, from 1e-6 to 1, holds the midpoints of 2^e equal parts of [0.1, 1]; an unsigned one of 2^(e + 1)."""
    if device.type != "cpu":
        return _dynamic_code(signed, torch.device("cpu")).to(device)
    entries = [torch.tensor([0.0, 1.0], device="cpu")]
    for decade in range(_DECADES):
        parts = 2**decade if signed else 2 ** (decade + 1)
        # In float32 and by linspace, as bitsandbytes makes its tables. Computed in float64, a third of the entries
        # would be rounded differently.
        edges = torch.linspace(0.1, 1.0, parts + 1, dtype=torch.float32, device="cpu")
        middles = (edges[:-1] + edges[1:]) / 2 * 10.0 ** (decade - _DECADES + 1)
        entries += [middles, -middles] if signed else [middles]
    return torch.cat(entries).sort().values


@cache
def _thresholds(signed: bool, device: torch.device) -> Tensor:
    """``[255]``: the index of x is the number of thresholds below x."""
    code = dynamic_code(signed)
    middles = (code[:-1] + code[1:]) * 0.5
    middles[1::2] = torch.nextafter(middles[1::2], torch.tensor(-torch.inf, device="cpu"))  # ties to the even index
    return middles.to(device)


@cache
def code_and_thresholds(signed: bool, device: torch.device) -> Tensor:
    """``[511]``, for kernels: ``dynamic_code``, and behind it the thresholds."""
    return torch.cat((dynamic_code(signed, device), _thresholds(signed, device)))


def quantize_blockwise(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """Quantise: the indices, uint8 in the shape of ``values``, and the absmaxes, float32 ``[ceil(elements / 256)]``.

    Nothing is read back to the host. Temporaries take about five times the memory of ``values`` in float32.
    """
    flat = values.reshape(-1).to(torch.float32)
    blocks = torch.nn.functional.pad(flat, (0, -flat.numel() % BLOCK)).view(-1, BLOCK)
    absmax = torch.where(blocks.isfinite(), blocks.abs(), torch.inf).amax(1)
    is_normal = (absmax >= _LEAST_NORMAL) & (absmax < torch.inf)
    scaled = torch.where(is_normal[:, None], blocks * absmax.reciprocal()[:, None], 0.0)
    indices = torch.bucketize(scaled, _thresholds(bool(signed), values.device), out_int32=True).to(torch.uint8)
    return indices.view(-1)[: flat.numel()].view(values.shape), absmax


def dequantize_blockwise(q: Tensor, absmax: Tensor, signed: bool) -> Tensor:
    """The float32 values of ``q`` (uint8), in its shape; ``absmax`` is float32 ``[ceil(elements / 256)]``."""
    entries = dynamic_code(signed, q.device).index_select(0, q.reshape(-1).to(torch.int32))
    return (entries * absmax.repeat_interleave(BLOCK)[: q.numel()]).view(q.shape)


def absmax_count(elements: int) -> int:
    """The number of blocks of a tensor of ``elements`` elements."""
    return -(-elements // BLOCK)


def whole_blocks(rank: int) -> int:
    """The least number of channels, of ``rank`` moments each, that fill whole blocks."""
    return BLOCK // gcd(rank, BLOCK)


class Blockwise(NamedTuple):
    """M or V of one matrix: q, uint8 ``[channels, rank]``, and the absmaxes of its blocks."""

    q: Tensor
    absmax: Tensor
    signed: bool

    def floats(self, channels: slice) -> Tensor:
        """Some channels in float32 ``[channels, rank]``. The first of them must begin a block."""
        return dequantize_blockwise(self.q[channels], self.absmax[self._blocks(channels)], self.signed)

    def store(self, channels: slice, values: Tensor, changed: Tensor) -> None:
        """Write float32 ``values``. ``changed`` is boolean ``[channels]``: a block without a changed channel keeps its
        bits. Otherwise a value of -absmax, which is no entry of the table, would shrink by 0.7 % at each rounding."""
        q, absmax = quantize_blockwise(values, self.signed)
        elements = changed[:, None].expand(q.shape).reshape(-1)
        moves = torch.nn.functional.pad(elements, (0, -len(elements) % BLOCK)).view(-1, BLOCK).any(1)
        target, targets = self.q[channels], self.absmax[self._blocks(channels)]
        target.copy_(torch.where(moves.repeat_interleave(BLOCK)[: q.numel()].view(q.shape), q, target))
        targets.copy_(torch.where(moves, absmax, targets))

    def _blocks(self, channels: slice) -> slice:
        rank = self.q.shape[1]
        return slice(channels.start * rank // BLOCK, absmax_count(min(channels.stop, len(self.q)) * rank))
