"""A linear layer whose weight is cut over ranks, as one product of what each rank holds.

    weight         input         output        gradient of the input
    Shard(0)       Replicate     Shard(-1)     Partial             ``ColwiseParallel``
    Shard(1)       Shard(-1)     Partial       Shard(-1)           ``RowwiseParallel``
    Replicate      Replicate     Replicate     Replicate
    Replicate      Shard(d)      Shard(d)      Shard(d)            tokens are cut, the weight's gradient is Partial

Each mesh dimension follows its own row. ``DTensor`` computes the same, an operation at a time. Here the rank's own
product is one call, so that it may be that of an int8 weight, or one that needs no gradient of the weight.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .dtensors import as_dtensor, is_dtensor, waited

Product = Callable[[Tensor, Tensor, Tensor | None], Tensor]


class _Layout(NamedTuple):
    """Placements, one a mesh dimension: of the input and the bias that the product needs, of its output, and of the
    gradients that it makes. ``adds_bias``: whether this rank is the one that adds the bias to partial sums."""

    x: tuple[Any, ...]
    bias: tuple[Any, ...]
    y: tuple[Any, ...]
    x_gradient: tuple[Any, ...]
    weight_gradient: tuple[Any, ...]
    bias_gradient: tuple[Any, ...]
    adds_bias: bool


def local_linear(x: Tensor, weight: Tensor, bias: Tensor | None, run: Product) -> Tensor:
    """``x @ weight.T + bias`` of ``DTensor``s ``x [..., in]``, ``weight [out, in]`` and ``bias [out]``.

    ``run(x, weight, bias)`` computes it of this rank's parts, which are plain tensors, or whatever the weight's part
    is. It communicates only where x does not have the placements of the table: x is brought to them first.

    Raises RuntimeError, alike on all ranks, for what it does not know.
    """
    _check(x, weight, bias)
    mesh: Any = weight.device_mesh  # type: ignore[attr-defined]
    layout = _layout(x, weight)
    x_here = _brought_to(x, layout.x).to_local(grad_placements=layout.x_gradient)
    weight_here = weight.to_local(grad_placements=layout.weight_gradient)  # type: ignore[attr-defined]
    bias_here = None
    if bias is not None:
        bias_here = _brought_to(bias, layout.bias).to_local(grad_placements=layout.bias_gradient)
        bias_here = _AddedOnce.apply(bias_here, layout.adds_bias)
    if x_here.shape[-1] != weight_here.shape[1]:
        raise RuntimeError(
            f"{_of(weight)}, of which this rank has {tuple(weight_here.shape)}, and its input's part here is "
            f"{tuple(x_here.shape)}: cut the input's features as the weight's columns are, as torch.chunk does"
        )
    y = _Arrived.apply(run(_Arrived.apply(x_here), weight_here, bias_here))
    return as_dtensor(y, mesh, layout.y, (*x.shape[:-1], weight.shape[0]))


def cuts_tokens(x: Tensor, weight: Tensor) -> bool:
    """Whether each rank would have a part of the tokens, so that the weight's gradient is a sum over ranks."""
    if not is_dtensor(weight):
        return False
    _check(x, weight, None)
    mesh: Any = weight.device_mesh  # type: ignore[attr-defined]
    gradient = _layout(x, weight).weight_gradient
    return any(placement.is_partial() and mesh.size(index) > 1 for index, placement in enumerate(gradient))


def largest_part(weight: Tensor) -> tuple[int, ...]:
    """The shape of the largest part of a weight on any rank, which all ranks compute alike."""
    shape = list(weight.shape)
    if is_dtensor(weight):
        for index, placement in enumerate(weight.placements):  # type: ignore[attr-defined]
            if placement.is_shard():
                shape[placement.dim] = -(-shape[placement.dim] // weight.device_mesh.size(index))  # type: ignore[attr-defined]
    return tuple(shape)


def _layout(x: Any, weight: Any) -> _Layout:
    from torch.distributed.tensor import Partial, Replicate, Shard

    mesh, features = weight.device_mesh, x.dim() - 1
    rows: list[tuple[Any, ...]] = []
    adds_bias = True
    for index, placement in enumerate(weight.placements):
        given = x.placements[index]
        if placement.is_shard(0):
            rows.append((Replicate(), Shard(0), Shard(features), Partial(), Shard(0), Shard(0)))
        elif placement.is_shard(1):
            whole = Shard(features)
            rows.append((whole, Replicate(), Partial(), whole, Shard(1), Replicate()))
            adds_bias = adds_bias and mesh.get_local_rank(index) == 0
        elif given.is_shard() and not given.is_shard(features):
            rows.append((given, Replicate(), given, given, Partial(), Partial()))
        else:
            rows.append((Replicate(),) * 6)
    x_needed, bias, y, of_x, of_weight, of_bias = zip(*rows, strict=True)
    return _Layout(x_needed, bias, y, of_x, of_weight, of_bias, adds_bias)


def _brought_to(tensor: Any, placements: tuple[Any, ...]) -> Any:
    return tensor if tensor.placements == placements else tensor.redistribute(placements=placements)


def _of(weight: Any) -> str:
    return f"a linear layer's weight of shape {tuple(weight.shape)} is a DTensor with placements {weight.placements}"


def _check(x: Any, weight: Any, bias: Any) -> None:
    what = _of(weight)
    if not all(each.is_replicate() or type(each).__name__ == "Shard" for each in weight.placements):
        raise RuntimeError(f"{what}; a product knows Shard(0), Shard(1) and Replicate(): redistribute it")
    for name, tensor in (("input", x), ("bias", bias)):
        if tensor is None:
            continue
        if not is_dtensor(tensor):
            raise RuntimeError(
                f"{what}, and its {name} is a plain tensor: ColwiseParallel() and RowwiseParallel() of "
                "torch.distributed.tensor.parallel bring DTensors; else make one by distribute_tensor"
            )
        if tensor.device_mesh != weight.device_mesh:
            raise RuntimeError(
                f"{what} on {weight.device_mesh}, and its {name} is one on {tensor.device_mesh}: bring both to one mesh"
            )


class _AddedOnce(torch.autograd.Function):
    """The bias on the one rank that adds it to partial sums, zeros on the others. Its gradient, the sum of the output's
    over tokens, is the same on all of them."""

    @staticmethod
    def forward(ctx: Any, bias: Tensor, is_here: bool) -> Tensor:
        return bias.view_as(bias) if is_here else torch.zeros_like(bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Arrived(torch.autograd.Function):
    """The tensor itself, and its gradient, once a collective that makes them has ended. What is on its way is a tensor
    without memory of its own, of which a kernel would get no address."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        return _alias(waited(tensor))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return _alias(waited(gradient))


def _alias(tensor: Tensor) -> Tensor:
    return tensor.view_as(tensor)
