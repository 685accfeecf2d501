"""The three verbs on the Triton kernels: the engine wherever there is a GPU, and ``reference`` kernel for kernel.

    factors    G -> R -> moments, s_c        one launch for a table of matrices: R never leaves the registers
    apply      limiter, then W in place      one launch
    dense      AdamW for the rest            two launches

``sketch`` and ``rescale`` are the first one cut in two, for ranks above 256, 8-bit moments and sums over devices.
Nothing here reads a value back from the device; what changes from step to step is an argument, never compiled in.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import triton.language as tl
from torch import Tensor

from ...core import gpu
from ...core.moments_8bit import dynamic_code
from ...core.settings import Settings
from ...kernels import apply as apply_kernels
from ...kernels import blockwise as blockwise_kernels
from ...kernels import dense as dense_kernels
from ...kernels import int8 as int8_kernels
from ...kernels import rescale as rescale_kernels
from ...kernels import sketch as sketch_kernels
from ..interface import Moment, Sketch
from .projections import projection_kind
from .table import MomentTable, Table

if TYPE_CHECKING:
    from .table import OperandTable


DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.uint8: tl.uint8}
# How many bfloat16 parts of a float32 gradient are multiplied, by torch.get_float32_matmul_precision().
PARTS = {"highest": 3, "high": 2, "medium": 1}


class Factors(NamedTuple):
    """s_c ``[all channels]`` (None for one a tensor), each program's share of the sums that the limiter waits for,
    ``[programs, 1]`` or ``[programs, 3]``, and u_prev of each matrix, all float32."""

    channel: Tensor | None
    sums: Tensor
    previous: Tensor


def sketch_blocks(
    rank: int, kind: Any, operand: torch.dtype, device: torch.device, aligned: bool = True
) -> dict[str, int]:
    """Tile sizes, warps and stages of a product with P of a kind."""
    heavy = operand == torch.float32 or kind is sketch_kernels.SINGULAR_VECTORS or not aligned
    blocks = sketch_kernels.blocks(rank, heavy)
    return blocks | {"num_stages": sketch_kernels.stages(rank)} if gpu.is_roomy(device) else blocks


def factors(table: Table, settings: Settings, moment: Moment) -> Factors:
    """sketch and rescale with nothing in between: one launch up to rank 256, unless moments are 8-bit."""
    if table.rank > sketch_kernels.FUSED_RANK or table.absmaxes is not None:
        return rescale(table, settings, moment, sketch(table, settings, moment))
    result = _empty_factors(table, settings)
    _sketch(table, settings, moment, None, result)
    return result


def sketch(table: Table, settings: Settings, moment: Moment) -> Sketch:
    """R ``[all channels, rank]`` and |G_c|^2 ``[all channels]``, float32, of the gradients as they are."""
    result = Sketch(_scratch(table, table.channels, table.rank), _scratch(table, table.channels))
    _sketch(table, settings, moment, result, None)
    return result


def rescale(table: Table | MomentTable | OperandTable, settings: Settings, moment: Moment, sketch: Sketch) -> Factors:
    """The moments in place, and the factors."""
    result = _empty_factors(table, settings)
    where = (len(table.channel_programs),), table.device
    sums = sketch.projected, sketch.squared_norms
    out = result.channel, result.sums, result.previous, moment.gradient_scale
    constants = {
        "RANK": table.rank,
        "KEEPS_ROWS": table.keeps_rows,
        "PER_CHANNEL": result.channel is not None,
        "ALIGNED": table.aligned,
        "BLOCK_CHANNELS": table.channel_blocks["BLOCK_CHANNELS"],
        "BLOCK_RANK": min(64, table.channel_blocks["BLOCK_RANK"], 8192 // table.channel_blocks["BLOCK_CHANNELS"]),
    }
    if table.absmaxes is not None:
        gpu.launch(
            blockwise_kernels.rescale_blockwise_kernel,
            *where,
            table.addresses,
            table.absmaxes,
            table.channel_programs,
            *(dynamic_code(signed, table.device) for signed in (True, False)),
            *sums,
            _scratch(table, table.channels),
            *out,
            *_moment_arguments(settings),
            **constants,
        )
        return result
    gpu.launch(
        rescale_kernels.rescale_kernel,
        *where,
        table.addresses,
        table.channel_programs,
        *sums,
        *out,
        moment.step,
        moment.step_tensor,
        *_moment_arguments(settings),
        STATE=DTYPES[table.state_dtype],
        **constants,
    )
    return result


def _sketch(table: Table, settings: Settings, moment: Moment, out: Sketch | None, factors: Factors | None) -> None:
    kind = projection_kind(settings, table.is_scattered)
    blocks = sketch_blocks(table.rank, kind, table.gradient_dtype, table.device, table.aligned)
    gpu.launch(
        sketch_kernels.sketch_kernel,
        (len(table.channel_programs) * -(-table.rank // blocks["BLOCK_RANK"]), table.split),
        table.device,
        table.addresses,
        table.gradients,
        table.channel_programs,
        out and out.projected,
        out and out.squared_norms,
        factors and factors.channel,
        factors and factors.sums,
        factors and factors.previous,
        moment.gradient_scale,
        moment.step,
        moment.step_tensor,
        settings.update_proj_gap,
        *_moment_arguments(settings),
        sketch_kernels.entry_scale(table.rank, kind.value),
        RANK=table.rank,
        GRADIENT=DTYPES[table.gradient_dtype],
        STATE=DTYPES[table.state_dtype],
        PROJECTION_KIND=kind.value,
        KEEPS_ROWS=table.keeps_rows,
        PER_CHANNEL=settings.scale_type == "channel",
        ALIGNED=table.aligned,
        PARTS=PARTS[torch.get_float32_matmul_precision()],
        FUSED=factors is not None,
        SPLIT=table.split,
        **blocks,
    )


def apply(table: Table, settings: Settings, moment: Moment, factors: Factors) -> None:
    """The limiter, then W <- W - h sqrt(scale) (s / l) G and the decay, and u_prev, in place; counts the skips."""
    root_scale = math.sqrt(settings.scale)
    if table.int8 is None:
        kernel, stochastic = apply_kernels.apply_kernel, settings.stochastic_rounding
        kind = {"WEIGHT_DTYPE": DTYPES[table.weight_dtype]}
        stochastic = stochastic and table.weight_dtype == torch.bfloat16
    else:
        kernel, stochastic = int8_kernels.apply_int8_kernel, table.int8.stochastic_rounding
        kind = {"GROUP": table.int8.group_size}
    gpu.launch(
        kernel,
        (len(table.tile_programs),),
        table.device,
        table.addresses,
        table.gradients,
        table.tile_programs,
        factors.channel,
        factors.sums,
        factors.previous,
        table.skipped,
        moment.gradient_scale,
        *step_arguments(settings, moment),
        root_scale if settings.scale_front else 1.0,
        1.0 if settings.scale_front else root_scale,
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


def squared_norms(table: Table) -> Tensor:
    """|G|_F^2 of each matrix in up to 256 parts, float32 ``[matrices, 256]``; the parts that are not needed are 0."""
    parts = _scratch(table, table.matrices, dense_kernels.NORM_PROGRAMS)
    gpu.launch(
        dense_kernels.squared_norm_kernel,
        (len(table.norm_programs),),
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


def dense(table: Table, settings: Settings, moment: Moment, squared_norms: Tensor) -> None:
    """AdamW in APOLLO's convention for a table of dense parameters, given their ``squared_norms``."""
    gpu.launch(
        dense_kernels.dense_kernel,
        (len(table.tile_programs),),
        table.device,
        table.addresses,
        table.gradients,
        table.tile_programs,
        squared_norms,
        table.skipped,
        moment.gradient_scale,
        *step_arguments(settings, moment),
        *_moment_arguments(settings),
        WEIGHT_DTYPE=DTYPES[table.weight_dtype],
        GRADIENT=DTYPES[table.gradient_dtype],
        STATE=DTYPES[table.state_dtype],
        ALIGNED=table.aligned,
        STOCHASTIC=settings.stochastic_rounding and table.weight_dtype == torch.bfloat16,
        BLOCK=dense_kernels.BLOCK,
        NORM_PROGRAMS=dense_kernels.NORM_PROGRAMS,
        num_warps=8,
    )


