"""P for the kernels: made in place, or kept in memory and written once a period."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from ...core import gpu
from ...core.settings import Settings
from ...kernels import projection as projection_kernels
from ...kernels import sketch as sketch_kernels
from ..interface import Moment


class HasProjections(Protocol):
    projections: list[Projection]


def projection_kind(settings: Settings, is_scattered: bool = False) -> Any:
    """How the kernels come by P: made in place, or read. What is made in place begins at column 0, so matrices that are
    cut along their width read theirs, as svd's do."""
    assert settings.rank is not None
    is_small = settings.rank < sketch_kernels.SMALL_RANK
    if settings.proj == "svd" or (is_scattered and is_small):
        return sketch_kernels.SINGULAR_VECTORS
    if not is_small:
        return sketch_kernels.MATERIALISED
    return sketch_kernels.RADEMACHER if settings.distribution == "rademacher" else sketch_kernels.GAUSSIAN


def refresh(table: HasProjections, settings: Settings, moment: Moment) -> None:
    """Write the projections that the table's sketch will read, where they are not those of this step's epoch.

    With t on the device the kernel itself finds out, so that a captured graph goes on to refresh.
    """
    for projection in table.projections:
        if moment.step_tensor is None:
            epoch = settings.epoch(moment.step)
            if projection.epoch != epoch:
                _write(projection, settings, moment, force=True)
                projection.epoch = epoch
        else:
            _write(projection, settings, moment, force=projection.epoch is None)
            projection.epoch = 0


def _write(projection: Projection, settings: Settings, moment: Moment, force: bool) -> None:
    rank, row_length = projection.buffer.shape
    block = projection_kernels.BLOCK_CALLS
    gpu.launch(
        projection_kernels.projection_kernel,
        (rank, -(-(row_length + projection.start % 4) // (4 * block))),
        projection.buffer.device,
        projection.buffer,
        projection.seed,
        moment.step,
        moment.step_tensor,
        settings.update_proj_gap,
        int(force),
        projection.start,
        projection.width,
        row_length,
        SIGNS=projection.distribution == "rademacher",
        BLOCK=block,
    )


@dataclass(eq=False)  # each is itself, and can be held weakly
class Projection:
    """A random P in memory, ``[rank, padded width]`` of unit-variance bfloat16, shared by the matrices of its width.

    ``start`` is its first column, which is not 0 where a weight is cut along its width. ``epoch`` is the one it holds,
    None for nothing yet. Rewritten in place, so that its address is for good.
    """

    distribution: str
    seed: int
    start: int
    width: int
    buffer: Tensor
    epoch: int | None = None

    @classmethod
    def empty(cls, distribution: str, seed: int, rank: int, start: int, width: int, device: torch.device) -> Projection:
        """Memory for P, not yet written."""
        row = -(-width // projection_kernels.ROW_MULTIPLE) * projection_kernels.ROW_MULTIPLE
        return cls(distribution, seed, start, width, torch.empty(rank, row, dtype=torch.bfloat16, device=device))

    @property
    def kind(self) -> tuple[str, int, int, int, int, torch.device]:
        """What ``empty`` was given: two of a kind hold the same P in the same epoch."""
        return self.distribution, self.seed, self.buffer.shape[0], self.start, self.width, self.buffer.device
