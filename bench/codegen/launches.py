"""What a step launches on a GPU that is not here: it runs on CPU tensors, and a recorder replaces ``gpu.launch``."""

from __future__ import annotations

import contextlib
from typing import Any
from unittest import mock

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Shard

from apollo_triton import APOLLOAdamW
from apollo_triton.core import gpu
from apollo_triton.int8.weight import Int8Weight
from apollo_triton.tools.memory.fake_world import fake_mesh

from . import linear as int8_layers
from . import operands as factors
from .kernel import Kernel
from .targets import as_on


def launches(
    target: str,
    group: dict[str, Any] | None = None,
    dtype: torch.dtype = torch.bfloat16,
    gradient: torch.dtype | None = None,
    aligned: bool = True,
    sharded: bool = False,
    int8: int = 0,
    linear: dict[str, Any] | None = None,
    operands: dict[str, Any] | None = None,
    only: tuple[str, ...] = (),
    **options: Any,
) -> list[Kernel]:
    """The kernels that a step of one 1024 x 1024 weight launches on ``target``. Without ``group`` the weight is dense.

    ``sharded``: the weight is half of one that is twice as wide. ``int8``: it is int8, in groups of so many.
    ``linear``: instead the kernels of an int8 layer's two directions. ``operands``: instead the kernels of a step from
    the gradient's two factors. ``only``: of these the kernels of such names.
    """
    from apollo_triton.core import device_backend

    found: list[Kernel] = []

    def record(kernel: Any, grid: object, device: object, *arguments: Any, **constants: Any) -> None:
        if not only or kernel.__name__ in only:
            found.append(Kernel.of(kernel, arguments, constants))

    weight = torch.nn.Parameter(torch.zeros(1024, 1024 if aligned else 1025, dtype=dtype)[:, :1024])
    weight.grad = torch.randn(1024, 1024).to(dtype)
    weight.grad.data = weight.grad.to(gradient or dtype)  # torch < 2.10 has no grad_dtype
    if int8:
        weight = torch.nn.Parameter(Int8Weight.of(weight.detach(), int8))
        weight.grad = torch.randn(1024, 1024).to(dtype)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(gpu, "launch", record))
        stack.enter_context(mock.patch.object(device_backend, "_obstacle", return_value=None))
        stack.enter_context(as_on(target))
        if linear is not None:
            int8_layers.forward_and_backward(**linear)
            return found
        if operands is not None:
            factors.step(**operands)
            return found
        if sharded:
            mesh = stack.enter_context(fake_mesh(ranks=2))
            half = _half(weight.grad, mesh)
            weight = torch.nn.Parameter(_half(weight.detach(), mesh))
            weight.grad = half
        APOLLOAdamW([{"params": [weight], **(group or {})}], backend="triton", **{"lr": 1e-3, **options}).step()
    return found


def _half(shard: Tensor, mesh: Any) -> Tensor:
    """A tensor twice as wide, of which ``shard`` is the left half."""
    rows, columns = shard.shape
    return DTensor.from_local(
        shard, mesh, [Shard(1)], run_check=False, shape=torch.Size((rows, 2 * columns)), stride=(2 * columns, 1)
    )
