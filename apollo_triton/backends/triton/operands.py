"""The verbs on the Triton kernels for one linear layer's weight, from its operands instead of its gradient.

    sketch     X, dY -> R, |G_c|^2          2 launches; 2 or 3 more for exact norms, and 1 for sums over parts
    rescale    is ``fused.rescale``         1
    apply      limiter, then W in place     1

Nothing of the weight's shape is allocated, and nothing read back from the device.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...core import gpu
from ...core.operands import Operands
from ...core.settings import Settings
from ...int8.weight import Int8Weight
from ...kernels import operand_sketch
from ...kernels import operands as operands_kernels
from ...kernels import sketch as sketch_kernels
from ..interface import Moment, Sketch
from . import projections
from . import verbs as fused
from .projections import projection_kind
from .table import OperandTable
from .verbs import Factors


def obstacle(parameter: Tensor) -> str | None:
    """Why the kernels cannot update an int8 weight from operands; None for any other that the kernels update at all.

    A tile owns whole groups of whole rows. Other groups are the reference path's, blocks of rows at a time.
    """
    if not isinstance(parameter, Int8Weight):
        return None
    group = parameter.group_size
    if 8 <= group <= 256 and group & (group - 1) == 0 and parameter.shape[1] % group == 0:
        return None
    return f"group_size {group} is no power of two from 8 to 256 that divides its {parameter.shape[1]} columns"


def sketch(table: OperandTable, settings: Settings, moment: Moment, operands: Operands, limiter_norm: str) -> Sketch:
    """R ``[channels, rank]`` and |G_c|^2 ``[channels]``, float32, of G = dY^T X; with ``limiter_norm="sketch"`` |R_c|^2
    in place of the latter, whose mean over projections it is."""
    projections.refresh(table, settings, moment)
    R = _project(table, settings, moment, operands)
    if limiter_norm == "sketch":
        return Sketch(R, R.square().sum(1))
    return Sketch(R, squared_norms(table, operands))


def _project(table: OperandTable, settings: Settings, moment: Moment, operands: Operands) -> Tensor:
    """R = kept^T (summed P^T)."""
    kept, summed = table.split(operands)
    (tokens, channels), width = kept.shape, summed.shape[1]
    kind = projection_kind(settings)
    blocks = fused.sketch_blocks(table.rank, kind, kept.dtype, table.device)
    rank_blocks = -(-table.rank // blocks["BLOCK_RANK"])
    token_blocks = -(-tokens // blocks["BLOCK_CHANNELS"])
    S_parts, part = operand_sketch.parts(token_blocks * rank_blocks, width, 128)
    S = _scratch(table, S_parts, tokens, table.rank)
    if tokens:
        gpu.launch(
            operand_sketch.project_kernel,
            (token_blocks, rank_blocks, S_parts),
            table.device,
            table.addresses,
            summed,
            S,
            tokens,
            width,
            part,
            moment.step,
            moment.step_tensor,
            settings.update_proj_gap,
            RANK=table.rank,
            PROJECTION_KIND=kind.value,
            PARTS=fused.PARTS[torch.get_float32_matmul_precision()],
            **blocks,
        )
    S = _sum(S)  # whose parts go before R's are made
    precision = gpu.precision(kept.dtype)
    blocks = operand_sketch.collect_blocks(table.rank, _on_tensor_cores(kept, precision))
    programs = -(-channels // blocks["BLOCK_CHANNELS"]), -(-table.rank // blocks["BLOCK_RANK"])
    R_parts, part = operand_sketch.parts(math.prod(programs), tokens, blocks["BLOCK_TOKENS"])
    R = _scratch(table, R_parts, channels, table.rank)
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
    return _sum(R)


def squared_norms(table: OperandTable, operands: Operands) -> Tensor:
    """|G_c|^2 ``[channels]``, float32, by the way that takes fewer multiplications."""
    kept, summed = table.split(operands)
    # float16's 11 bits are no two bfloat16 parts, and a float32 product is slower than all of G.
    if len(kept) == 0 or kept.dtype == torch.float16:
        return tile_norms(table, operands)
    if operand_sketch.gram_is_cheaper(*kept.shape, summed.shape[1], in_parts=kept.dtype == torch.bfloat16):
        return gram_norms(table, operands)
    return tile_norms(table, operands)


def tile_norms(table: OperandTable, operands: Operands) -> Tensor:
    """By tiles of G that are not stored."""
    X, dY = operands
    (tokens, rows), columns = dY.shape, X.shape[1]
    precision = gpu.precision(X.dtype)
    blocks = operands_kernels.blocks(*_room(X, precision))
    row_blocks, column_blocks = _tiles(rows, columns, blocks)
    channels = rows if table.keeps_rows else columns
    norms = _scratch(table, column_blocks if table.keeps_rows else row_blocks, channels)
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
    return _sum(norms)


def gram_norms(table: OperandTable, operands: Operands) -> Tensor:
    """By K = summed summed^T ``[tokens, tokens]``: |G_c|^2 = kept_c^T K kept_c."""
    kept, summed = table.split(operands)
    (tokens, channels), width = kept.shape, summed.shape[1]
    precision = gpu.precision(kept.dtype)
    on_tensor_cores = _on_tensor_cores(kept, precision)
    blocks = operand_sketch.gram_blocks(on_tensor_cores)
    side = -(-tokens // blocks["BLOCK_TOKENS"])
    K_parts, part = operand_sketch.parts(side * (side + 1) // 2, width, blocks["BLOCK_WIDTH"])
    row_length = side * blocks["BLOCK_TOKENS"]
    K = _scratch(table, K_parts, tokens, row_length)
    gpu.launch(
        operand_sketch.gram_kernel,
        (side, side, K_parts),
        table.device,
        summed,
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
    norms = _scratch(table, token_blocks, channels)
    gpu.launch(
        operand_sketch.gram_norms_kernel,
        (-(-channels // blocks["BLOCK_CHANNELS"]), token_blocks),
        table.device,
        kept,
        _sum(K),
        norms,
        tokens,
        row_length,
        channels,
        PRECISION=precision,
        **blocks,
    )
    return _sum(norms).clamp_(min=0)  # a sum of terms of both signs may end below 0; NaN stays NaN


def apply(table: OperandTable, settings: Settings, moment: Moment, factors: Factors, operands: Operands) -> None:
    """The limiter, then W <- W - h sqrt(scale) (s / l) G and the decay, and u_prev, in place; counts the skips."""
    X, dY = operands
    (tokens, rows), columns = dY.shape, X.shape[1]
    precision, weight = gpu.precision(X.dtype), table.parameter
    root_scale = math.sqrt(settings.scale)
    common = (
        X,
        dY,
        factors.channel,
        factors.sums,
        factors.previous,
        table.skipped,
        rows,
        columns,
        tokens,
    )
    step = (
        *fused.step_arguments(settings, moment),
        root_scale if settings.scale_front else 1.0,
        1.0 if settings.scale_front else root_scale,
    )
    constants = {
        "KEEPS_ROWS": table.keeps_rows,
        "PER_CHANNEL": factors.channel is not None,
        "USE_LIMITER": not settings.disable_nl,
        "PRECISION": precision,
        "BLOCK_CHANNELS": table.channel_blocks["BLOCK_CHANNELS"],
    }
    if isinstance(weight, Int8Weight):
        blocks = operands_kernels.int8_blocks(weight.group_size, *_room(X, precision))
        gpu.launch(
            operands_kernels.apply_int8_operands_kernel,
            (math.prod(_tiles(rows, columns, blocks)),),
            table.device,
            table.addresses,
            weight.q,
            weight.scale,
            weight.zero,
            *common,
            *step,
            STOCHASTIC=weight.stochastic_rounding,
            GROUP=weight.group_size,
            **constants,
            **blocks,
        )
        return
    blocks = operands_kernels.blocks(*_room(X, precision))
    gpu.launch(
        operands_kernels.apply_operands_kernel,
        (math.prod(_tiles(rows, columns, blocks)),),
        table.device,
        table.addresses,
        weight,
        *common,
        *weight.stride(),
        *step,
        STOCHASTIC=settings.stochastic_rounding and weight.dtype == torch.bfloat16,
        BY_EIGHTS=columns % 8 == 0,
        **constants,
        **blocks,
    )


def _room(operand: Tensor, precision: str) -> tuple[int, bool, bool]:
    """What decides on the tiles of G: bytes an entry of the operands, tensor cores or not, and much shared memory."""
    return operand.element_size(), _on_tensor_cores(operand, precision), gpu.is_roomy(operand.device)


def _on_tensor_cores(operand: Tensor, precision: str) -> bool:
    return operand.dtype != torch.float32 or precision == "tf32"


def _tiles(rows: int, columns: int, blocks: dict[str, int]) -> tuple[int, int]:
    return -(-rows // blocks["BLOCK_ROWS"]), -(-columns // blocks["BLOCK_COLUMNS"])


def _sum(parts: Tensor) -> Tensor:
    """Over the first dimension, in one order whatever the run."""
    return parts[0] if len(parts) == 1 else parts.sum(0)


def _scratch(table: OperandTable, *shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32, device=table.device)