def step_arguments(settings: Settings, moment: Moment) -> tuple[Any, ...]:
    """lr, p_lr, weight_decay, step, p_step, correction, log_beta1, log_beta2: what the kernels' ``step_size`` takes."""
    on_device = isinstance(settings.lr, Tensor)
    correction = settings.bias_correction(moment.step) if moment.step_tensor is None else 1.0
    return (
        0.0 if on_device else float(settings.lr),
        settings.lr if on_device else None,
        float(settings.weight_decay),
        moment.step,
        moment.step_tensor,
        correction,
        *(_log(beta) if settings.correct_bias else 0.0 for beta in settings.betas),
    )


def _moment_arguments(settings: Settings) -> tuple[float, float, float]:
    """keep1, keep2 and eps: what every kernel that moves moments takes."""
    beta1, beta2 = settings.betas
    return 1 - beta1, 1 - beta2, settings.eps


def _log(beta: float) -> float:
    return math.log(beta) if beta else -math.inf


def matrix_sums(table: Table | MomentTable, factors: Factors) -> Tensor:
    """The sums of each matrix from those of its programs: ``[matrices, 1]`` or ``[matrices, 3]``."""
    return _segment_sums(factors.sums, table.program_counts)


def squared_norms_of_matrices(table: Table, squared_norms: Tensor) -> Tensor:
    """|G|_F^2 of each matrix from the |G_c|^2 ``[all channels]`` of ``sketch``."""
    return _segment_sums(squared_norms, table.channel_counts)


def _segment_sums(values: Tensor, counts: Tensor) -> Tensor:
    # unsafe: else the counts are read back and checked at every step.
    return torch.segment_reduce(values, "sum", lengths=counts, axis=0, unsafe=True, initial=0.0)


def joined_factors(table: Table, channel: list[Tensor], sums: list[Tensor]) -> Factors:
    """What ``apply`` takes, from each member's factors ``[matrices, channels]`` and sums ``[matrices, numbers]``."""
    totals = torch.cat(sums)
    by_program = torch.zeros(len(table.channel_programs), totals.shape[1], dtype=torch.float32, device=table.device)
    by_program[table.program_counts.cumsum(0) - table.program_counts] = totals  # all in a matrix's first program
    norms = [member.local_state("update_norm").reshape(-1) for member in table.members]
    return Factors(torch.cat([each.reshape(-1) for each in channel]) if channel else None, by_program, torch.cat(norms))


def _empty_factors(table: Table | MomentTable | OperandTable, settings: Settings) -> Factors:
    programs = len(table.channel_programs)
    per_channel = settings.scale_type == "channel"
    return Factors(
        _scratch(table, table.channels) if per_channel else None,
        _scratch(table, programs, 1 if per_channel else 3),
        _scratch(table, table.matrices),
    )


def _scratch(table: Table | MomentTable | OperandTable, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=table.device)
