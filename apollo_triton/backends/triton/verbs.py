"""The three verbs as Triton launches, used wherever the kernels can run. Function by function it is
``reference.verbs``.

    sketch     G -> R, |G_c|^2              rescale    R -> moments in place, s        apply    limiter, then W in place
    sketch_and_rescale    both in one launch, in which R never leaves the registers

A launch goes over all matrices of a table. ``dense.py`` has AdamW for the rest, ``implicit.py`` the verbs for a
gradient that is never formed. Nothing here reads a value back from the device. What changes from step to step is an
argument of a kernel, and is never compiled in.
"""

from __future__ import annotations

import torch

from ...core import gpu
from ...core.moments_8bit import code_and_thresholds
from ...core.settings import Settings
from ...kernels import apply as apply_kernels
from ...kernels import blockwise as blockwise_kernels
from ...kernels import int8 as int8_kernels
from ...kernels import rescale as rescale_kernels
from ...kernels import sketch as sketch_kernels
from ...kernels.table import power_of_two
from ..interface import Factors, Sketch, StepScalars
from .arguments import DTYPES, moment_arguments, sketch_constants, step_arguments
from .channels import Channels
from .matrices import Table
from .projections import projection_kind


def sketch(table: Table, settings: Settings, scalars: StepScalars) -> Sketch:
    """R ``[all channels, rank]`` and |G_c|^2 ``[all channels]``, float32, of the gradients as they are."""
    result = Sketch(table.scratch(table.channels, table.rank), table.scratch(table.channels))
    _sketch(table, settings, scalars, result, None)
    return result


def rescale(table: Channels, settings: Settings, scalars: StepScalars, sketch: Sketch) -> Factors:
    """The moments in place, and the factors."""
    result = _empty_factors(table, settings)
    grid = (table.channel_programs.shape[0],)
    sums = sketch.projected, sketch.squared_norms
    out = result.channel, result.sums, table.previous, scalars.gradient_scale
    constants = {
        "RANK": table.rank,
        "KEEPS_ROWS": table.keeps_rows,
        "PER_CHANNEL": result.channel is not None,
        "ALIGNED": table.aligned,
        "BLOCK_CHANNELS": table.channel_blocks["BLOCK_CHANNELS"],
        "BLOCK_RANK": min(64, power_of_two(table.rank), 8192 // table.channel_blocks["BLOCK_CHANNELS"]),
    }
    if table.absmaxes is not None:
        gpu.launch(
            blockwise_kernels.rescale_blockwise_kernel,
            grid,
            table.device,
            table.addresses,
            table.absmaxes,
            table.channel_programs,
            *(code_and_thresholds(signed, table.device) for signed in (True, False)),
            *sums,
            table.scratch(table.channels),
            *out,
            *moment_arguments(settings),
            **constants,
        )
        return result
    gpu.launch(
        rescale_kernels.rescale_kernel,
        grid,
        table.device,
        table.addresses,
        table.channel_programs,
        *sums,
        *out,
        scalars.step,
        scalars.step_tensor,
        *moment_arguments(settings),
        STATE=DTYPES[table.state_dtype],
        **constants,
    )
    return result


def sketch_and_rescale(table: Table, settings: Settings, scalars: StepScalars) -> Factors:
    """Both verbs with nothing in between: one launch up to rank 256, else and for 8-bit moments two."""
    if not table.is_fused:
        return rescale(table, settings, scalars, sketch(table, settings, scalars))
    factors = _empty_factors(table, settings)
    _sketch(table, settings, scalars, None, factors)
    return factors


def apply(table: Table, settings: Settings, scalars: StepScalars, factors: Factors) -> None:
    """The limiter, then W <- W - h sqrt(scale) (s / l) G and the decay, and u_prev, in place; counts the skips."""
    if table.int8 is None:
        kernel, stochastic = apply_kernels.apply_kernel, settings.stochastic_rounding
        kind = {"WEIGHT_DTYPE": DTYPES[table.weight_dtype]}
        stochastic = stochastic and table.weight_dtype == torch.bfloat16
    else:
        kernel, stochastic = int8_kernels.apply_int8_kernel, table.int8.stochastic_rounding
        kind = {"GROUP": table.int8.group_size}
    gpu.launch(
        kernel,
        (table.tile_programs.shape[0],),
        table.device,
        table.addresses,
        table.gradients,
        table.tile_programs,
        factors.channel,
        factors.sums,
        table.root_scales,
        table.previous,
        table.skipped,
        scalars.gradient_scale,
        *step_arguments(settings, scalars),
        GRADIENT=DTYPES[table.gradient_dtype],
        KEEPS_ROWS=table.keeps_rows,
        PER_CHANNEL=factors.channel is not None,
        ALIGNED=table.aligned,
        USE_LIMITER=not settings.disable_nl,
        STOCHASTIC=stochastic,
        BLOCK_CHANNELS=table.channel_blocks["BLOCK_CHANNELS"],
        **kind,
        **table.tile_blocks,
    )


def _sketch(
    table: Table, settings: Settings, scalars: StepScalars, out: Sketch | None, factors: Factors | None
) -> None:
    kind = projection_kind(settings, table.is_width_sharded)
    constants = sketch_constants(table, kind)
    blocks = table.channel_programs.shape[0] * table.split // (2 if constants["HALVES"] else 1)
    gpu.launch(
        sketch_kernels.sketch_kernel,
        (blocks * -(-table.rank // constants["BLOCK_RANK"]),),
        table.device,
        table.addresses,
        table.gradients,
        table.channel_programs,
        out and out.projected,
        out and out.squared_norms,
        factors and factors.channel,
        factors and factors.sums,
        factors and table.previous,
        scalars.gradient_scale,
        scalars.step,
        scalars.step_tensor,
        settings.update_proj_gap,
        *moment_arguments(settings),
        sketch_kernels.entry_scale(table.rank, kind.value),
        RANK=table.rank,
        GRADIENT=DTYPES[table.gradient_dtype],
        STATE=DTYPES[table.state_dtype],
        PROJECTION_KIND=kind.value,
        KEEPS_ROWS=table.keeps_rows,
        PER_CHANNEL=settings.scale_type == "channel",
        ALIGNED=table.aligned,
        FUSED=factors is not None,
        SPLIT=table.split,
        **constants,
    )


def _empty_factors(table: Channels, settings: Settings) -> Factors:
    programs = table.channel_programs.shape[0]
    per_channel = settings.scale_type == "channel"
    return Factors(
        table.scratch(table.channels) if per_channel else None,
        table.scratch(programs, 1 if per_channel else 3),
    )
