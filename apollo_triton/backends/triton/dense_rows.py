"""Dense parameters with one second moment a row, as two launches: V_i <- b2 V_i + (1 - b2) mean_j G_ij^2,
W_ij <- W_ij - h M_ij / (sqrt(V_i) + eps), then the decay."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ...core import gpu
from ...core.settings import Settings
from ...kernels import dense as dense_kernels
from ...kernels import dense_rows as kernels
from ..interface import StepScalars
from .arguments import DTYPES, moment_arguments, step_arguments
from .matrices import Table

_SUMS = {
    "BLOCK_COLUMNS": kernels.BLOCK_COLUMNS,
    "SEGMENT": kernels.SEGMENT,
    "SEGMENTS": kernels.SEGMENTS,
    "NORM_PROGRAMS": dense_kernels.NORM_PROGRAMS,
}


class RowSums(NamedTuple):
    """What the first launch leaves for the second, float32.

    ``parts [matrices, 256]`` are those of |G|_F^2, of which the ones that are not needed are 0. ``row_parts`` are those
    of |G_i|^2: ``[rows, segments]`` of each matrix, one behind the other. ``previous [all rows]`` is V before the step.
    """

    parts: Tensor
    row_parts: Tensor
    previous: Tensor


def row_sums(table: Table) -> RowSums:
    """The sums of squares of each gradient and of its rows, and V put aside."""
    result = RowSums(
        table.scratch(table.matrices, dense_kernels.NORM_PROGRAMS),
        table.scratch(table.row_parts),
        table.scratch(table.channels),
    )
    gpu.launch(
        kernels.row_sums_kernel,
        (table.norm_programs.shape[0],),
        table.device,
        table.addresses,
        table.gradients,
        table.norm_programs,
        *result,
        GRADIENT=DTYPES[table.gradient_dtype],
        ALIGNED=table.flat_gradients,
        BLOCK_ROWS=kernels.BLOCK_ROWS,
        **_SUMS,
        num_warps=8,
    )
    return result


def rows_of(table: Table, sums: RowSums) -> list[Tensor]:
    """The parts of |G_i|^2 of each matrix, ``[rows, segments]``."""
    segments = [kernels.segments(geometry.columns) for geometry in table.geometries]
    lengths = [geometry.rows * count for geometry, count in zip(table.geometries, segments, strict=True)]
    found = zip(sums.row_parts.split(lengths), segments, strict=True)
    return [part.view(-1, count) for part, count in found]


def adamw(table: Table, settings: Settings, scalars: StepScalars, sums: RowSums) -> None:
    """One step of a table. ``sums`` are those of each whole gradient and of its whole rows."""
    gpu.launch(
        kernels.dense_rows_kernel,
        (table.tile_programs.shape[0],),
        table.device,
        table.addresses,
        table.row_fields,
        table.gradients,
        table.tile_programs,
        *sums,
        table.skipped,
        scalars.gradient_scale,
        *step_arguments(settings, scalars),
        *moment_arguments(settings),
        WEIGHT_DTYPE=DTYPES[table.weight_dtype],
        GRADIENT=DTYPES[table.gradient_dtype],
        STATE=DTYPES[table.state_dtype],
        ALIGNED=table.aligned,
        STOCHASTIC=settings.stochastic_rounding and table.weight_dtype == torch.bfloat16,
        BLOCK=dense_kernels.BLOCK,
        **_SUMS,
        num_warps=8,
    )
