"""Float32 blocks of weights and gradients in memory that is reused, so that no temporary has a weight's size."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from . import streams

# At most this many elements are converted to float32 at a time, whatever a weight's size: 4 MB. With smaller blocks
# the calls cost more time than the cache saves (LLaMA-60M's gradients in bfloat16, 2 cores, project and norm: 6.4 ms
# with blocks of 2**20 elements, 10.6 ms with 2**18, 16 ms with 2**16).
BLOCK_ELEMENTS = 1 << 20


class Scratch:
    """A few float32 buffers for each stream of a device, made once. With fresh memory for every block, page faults made
    conversions take 78 of a step's 200 ms (LLaMA-60M in bfloat16 at rank 128)."""

    def __init__(self) -> None:
        self._buffers: dict[tuple[torch.device, int, Any], Tensor] = {}

    def blocks(self, tensor: Tensor, slot: int = 0) -> Iterator[tuple[slice, Tensor]]:
        """Blocks of rows of ``tensor`` in float32, each with its slice. The next block reuses its memory."""
        for rows in row_blocks(tensor.shape):
            whole = rows.stop - rows.start == len(tensor)
            yield rows, self.floats(tensor if whole else tensor[rows], slot)

    def floats(self, values: Tensor, slot: int) -> Tensor:
        """``values`` in float32: the same tensor if it is float32, else a copy in the buffer ``slot``."""
        if values.dtype == torch.float32:
            return values
        return self.empty(values.shape, values.device, slot).copy_(values)

    def empty(self, shape: Sequence[int], device: torch.device, slot: int) -> Tensor:
        """Uninitialised float32 memory of ``shape``: from the buffer ``slot``, or new if it is longer than a block."""
        elements = math.prod(shape)
        if elements > BLOCK_ELEMENTS:
            return torch.empty(tuple(shape), dtype=torch.float32, device=device)
        key = device, slot, streams.current(device)  # engines on two streams would overwrite each other's blocks
        if key not in self._buffers:
            self._buffers[key] = torch.empty(BLOCK_ELEMENTS, dtype=torch.float32, device=device)
        return self._buffers[key][:elements].view(tuple(shape))


def row_blocks(shape: Sequence[int]) -> Iterator[slice]:
    """Slices of the first dimension, each of at most ``BLOCK_ELEMENTS`` elements, or of one row if that is longer."""
    length, elements = shape[0], math.prod(shape)
    step = max(1, BLOCK_ELEMENTS * length // max(1, elements))
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))
