"""Which backend updates a parameter, and why: the Triton kernels where there is a GPU for them, PyTorch elsewhere."""

from __future__ import annotations

import functools
import os
from typing import NamedTuple

import torch
from torch import Tensor

from .gpu import is_counting

_LEAST_TRITON = (3, 2)
_LEAST_CAPABILITY = (8, 0)  # bfloat16 products


class Backend(NamedTuple):
    """The backend that updates a parameter, "triton" or "reference", and the reason for it."""

    name: str
    reason: str


def device_backend(parameter: Tensor, asked: str) -> Backend:
    """The backend for ``parameter`` in a group with ``backend=asked`` ("auto", "triton" or "reference").

    Raises ValueError if "triton" is asked for and the kernels cannot run on the parameter's device. The text says why.

    >>> device_backend(torch.zeros(2, 2), "reference").name
    'reference'
    """
    if asked == "reference":
        return Backend("reference", 'backend="reference"')
    if parameter.is_meta and is_counting() and _triton_obstacle() is None:
        return Backend("triton", "it has no memory, and launches are counted")
    obstacle = _obstacle(parameter.device)
    if obstacle is None:
        reason = 'backend="triton"' if asked == "triton" else f"it is on {parameter.device}"
        return Backend("triton", reason)
    if asked == "auto":
        return Backend("reference", obstacle)
    if interpreting() and parameter.device.type == "cpu":
        return Backend("triton", 'backend="triton", in Triton\'s interpreter')
    raise ValueError(f'backend="triton" cannot run here: {obstacle}; use backend="auto"')


def interpreting() -> bool:
    """Whether the kernels run on a CPU, in Triton's interpreter (TRITON_INTERPRET=1): slow, for trials and tests."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1" and _triton_obstacle() is None


@functools.cache
def _obstacle(device: torch.device) -> str | None:
    """Why the kernels cannot run on ``device``; None if they can."""
    if device.type not in ("cuda", "xpu"):  # ROCm's devices are called cuda
        return f"it is on {device}, and the kernels need a CUDA, ROCm or XPU device"
    if device.type == "cuda" and torch.version.hip is None:
        capability = torch.cuda.get_device_capability(device)
        if capability < _LEAST_CAPABILITY:
            return f"{device} has compute capability {capability[0]}.{capability[1]}, and the kernels need 8.0"
    if device.type == "xpu" and not torch.xpu.get_device_properties(device).has_fp64:
        return f"{device} has no float64, in which the projection is computed"
    return _triton_obstacle()


@functools.cache
def _triton_obstacle() -> str | None:
    """Why triton cannot be used; None if it can."""
    try:
        import triton
    except Exception as error:  # a broken triton must not stop a training that does not need it
        if isinstance(error, ModuleNotFoundError) and error.name == "triton":
            return "triton is not installed: in a checkout pip install -c constraints.txt '.[triton]'"
        return f"triton cannot be imported: {error!r}"
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if version < _LEAST_TRITON:
        return f"triton {triton.__version__} is installed, and the kernels need 3.2 or newer"
    return None
