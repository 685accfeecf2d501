"""What launches are given besides tensors: dtypes, tile sizes, and the numbers of a step."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import triton.language as tl
from torch import Tensor

from ...core import gpu
from ...core.settings import Settings
from ...kernels import projected
from ...kernels import sketch as sketch_kernels
from ...kernels import step as step_kernels
from ..interface import StepScalars

if TYPE_CHECKING:
    from .matrices import Table

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.uint8: tl.uint8}
# How many bfloat16 parts of a float32 gradient are multiplied, by torch.get_float32_matmul_precision().
PARTS = {"highest": 3, "high": 2, "medium": 1}


def product_constants(
    rank: int, kind: Any, operand: torch.dtype, device: torch.device, aligned: bool = True, halves: bool = False
) -> dict[str, Any]:
    """Tile sizes, warps, stages and the other constants of a product with P of a kind."""
    reads_svd = kind is projected.SINGULAR_VECTORS
    in_parts = operand == torch.float32 or reads_svd
    blocks = sketch_kernels.blocks(rank, in_parts or not aligned)
    if gpu.has_large_shared_memory(device):
        G = blocks["BLOCK_CHANNELS"] * (2 if halves else 1) * operand.itemsize
        P = blocks["BLOCK_RANK"] * (4 if reads_svd else 2)
        blocks["num_stages"] = sketch_kernels.stages(rank, blocks["BLOCK_WIDTH"] * (G + P))
    unrolled = in_parts and sketch_kernels.unrolls(
        blocks["BLOCK_RANK"], reads_svd, gpu.has_asynchronous_products(device), gpu.has_tensor_memory(device)
    )
    return blocks | {"UNROLLED": unrolled, "PARTS": PARTS[torch.get_float32_matmul_precision()]}


def _kept(constants: Callable[[Table, Any], dict[str, Any]]) -> Callable[[Table, Any], dict[str, Any]]:
    """Keeps with the table what ``constants`` finds for a kind of P: 2 us less a step."""

    @functools.wraps(constants)
    def kept(table: Table, kind: Any) -> dict[str, Any]:
        key = constants, kind.value, torch.get_float32_matmul_precision()
        if key not in table.constants:
            table.constants[key] = constants(table, kind)
        return table.constants[key]

    return kept


@_kept
def operand_constants(table: Table, kind: Any) -> dict[str, Any]:
    """``product_constants`` for a gradient that is never formed."""
    return product_constants(table.rank, kind, table.gradient_dtype, table.device)


@_kept
def sketch_constants(table: Table, kind: Any) -> dict[str, Any]:
    """``product_constants`` of a table's sketch, how it computes norms, whether it takes channels in halves, and
    whether it fetches moments ahead."""
    device, is_float32 = table.device, table.gradient_dtype == torch.float32
    is_asynchronous = gpu.has_asynchronous_products(device)
    # Two tiles of G and one of P fit the registers and shared memory of sm_90 and sm_100.
    halves = (
        sketch_kernels.programs_at_a_time(table.rank) == 2
        and not is_float32
        and table.aligned
        and kind is projected.MATERIALISED
        and is_asynchronous
        and gpu.has_large_shared_memory(device)
    )
    # Triton does not pipeline a tile with channels side by side that is both operands of a product on sm_80.
    by_sum = is_float32 or (gpu.capability(device)[0] in (8, 12) and not table.keeps_rows)
    norms = projected.BY_SUM if by_sum else projected.BY_PRODUCT
    constants = product_constants(table.rank, kind, table.gradient_dtype, device, table.aligned, halves)
    # Not with tensor memory: there it spills 816 bytes a thread instead of 328.
    prefetches = halves and not gpu.has_tensor_memory(device)
    return constants | {"NORMS": norms.value, "HALVES": halves, "PREFETCH": prefetches}


def step_scalars(settings: Settings, step: int, step_tensor: Tensor | None, device: torch.device) -> StepScalars:
    """The scalars of a group's step, on the device if it has t (``step_tensor``) or the learning rate: one launch."""
    lr = settings.lr
    if step_tensor is None and not isinstance(lr, Tensor):
        return StepScalars(step)
    numbers = torch.empty(3, dtype=torch.float32, device=device)
    gpu.launch(
        step_kernels.step_kernel,
        (1,),
        device,
        numbers,
        step if step_tensor is None else 0,
        step_tensor,
        0.0 if isinstance(lr, Tensor) else lr,
        lr if isinstance(lr, Tensor) else None,
        settings.bias_correction(step) if step_tensor is None else 1.0,
        *(_log(beta) if settings.correct_bias else 0.0 for beta in settings.betas),
        settings.weight_decay,
        num_warps=1,
    )
    return StepScalars(0 if step_tensor is not None else step, step_tensor, numbers=numbers)


def step_arguments(settings: Settings, scalars: StepScalars) -> tuple[int, float, float, Tensor | None]:
    """step, step_size, decay and p_step: what the kernels' ``step_numbers`` takes."""
    if scalars.numbers is not None:
        return 0, 0.0, 0.0, scalars.numbers
    lr = settings.lr
    assert not isinstance(lr, Tensor)
    return scalars.step, lr * settings.bias_correction(scalars.step), lr * settings.weight_decay, None


def moment_arguments(settings: Settings) -> tuple[float, float, float]:
    """keep1, keep2 and eps: what every kernel that moves moments takes."""
    beta1, beta2 = settings.betas
    return 1 - beta1, 1 - beta2, settings.eps


def _log(beta: float) -> float:
    return math.log(beta) if beta else -math.inf
