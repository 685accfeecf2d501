"""What launches are given besides tensors: dtypes, tile sizes, and the numbers of a step."""

from __future__ import annotations

import math
from typing import Any

import torch
import triton.language as tl
from torch import Tensor

from ...core import gpu
from ...core.settings import Settings
from ...kernels import sketch as sketch_kernels
from ...kernels import step as step_kernels
from ..interface import StepScalars

DTYPES = {torch.float32: tl.float32, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16, torch.uint8: tl.uint8}
# How many bfloat16 parts of a float32 gradient are multiplied, by torch.get_float32_matmul_precision().
PARTS = {"highest": 3, "high": 2, "medium": 1}


def sketch_blocks(
    rank: int, kind: Any, operand: torch.dtype, device: torch.device, aligned: bool = True
) -> dict[str, int]:
    """Tile sizes, warps and stages of a product with P of a kind."""
    needs_more_registers = operand == torch.float32 or kind is sketch_kernels.SINGULAR_VECTORS or not aligned
    blocks = sketch_kernels.blocks(rank, needs_more_registers)
    return blocks | {"num_stages": sketch_kernels.stages(rank)} if gpu.has_large_shared_memory(device) else blocks


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


def scale_arguments(settings: Settings) -> tuple[float, float]:
    """scale_before_limiter and scale_after_limiter: sqrt(scale) and 1, in the order that ``scale_front`` asks for."""
    root_scale = math.sqrt(settings.scale)
    return (root_scale, 1.0) if settings.scale_front else (1.0, root_scale)


def _log(beta: float) -> float:
    return math.log(beta) if beta else -math.inf
