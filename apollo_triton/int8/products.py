"""The two products of a linear layer with an int8 weight, as operators of ``torch.library``.

    apollo_triton::int8_linear(x, q, scale, zero, bias, group_size)        x W^T + bias
    apollo_triton::int8_input_gradient(gradient, q, scale, zero, group_size)   dY W

They take the weight's parts, since to a compiler an int8 weight is three tensors. To it each product is one operation,
of which it knows the result's shape. It looks neither into the kernels nor into the loop over blocks of rows.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ..core.device_backend import device_backend
from .weight import dequantized_rows, row_blocks

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# ``torch.library.custom_op`` says the same in fewer words, and a call of it takes the host 14 us where this takes 4.
_library = torch.library.Library("apollo_triton", "DEF")
_library.define(
    "int8_linear(Tensor x, Tensor q, Tensor scale, Tensor zero, Tensor? bias, int group_size) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)
_library.define(
    "int8_input_gradient(Tensor gradient, Tensor q, Tensor scale, Tensor zero, int group_size) -> Tensor",
    tags=torch.Tag.pt2_compliant_tag,
)


def _linear(x: Tensor, q: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, group_size: int) -> Tensor:
    if _has_kernels(x, q):
        from . import matmul

        return matmul.forward(x, q, scale, zero, bias, group_size)
    y = x.new_empty(*x.shape[:-1], q.shape[0])
    for rows, W in _blocks(q, scale, zero, group_size, x.dtype):
        y[..., rows] = x @ W.mT
    return y if bias is None else y.add_(bias)


def _linear_shape(x: Tensor, q: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, group_size: int) -> Tensor:
    _check(x, 1, q, scale, zero, group_size)
    return x.new_empty(*x.shape[:-1], q.shape[0])


def _input_gradient(gradient: Tensor, q: Tensor, scale: Tensor, zero: Tensor, group_size: int) -> Tensor:
    if _has_kernels(gradient, q):
        from . import matmul

        return matmul.input_gradient(gradient, q, scale, zero, group_size)
    return input_gradient_by_blocks(gradient, q, scale, zero, group_size)


def _input_gradient_shape(gradient: Tensor, q: Tensor, scale: Tensor, zero: Tensor, group_size: int) -> Tensor:
    _check(gradient, 0, q, scale, zero, group_size)
    return gradient.new_empty(*gradient.shape[:-1], q.shape[1])


def _check(activations: Tensor, contracted: int, q: Tensor, scale: Tensor, zero: Tensor, group_size: int) -> None:
    """Raise RuntimeError unless the parts suit each other and the activations.

    ``Int8Weight.check`` looks at parts before each eager use. In a graph nothing does: it is compiled for parts as they
    are now, and anew if one gets another size, dtype or layout. So this is where they are looked at, once a graph.
    """
    if activations.shape[-1] != q.shape[contracted]:
        raise RuntimeError(
            f"shapes cannot be multiplied: {tuple(activations.shape)}, and an int8 weight of {tuple(q.shape)}"
        )
    groups = (q.numel() // group_size,)
    for name, part, dtype, shape in (
        ("q", q, torch.uint8, q.shape),
        ("scale", scale, torch.float32, groups),
        ("zero", zero, torch.uint8, groups),
    ):
        if part.dtype != dtype or part.shape != shape or not part.is_contiguous() or part.device != q.device:
            raise RuntimeError(
                f"an int8 weight of shape {tuple(q.shape)} with group_size={group_size} needs a contiguous {name} of "
                f"{dtype}, of shape {tuple(shape)} and on {q.device}; it is {part.dtype}, of shape "
                f"{tuple(part.shape)} with strides {part.stride()}, on {part.device}"
            )


def input_gradient_by_blocks(gradient: Tensor, q: Tensor, scale: Tensor, zero: Tensor, group_size: int) -> Tensor:
    """dY W in PyTorch's own operations, which autograd can differentiate once more."""
    total = torch.zeros(*gradient.shape[:-1], q.shape[1], dtype=torch.float32, device=gradient.device)
    for rows, W in _blocks(q, scale, zero, group_size, gradient.dtype):
        total += gradient[..., rows] @ W
    return total.to(gradient.dtype)


def _has_kernels(activations: Tensor, q: Tensor) -> bool:
    kernels_take_it = activations.dtype in _KERNEL_DTYPES and activations.device == q.device
    return kernels_take_it and device_backend(q, "auto").name == "triton"


def _blocks(
    q: Tensor, scale: Tensor, zero: Tensor, group_size: int, dtype: torch.dtype
) -> Iterator[tuple[slice, Tensor]]:
    for rows in row_blocks(q.shape, group_size):
        yield rows, dequantized_rows(q, scale, zero, group_size, rows).to(dtype)


for _name, _compute, _shape in (
    ("int8_linear", _linear, _linear_shape),
    ("int8_input_gradient", _input_gradient, _input_gradient_shape),
):
    _library.impl(_name, _compute, "CompositeExplicitAutograd")
    torch.library.register_fake(f"apollo_triton::{_name}", _shape, lib=_library)

int8_linear = torch.ops.apollo_triton.int8_linear.default
int8_input_gradient = torch.ops.apollo_triton.int8_input_gradient.default
