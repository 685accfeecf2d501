"""Launches of the kernels of a linear layer with an int8 weight. Imports triton, so import it only where kernels
run."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core import gpu
from ..kernels import linear as kernels


def forward(x: Tensor, q: Tensor, scale: Tensor, zero: Tensor, bias: Tensor | None, group_size: int) -> Tensor:
    """x ``[..., in]`` -> x W^T + bias ``[..., out]`` in the dtype of x, rounded once."""
    outputs, inputs = q.shape
    y = x.new_empty(*x.shape[:-1], outputs)
    bias = None if bias is None else bias.expand(outputs).contiguous()
    _launch(kernels.forward_kernel, x, (q, scale, zero), group_size, (bias, y), inputs, outputs)
    return y


def input_gradient(gradient: Tensor, q: Tensor, scale: Tensor, zero: Tensor, group_size: int) -> Tensor:
    """dY ``[..., out]`` -> dY W ``[..., in]`` in the dtype of dY, rounded once."""
    outputs, inputs = q.shape
    result = gradient.new_empty(*gradient.shape[:-1], inputs)
    _launch(kernels.input_gradient_kernel, gradient, (q, scale, zero), group_size, (result,), outputs, inputs)
    return result


def _launch(
    kernel: Any,
    activations: Tensor,
    parts: tuple[Tensor, Tensor, Tensor],
    group_size: int,
    arguments: tuple[Any, ...],
    contracted: int,
    kept: int,
) -> None:
    """Launch ``kernel``, with ``arguments`` after the weight's ``parts``: q, scale, zero. The product sums over
    ``contracted``, the length of one side of the weight, and keeps the other side, ``kept``."""
    shape = parts[0].shape
    if activations.shape[-1] != contracted:  # otherwise the kernel would read beyond the end
        raise RuntimeError(
            f"shapes cannot be multiplied: {tuple(activations.shape)}, and an int8 weight of {tuple(shape)}"
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
        activations.device,
        activations.contiguous(),
        *parts,
        *arguments,
        rows,
        *shape,
        GROUP=group_size,
        RUN=kernels.run_length(group_size, shape[1], block_columns),
        PRECISION=precision,
        **blocks,
    )
