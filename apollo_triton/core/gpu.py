"""What a launch needs to know of its device."""

from __future__ import annotations

import contextlib
import functools
from typing import Any

import torch


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **constants: Any) -> None:
    """Start ``kernel`` on ``device``, whichever is the current one."""
    with contextlib.nullcontext() if device.type == "cpu" else torch.get_device_module(device).device(device):
        kernel[grid](*arguments, **constants)


@functools.cache
def is_roomy(device: torch.device) -> bool:
    """Whether a program may have 160 KiB of shared memory: on data centers' GPUs of NVIDIA's, which have 163 KiB and
    more; others have 99, AMD's 64."""
    if device.type != "cuda" or torch.version.hip is not None:
        return False
    return torch.cuda.get_device_capability(device) in ((8, 0), (9, 0), (10, 0), (10, 3))


def precision(dtype: torch.dtype) -> str:
    """In what PyTorch would multiply float32; not every ROCm device that the kernels run on has TF32."""
    exact = torch.get_float32_matmul_precision() == "highest" or torch.version.hip is not None
    return "ieee" if exact or dtype != torch.float32 else "tf32"
