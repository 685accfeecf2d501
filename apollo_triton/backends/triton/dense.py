"""The dense rest as two launches: AdamW in APOLLO's convention, W <- W - h M / (sqrt(V) + eps), then the decay."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core import gpu
from ...core.settings import Settings
from ...kernels import dense as dense_kernels
from ..interface import StepScalars
from .arguments import DTYPES, moment_arguments, step_arguments
from .matrices import Table


def squared_norms(table: Table) -> Tensor:
    """|G|_F^2 of each matrix in up to 256 parts, float32 ``[matrices, 256]``; the parts that are not needed are 0."""
    parts = torch.empty(table.matrices, dense_kernels.NORM_PROGRAMS, dtype=torch.float32, device=table.device)
    gpu.launch(
        dense_kernels.squared_norm_kernel,
        (table.norm_programs.shape[0],),
        table.device,
        table.addresses,
        table.gradients,
        table.norm_programs,
        parts,
        GRADIENT=DTYPES[table.gradient_dtype],
        ALIGNED=table.flat_gradients,
        BLOCK=dense_kernels.BLOCK,
        NORM_PROGRAMS=dense_kernels.NORM_PROGRAMS,
        num_warps=8,
    )
    return parts


def adamw(table: Table, settings: Settings, scalars: StepScalars, squared_norms: Tensor) -> None:
    """One step of a table of dense parameters. ``squared_norms``: |G|^2 of each whole gradient, in parts."""
    gpu.launch(
        dense_kernels.dense_kernel,
        (table.tile_programs.shape[0],),
        table.device,
        table.addresses,
        table.gradients,
        table.tile_programs,
        squared_norms,
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
        NORM_PROGRAMS=dense_kernels.NORM_PROGRAMS,
        num_warps=8,
    )
