"""P for the kernels: made in place, or kept in memory and written once a period."""

from __future__ import annotations

from collections.abc import MutableSet
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from ...core import gpu
from ...core.projection import TENSOR_CORE_RANK
from ...core.settings import Settings
from ...core.streams import Uses
from ...kernels import projected
from ...kernels import projection as projection_kernels
from ..interface import StepScalars

MATERIALISED = projected.MATERIALISED

# Distribution, seed, rank, first column, width, dtype and device of a P.
ProjectionKey = tuple[str, int, int, int, int, torch.dtype, torch.device]


@dataclass(eq=False)  # each is itself, and can be held weakly
class ProjectionBuffer:
    """A random P in memory, ``[rank, padded width]`` of unit variance, shared by the matrices of its width.

    ``start`` is its first column, which is not 0 where a weight is cut along its width. ``epoch`` is the one it holds,
    None for nothing yet. Rewritten in place, so that its address is for good: ``uses`` keeps engines on several streams
    from reading it before or after it holds what they read.
    """

    distribution: str
    seed: int
    start: int
    width: int
    buffer: Tensor
    epoch: int | None = None
    uses: Uses = field(init=False)

    def __post_init__(self) -> None:
        self.uses = Uses([self.buffer])

    @classmethod
    def empty(
        cls, distribution: str, seed: int, rank: int, start: int, width: int, dtype: torch.dtype, device: torch.device
    ) -> ProjectionBuffer:
        """Memory for P, not yet written."""
        multiple = projected.ROW_MULTIPLE.value
        row = -(-width // multiple) * multiple
        return cls(distribution, seed, start, width, torch.empty(rank, row, dtype=dtype, device=device))

    @property
    def kind(self) -> ProjectionKey:
        """What ``empty`` was given: two of a kind hold the same P in the same epoch."""
        buffer = self.buffer
        return self.distribution, self.seed, buffer.shape[0], self.start, self.width, buffer.dtype, buffer.device


class HasProjections(Protocol):
    projections: list[ProjectionBuffer]


def projection_kind(settings: Settings, is_width_sharded: bool = False) -> Any:
    """Whether the kernels make P in place or read it, and which.

    If a weight is sharded along the projected dimension, its slice of P is kept in memory at rank 1 too: the kernels
    that make P in place always start at column 0, and a slice is small.
    """
    assert settings.rank is not None
    is_made_in_place = settings.rank < TENSOR_CORE_RANK
    if settings.proj == "svd" or (is_width_sharded and is_made_in_place):
        return projected.SINGULAR_VECTORS
    if not is_made_in_place:
        return MATERIALISED
    return projected.RADEMACHER if settings.distribution == "rademacher" else projected.GAUSSIAN


def projection_dtype(gradient: torch.dtype) -> torch.dtype:
    """The dtype of a P in memory: that of the gradient, so that it is multiplied as it is read. 8 significant bits fit
    either, except for float16's entries below 6e-5 (kernels/projection.py)."""
    return torch.float16 if gradient == torch.float16 else torch.bfloat16


def buffer_for(kind: ProjectionKey, epoch: int | None, shared: MutableSet[ProjectionBuffer]) -> ProjectionBuffer:
    """The one of the ``shared`` buffers that is of this kind and holds this epoch, or a new one, which joins them.

    An epoch of None matches none of them: with t on the device the host does not know what they hold.
    """
    if epoch is not None:
        for buffer in shared:
            if buffer.kind == kind and buffer.epoch == epoch:
                return buffer
    buffer = ProjectionBuffer.empty(*kind)
    if epoch is not None:
        shared.add(buffer)
    return buffer


def refresh(table: HasProjections, settings: Settings, scalars: StepScalars) -> None:
    """Write the projections that the table's sketch will read, unless they hold this step's epoch already.

    With t on the device the kernel itself finds out, so that a captured graph refreshes them too. No other plan reads
    them then, so that there is nobody to wait for.
    """
    for projection in table.projections:
        if scalars.step_tensor is None:
            epoch = settings.epoch(scalars.step)
            if projection.epoch == epoch:
                projection.uses.read()
                continue
            projection.uses.write()
            _write(projection, settings, scalars, force=True)
            projection.uses.written()
            projection.epoch = epoch
        else:
            projection.uses.hold()
            _write(projection, settings, scalars, force=projection.epoch is None)
            projection.epoch = 0


def _write(projection: ProjectionBuffer, settings: Settings, scalars: StepScalars, force: bool) -> None:
    rank, row_length = projection.buffer.shape
    block = projection_kernels.BLOCK_CALLS
    gpu.launch(
        projection_kernels.projection_kernel,
        (rank, -(-(row_length + projection.start % 4) // (4 * block))),
        projection.buffer.device,
        projection.buffer,
        projection.seed,
        scalars.step,
        scalars.step_tensor,
        settings.update_proj_gap,
        int(force),
        projection.start,
        projection.width,
        row_length,
        SIGNS=projection.distribution == "rademacher",
        BLOCK=block,
    )
