"""Starting a kernel on a device, and what the device offers."""

from __future__ import annotations

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch

from .handles import handles_of

_counted: ContextVar[list[Any]] = ContextVar("counted")


@contextmanager
def counting_launches() -> Iterator[list[Any]]:
    """The kernels that are launched on the meta device from here on. Its tensors have no memory, so none is started."""
    kernels: list[Any] = []
    token = _counted.set(kernels)
    try:
        yield kernels
    finally:
        _counted.reset(token)


def is_counting() -> bool:
    """Whether launches on the meta device are counted, so that the kernels' code may run there."""
    return _counted.get(None) is not None


def launch(kernel: Any, grid: tuple[int, ...], device: torch.device, *arguments: Any, **constants: Any) -> None:
    """Start ``kernel`` on ``device``, whichever is the current one; on the meta device only count it."""
    index: Any = device.index
    if index is None and device.type == "meta":
        _counted.get().append(kernel)
        return
    if index is None or torch.get_device_module(device).current_device() == index:  # the CPU has none
        handles_of(kernel).launch(grid, index, arguments, constants)
        return
    with torch.get_device_module(device).device(device):
        handles_of(kernel).launch(grid, index, arguments, constants)


@functools.cache
def capability(device: torch.device) -> tuple[int, int]:
    """The compute capability of an NVIDIA GPU, (0, 0) of anything else."""
    if device.type != "cuda" or torch.version.hip is not None:
        return 0, 0
    return torch.cuda.get_device_capability(device)


def has_large_shared_memory(device: torch.device) -> bool:
    """Whether a program may use 160 KiB of shared memory. NVIDIA's data-center GPUs have 163 KiB or more, its other
    GPUs 99 KiB, AMD's 64 KiB."""
    return capability(device) in ((8, 0), (9, 0), (10, 0), (10, 3))


def has_asynchronous_products(device: torch.device) -> bool:
    """Whether a product on tensor cores goes on while its warps do something else. Hopper, and Blackwell in data
    centers."""
    return capability(device)[0] in (9, 10, 11)


def has_tensor_memory(device: torch.device) -> bool:
    """Whether such products are added up in a memory of their own, of 512 columns, and not in registers."""
    return capability(device)[0] in (10, 11)


def precision(dtype: torch.dtype) -> str:
    """The precision of products of ``dtype``, as PyTorch would take it: "tf32" for float32 if
    ``torch.set_float32_matmul_precision`` allows it, else "ieee". On ROCm it is always "ieee", because not every ROCm
    device that runs the kernels has TF32."""
    exact = torch.get_float32_matmul_precision() == "highest" or torch.version.hip is not None
    return "ieee" if exact or dtype != torch.float32 else "tf32"
