"""``torch.nn.functional.linear`` with an int8 weight, forward and backward."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from ..core.device_backend import device_backend
from .weight import FUNCTIONS, Int8Weight

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def linear(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear`` with an int8 weight: x ``[..., in]`` -> ``[..., out]`` in the dtype of x."""
    weight.check()
    if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    elif x.dtype != weight.dtype:
        raise RuntimeError(
            f"the input has dtype {x.dtype}, and the int8 weight stands for {weight.dtype}: model.to(...)"
        )
    return _Int8Linear.apply(x, weight, bias)


class _Int8Linear(torch.autograd.Function):
    """The kernels dequantise the weight a tile at a time, PyTorch a block of rows at a time. The weight's gradient is
    an ordinary float tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        if _has_kernels(x, weight):
            from . import matmul as int8_matmul

            return int8_matmul.forward(x, weight, bias)
        y = x.new_empty(*x.shape[:-1], weight.shape[0])
        for rows, W in _blocks(weight, x.dtype):
            y[..., rows] = x @ W.mT
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        if needs_weight and torch.is_grad_enabled():
            raise NotImplementedError(
                "create_graph=True through an int8 weight that is trained: second derivatives with respect to the "
                "weight are not computed; freeze the weight, or train a float one (dequantize_model)"
            )
        flat = gradient.reshape(-1, gradient.shape[-1])
        x_gradient = input_gradient(gradient, weight) if needs_x else None
        weight_gradient = bias_gradient = None
        if needs_weight:
            weight_gradient = flat.mT @ x.reshape(-1, x.shape[-1])
        if needs_bias:
            bias_gradient = flat.sum(0)
        return x_gradient, weight_gradient, bias_gradient


def input_gradient(gradient: Tensor, weight: Int8Weight) -> Tensor:
    """dY ``[..., out]`` -> dY W ``[..., in]`` in the dtype of dY."""
    # Under create_graph PyTorch computes it, because the kernels' results cannot be differentiated again.
    if _has_kernels(gradient, weight) and not torch.is_grad_enabled():
        from . import matmul as int8_matmul

        return int8_matmul.input_gradient(gradient, weight)
    total = torch.zeros(*gradient.shape[:-1], weight.shape[1], dtype=torch.float32, device=gradient.device)
    for rows, W in _blocks(weight, gradient.dtype):
        total += gradient[..., rows] @ W
    return total.to(gradient.dtype)


def _has_kernels(activations: Tensor, weight: Int8Weight) -> bool:
    kernels_take_it = activations.dtype in _KERNEL_DTYPES and activations.device == weight.device
    return kernels_take_it and device_backend(weight, "auto").name == "triton"


def _blocks(weight: Int8Weight, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    for rows in weight.blocks():
        yield rows, weight.floats(rows).to(dtype)


FUNCTIONS[torch.nn.functional.linear] = linear
