"""Float32 blocks of weights and gradients, in memory that is used again: no temporary has a weight's size."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

# The most that is converted to float32 at a time, whatever a weight's size: 4 MB. Smaller blocks cost more in
# operations than they save in cache (LLaMA-60M's gradients in bfloat16, 2 cores, project and norm: 6.4 ms with blocks
# of 2**20 elements, 10.6 ms with 2**18, 16 ms with 2**16).
BLOCK_ELEMENTS = 1 << 20


class Scratch:
    """A few float32 buffers a device, made once: fresh ones would cost their page faults at every block
    (LLaMA-60M in bfloat16 at rank 128: 78 ms of a step's 200 were spent in conversions so)."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.device, int], Tensor] = {}

    def blocks(self, tensor: Tensor, slot: int = 0) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of rows of ``tensor`` in float32, each with its slice; the next block takes the last one's memory."""
        length = tensor.shape[0]
        step = max(1, BLOCK_ELEMENTS * length // max(1, tensor.numel()))
        for start in range(0, length, step):
            rows = slice(start, min(start + step, length))
            yield rows, self.floats(tensor[rows] if step < length else tensor, slot)

    def floats(self, values: Tensor, slot: int) -> Tensor:
        """``values`` in float32: themselves if they are, else a copy in the buffer ``slot``."""
        if values.dtype == torch.float32:
            return values
        if values.numel() > BLOCK_ELEMENTS:
            return values.to(torch.float32)  # one row is longer than a block
        key = values.device, slot
        if key not in self._buffers:
            self._buffers[key] = torch.empty(BLOCK_ELEMENTS, dtype=torch.float32, device=values.device)
        return self._buffers[key][: values.numel()].view(values.shape).copy_(values)
