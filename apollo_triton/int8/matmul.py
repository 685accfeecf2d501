"""Launches of the kernels of a linear layer with an int8 weight. Imports triton, so import it only where kernels
run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core import gpu
from ..kernels import linear as kernels
from .weight import Int8Weight


def forward(x: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
    """x ``[..., in]`` -> x W^T + bias ``[..., out]`` in the dtype of x, rounded once."""
    outputs, inputs = weight.shape
    y = x.new_empty(*x.shape[:-1], outputs)
    bias = None if bias is None else bias.expand(outputs).contiguous()
    _launch(kernels.forward_kernel, x, weight, (bias, y), inputs, outputs)
    return y


def input_gradient(gradient: Tensor, weight: Int8Weight) -> Tensor:
    """dY ``[..., out]`` -> dY W ``[..., in]`` in the dtype of dY, rounded once."""
    outputs, inputs = weight.shape
    result = gradient.new_empty(*gradient.shape[:-1], inputs)
    _launch(kernels.input_gradient_kernel, gradient, weight, (result,), outputs, inputs)
    return result


def _launch(
    kernel: Any, activations: Tensor, weight: Int8Weight, arguments: tuple[Any, ...], contracted: int, kept: int
) -> None:
    """Launch ``kernel``, with ``arguments`` after the weight's. The product sums over ``contracted``, the length of one
    side of the weight, and keeps the other side, ``kept``."""
    if activations.shape[-1] != contracted:  # otherwise the kernel would read beyond the end
        raise RuntimeError(
            f"shapes cannot be multiplied: {tuple(activations.shape)}, and an int8 weight of {tuple(weight.shape)}"
        )
    rows = activations.numel() // contracted
    if rows == 0:
        return
    precision = gpu.precision(activations.dtype)
    blocks = kernels.blocks(rows, tensor_cores=activations.dtype != torch.float32 or precision == "tf32")
    block_columns = blocks["BLOCK_SUMMED" if kernel is kernels.forward_kernel else "BLOCK_KEPT"]
    gpu.launch(
        kernel,
        (-(-rows // blocks["BLOCK_ROWS"]) * -(-kept // blocks["BLOCK_KEPT"]),),
        weight.device,
        activations.contiguous(),
        weight.q,
        weight.scale,
        weight.zero,
        *arguments,
        rows,
        *weight.shape,
        GROUP=weight.group_size,
        RUN=kernels.run_length(weight.group_size, weight.shape[1], block_columns),
        PRECISION=precision,
        **blocks,
    )
