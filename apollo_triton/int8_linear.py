"""The two products of a layer with an int8 weight, by the Triton kernels or by PyTorch.

No float copy of the weight is made: the kernels dequantise tiles in registers, PyTorch blocks of some rows.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .backends import choose
from .int8 import Int8Weight

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def forward(x: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
    """x W^T + bias: x ``[..., in]`` -> ``[..., out]``, in the dtype of x."""
    if _has_kernels(x, weight):
        return _product(x, weight, bias, forward=True)
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    for rows in weight.blocks():
        y[..., rows] = x @ weight.floats(rows).to(x.dtype).mT
    return y if bias is None else y.add_(bias)


def input_gradient(gradient: Tensor, weight: Int8Weight) -> Tensor:
    """dy W: dy ``[..., out]`` -> ``[..., in]``, in the dtype of dy."""
    if _has_kernels(gradient, weight):
        return _product(gradient, weight, None, forward=False)
    total = torch.zeros(*gradient.shape[:-1], weight.shape[1], dtype=torch.float32, device=gradient.device)
    for rows in weight.blocks():
        total += gradient[..., rows] @ weight.floats(rows).to(gradient.dtype)
    return total.to(gradient.dtype)


def _has_kernels(x: Tensor, weight: Int8Weight) -> bool:
    return x.dtype in _DTYPES and choose(weight, "auto").name == "triton"


def _precision() -> str:
    """Of products of float32, as PyTorch's own: AMD's older GPUs have no TF32."""
    return "ieee" if torch.get_float32_matmul_precision() == "highest" or torch.version.hip else "tf32"


def _product(x: Tensor, weight: Int8Weight, bias: Tensor | None, forward: bool) -> Tensor:
    from .fused import launch
    from .kernels import linear

    x = x.contiguous()
    outputs, columns = weight.shape
    inner, across = (columns, outputs) if forward else (outputs, columns)
    rows = math.prod(x.shape[:-1])
    y = x.new_empty(*x.shape[:-1], across)
    if not y.numel():
        return y
    assert x.shape[-1] == inner
    blocks = linear.blocks(rows, columns, weight.group_size, x.element_size(), forward)
    tiles = -(-rows // blocks["BLOCK_ROWS"]) * -(-across // blocks["BLOCK_ACROSS"])
    launch(
        linear.linear_kernel,
        (tiles,),
        x.device,
        x,
        weight.q,
        weight.scale,
        weight.zero,
        bias,
        y,
        rows,
        outputs,
        columns,
        FORWARD=forward,
        GROUP=weight.group_size,
        PRECISION=_precision(),
        **blocks,
    )
    return y
