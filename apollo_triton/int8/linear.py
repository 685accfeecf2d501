"""``torch.nn.functional.linear`` with an int8 weight, forward and backward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .products import input_gradient_by_blocks, int8_input_gradient, int8_linear
from .weight import FUNCTIONS, Int8Weight


def linear(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear`` with an int8 weight: x ``[..., in]`` -> ``[..., out]`` in the dtype of x."""
    if not torch.compiler.is_compiling():  # the parts have no addresses while a graph is traced
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
    """The weight's gradient is an ordinary float tensor, which autograd adds up under the int8 weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return int8_linear(x, weight.q, weight.scale, weight.zero, bias, weight.group_size)

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
    parts = weight.q, weight.scale, weight.zero, weight.group_size
    # Under create_graph autograd goes through PyTorch's own operations. It has no derivative of ours.
    return (input_gradient_by_blocks if torch.is_grad_enabled() else int8_input_gradient)(gradient, *parts)


FUNCTIONS[torch.nn.functional.linear] = linear
