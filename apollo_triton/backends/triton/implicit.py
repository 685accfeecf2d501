"""The verbs as launches for one linear layer's weight, from the two factors of its gradient, which is never formed.

    sketch     X, dY -> R, |G_c|^2          2 launches; 1 or 2 more for exact norms, and 1 more for each sum over parts
    rescale    is ``verbs.rescale``         1 launch
    apply      limiter, then W in place     1 launch

Nothing of the weight's shape is allocated, and nothing is read back from the device.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ...core import gpu
from ...core.implicit_gradient import ImplicitGradient
from ...core.settings import Settings
from ...int8.weight import Int8Weight
from ...kernels import operand_sketch
from ...kernels import operands as operands_kernels
from ...kernels import sketch as sketch_kernels
from ..interface import Factors, Sketch, StepScalars
from . import projections, verbs
from .arguments import DTYPES, operand_constants, step_arguments
from .layout import rounds_by_eights
from .matrices import Table
from .projections import projection_kind


def sketch(table: Table, settings: Settings, scalars: StepScalars, gradient: ImplicitGradient) -> Sketch:
    """R ``[channels, rank]`` and |G_c|^2 ``[channels]``, float32, of G = dY^T X.

    With ``limiter_norm="sketch"`` |R_c|^2 takes the place of |G_c|^2, its mean over projections: free, an estimate.
    """
    projections.refresh(table, settings, scalars)
    if not math.prod(gradient.shape):  # the empty part of a weight that is cut into more parts than it has rows
        channels = gradient.kept_and_contracted(table.keeps_rows)[0].shape[1]
        return Sketch(table.scratch(channels, table.rank).zero_(), table.scratch(channels).zero_())
    R = _project(table, settings, scalars, gradient)
    if gradient.limiter_norm == "sketch":
        return Sketch(R, R.square().sum(1))
    return Sketch(R, squared_norms(table, gradient))


def squared_norms(table: Table, gradient: ImplicitGradient) -> Tensor:
    """|G_c|^2 ``[channels]``, float32, by the way that takes fewer multiplications."""
    kept, contracted = gradient.kept_and_contracted(table.keeps_rows)
    # float16's 11 bits are no two bfloat16 parts, and a float32 product is slower than all of G.
    if kept.shape[0] == 0 or kept.dtype == torch.float16:
        return tile_norms(table, gradient)
    if operand_sketch.gram_is_cheaper(*kept.shape, contracted.shape[1], in_parts=kept.dtype == torch.bfloat16):
        return gram_norms(table, gradient)
    return tile_norms(table, gradient)


def tile_norms(table: Table, gradient: ImplicitGradient) -> Tensor:
    """By tiles of G that are not stored."""
    X, dY = gradient.inputs, gradient.output_gradient
    (tokens, rows), columns = dY.shape, X.shape[1]
    precision = gpu.precision(X.dtype)
    blocks = operands_kernels.blocks(*_tile_conditions(X, precision))
    row_blocks, column_blocks = _tiles(rows, columns, blocks)
    channels = rows if table.keeps_rows else columns
    parts = column_blocks if table.keeps_rows else row_blocks
    norms = _parts(table, parts, channels)
    gpu.launch(
        operand_sketch.tile_norms_kernel,
        (row_blocks * column_blocks,),
        table.device,
        X,
        dY,
        norms,
        rows,
        columns,
        tokens,
        KEEPS_ROWS=table.keeps_rows,
        PRECISION=precision,
        **blocks,
    )
    return _sum(norms, parts)


def gram_norms(table: Table, gradient: ImplicitGradient) -> Tensor:
    """By K = contracted contracted^T ``[tokens, tokens]``: |G_c|^2 = kept_c^T K kept_c."""
    kept, contracted = gradient.kept_and_contracted(table.keeps_rows)
    (tokens, channels), width = kept.shape, contracted.shape[1]
    precision = gpu.precision(kept.dtype)
    on_tensor_cores = _on_tensor_cores(kept, precision)
    blocks = operand_sketch.gram_blocks(on_tensor_cores)
    side = -(-tokens // blocks["BLOCK_TOKENS"])
    K_parts, part = operand_sketch.parts(side * (side + 1) // 2, width, blocks["BLOCK_WIDTH"])
    row_length = side * blocks["BLOCK_TOKENS"]
    K = _parts(table, K_parts, tokens, row_length)
    gpu.launch(
        operand_sketch.gram_kernel,
        (side, side, K_parts),
        table.device,
        contracted,
        K,
        tokens,
        row_length,
        width,
        part,
        PRECISION=precision,
        **blocks,
    )
    blocks = operand_sketch.collect_blocks(tokens, on_tensor_cores)
    token_blocks = -(-tokens // blocks["BLOCK_RANK"])
    norms = _parts(table, token_blocks, channels)
    gpu.launch(
        operand_sketch.gram_norms_kernel,
        (-(-channels // blocks["BLOCK_CHANNELS"]), token_blocks),
        table.device,
        kept,
        _sum(K, K_parts),
        norms,
        tokens,
        row_length,
        channels,
        PRECISION=precision,
        **blocks,
    )
    return norms if token_blocks == 1 else norms.sum(0).clamp_(min=0)  # a single one has been clamped by the kernel


def apply(table: Table, settings: Settings, scalars: StepScalars, factors: Factors, gradient: ImplicitGradient) -> None:
    """The limiter, then W <- W - h sqrt(scale) (s / l) G and the decay, and u_prev, in place; counts the skips."""
    X, dY = gradient.inputs, gradient.output_gradient
    (tokens, rows), columns = dY.shape, X.shape[1]
    precision, weight = gpu.precision(X.dtype), table.members[0].weight
    if not rows * columns:  # no tile, and u_prev moves with those of the other ranks
        verbs.apply(table, settings, scalars, factors)
        return
    if isinstance(weight, Int8Weight):
        kernel, stored = operands_kernels.apply_int8_operands_kernel, weight.q
        blocks = operands_kernels.int8_blocks(weight.group_size, *_tile_conditions(X, precision))
        kind: dict[str, Any] = {"STOCHASTIC": weight.stochastic_rounding, "GROUP": weight.group_size}
    else:
        kernel, stored = operands_kernels.apply_operands_kernel, weight
        blocks = operands_kernels.blocks(*_tile_conditions(X, precision))
        stochastic = settings.stochastic_rounding and weight.dtype == torch.bfloat16
        kind = {"STOCHASTIC": stochastic, "WEIGHT_DTYPE": DTYPES[weight.dtype]}
    gpu.launch(
        kernel,
        (math.prod(_tiles(rows, columns, blocks)),),
        table.device,
        table.addresses,
        X,
        dY,
        factors.channel,
        factors.sums,
        table.root_scales,
        table.previous,
        table.skipped,
        tokens,
        *step_arguments(settings, scalars),
        KEEPS_ROWS=table.keeps_rows,
        PER_CHANNEL=factors.channel is not None,
        ALIGNED=_is_aligned(stored) and rounds_by_eights(table.members[0]),
        ROWS_BY_EIGHTS=rows % 8 == 0,
        USE_LIMITER=not settings.disable_nl,
        PRECISION=precision,
        BLOCK_CHANNELS=table.channel_blocks["BLOCK_CHANNELS"],
        **kind,
        **blocks,
    )


def _project(table: Table, settings: Settings, scalars: StepScalars, gradient: ImplicitGradient) -> Tensor:
    """R = kept^T S with S = contracted P^T."""
    kept, contracted = gradient.kept_and_contracted(table.keeps_rows)
    (tokens, channels), width = kept.shape, contracted.shape[1]
    kind = projection_kind(settings, table.is_width_sharded)
    constants = operand_constants(table, kind)
    rank_blocks = -(-table.rank // constants["BLOCK_RANK"])
    token_blocks = -(-tokens // constants["BLOCK_CHANNELS"])
    S_parts, part = operand_sketch.parts(token_blocks * rank_blocks, width, 128)
    S = _parts(table, S_parts, tokens, table.rank)
    if tokens:
        gpu.launch(
            operand_sketch.project_kernel,
            (token_blocks, rank_blocks, S_parts),
            table.device,
            table.addresses,
            contracted,
            S,
            tokens,
            width,
            part,
            scalars.step,
            scalars.step_tensor,
            settings.update_proj_gap,
            RANK=table.rank,
            PROJECTION_KIND=kind.value,
            **constants,
        )
    S = _sum(S, S_parts)  # whose parts go before R's are made
    precision = gpu.precision(kept.dtype)
    blocks = operand_sketch.collect_blocks(table.rank, _on_tensor_cores(kept, precision))
    programs = -(-channels // blocks["BLOCK_CHANNELS"]), -(-table.rank // blocks["BLOCK_RANK"])
    R_parts, part = operand_sketch.parts(math.prod(programs), tokens, blocks["BLOCK_TOKENS"])
    R = _parts(table, R_parts, channels, table.rank)
    gpu.launch(
        operand_sketch.collect_kernel,
        (*programs, R_parts),
        table.device,
        kept,
        S,
        R,
        tokens,
        channels,
        part,
        sketch_kernels.entry_scale(table.rank, kind.value),
        RANK=table.rank,
        PRECISION=precision,
        **blocks,
    )
    return _sum(R, R_parts)


def _is_aligned(weight: Tensor) -> bool:
    """Whether rows are contiguous, start at multiples of 16 bytes and hold a multiple of 8 elements."""
    row_stride, column_stride = weight.stride()
    return column_stride == 1 and weight.data_ptr() % 16 == row_stride % 8 == weight.shape[1] % 8 == 0


def _tile_conditions(operand: Tensor, precision: str) -> tuple[int, bool, bool]:
    """What the tiles of G depend on: bytes an entry of the factors, tensor cores or not, and much shared memory."""
    return operand.element_size(), _on_tensor_cores(operand, precision), gpu.has_large_shared_memory(operand.device)


def _on_tensor_cores(operand: Tensor, precision: str) -> bool:
    return operand.dtype != torch.float32 or precision == "tf32"


def _tiles(rows: int, columns: int, blocks: dict[str, int]) -> tuple[int, int]:
    return -(-rows // blocks["BLOCK_ROWS"]), -(-columns // blocks["BLOCK_COLUMNS"])


def _parts(table: Table, parts: int, *shape: int) -> Tensor:
    """Memory for the parts of a sum, side by side; a single one has no dimension for it, which would have to go."""
    return table.scratch(*shape) if parts == 1 else table.scratch(parts, *shape)


def _sum(values: Tensor, parts: int) -> Tensor:
    """Over the parts, in one order whatever the run."""
    return values if parts == 1 else values.sum(0)
