"""What PyTorch's operations do with an int8 weight: copies, moves, views of the same shape, ``weight.data = ...``."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.messages import shown
from .weight import FLOATS, FUNCTIONS, OPERATIONS, Int8Weight, refusal

_aten = torch.ops.aten


def _view(weight: Int8Weight, size: Sequence[int]) -> Int8Weight:
    """A view of the same shape, which ``swap_tensors`` makes to find the gradient's node; or flat, and back from that,
    as FSDP2 and DistributedDataParallel keep and send weights."""
    if tuple(size) != tuple(weight.shape) and len(size) != 1 and weight.dim() != 1:
        raise refusal(_aten.view.default)
    return weight.with_parts(lambda part: part.view(size) if part is weight.q else part)


def _clone(weight: Int8Weight, memory_format: torch.memory_format | None = None) -> Int8Weight:
    """A copy whose parts are contiguous. Those of some columns are not, and their scales are ``[out, groups]``."""
    contiguous = weight.with_parts(lambda part: part.clone(memory_format=torch.contiguous_format))
    contiguous.scale, contiguous.zero = contiguous.scale.view(-1), contiguous.zero.view(-1)
    return contiguous


def _to_copy(weight: Int8Weight, *, dtype: torch.dtype | None = None, **options: Any) -> Int8Weight:
    """A copy on another device. Another ``dtype`` is that of activations and gradients only, and costs nothing."""
    if dtype is not None and dtype not in FLOATS:
        raise NotImplementedError(f"an int8 weight stands for floats, and cannot be {dtype}; take its q instead")
    place = {name: value for name, value in options.items() if name in ("device", "non_blocking")}
    return weight.with_parts(lambda part: part.to(copy=True, **place), dtype)


def _copy(target: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
    if not isinstance(target, Int8Weight):
        return target.copy_(source.dequantize(), non_blocking)
    if isinstance(source, Int8Weight):
        source = source if source.is_contiguous() else _clone(source)
        source.check()  # else some parts could be copied and others not
    if not isinstance(source, Int8Weight) or source.shape != target.shape:
        target.assign((source.dequantize() if isinstance(source, Int8Weight) else source).expand(target.shape))
        return target
    if source.group_size != target.group_size:
        for rows in target.blocks(group_size=math.lcm(source.group_size, target.group_size)):
            target.store(rows, source.floats(rows).to(target.device))
        return target
    for name in ("q", "scale", "zero"):
        getattr(target, name).copy_(getattr(source, name), non_blocking)
    return target


def _set_data(weight: Int8Weight, value: Tensor) -> None:
    """``weight.data = value``. PyTorch's own would change the device and dtype that the weight shows, and no part."""
    if isinstance(value, Tensor) and not isinstance(value, Int8Weight):
        if value.shape != weight.shape:
            raise ValueError(
                f"weight.data = {shown(value)}: an int8 weight of shape {tuple(weight.shape)} takes floats of its shape"
            )
        weight.assign(value)
        return
    with torch._C.DisableTorchFunctionSubclass():
        Tensor.data.__set__(weight, value)  # type: ignore[attr-defined]  # refuses what is no tensor
    weight.q, weight.scale, weight.zero, weight.group_size = value.q, value.scale, value.zero, value.group_size


def _like(make: Any) -> Any:
    """``zeros_like`` and similar functions make float tensors, for gradients and moments."""

    def make_like(weight: Int8Weight, *values: Any, memory_format: Any = None, **options: Any) -> Tensor:
        chosen = {name: value for name, value in options.items() if value is not None}
        return make(weight.shape, *values, **{"dtype": weight.dtype, "device": weight.device} | chosen)

    return make_like


def _empty_like(weight: Int8Weight, *, device: torch.device | None = None, **options: Any) -> Int8Weight:
    """An int8 weight without values, as ``nn.Module.to_empty`` needs it."""
    return weight.with_parts(lambda part: torch.empty_like(part, device=device))


FUNCTIONS[Tensor.data.__set__] = _set_data  # type: ignore[attr-defined]
# Else 0, of every weight. Accelerate's FSDP2 tells parameters apart by it.
FUNCTIONS[Tensor.data_ptr] = lambda weight: weight.q.data_ptr()
OPERATIONS.update(
    {
        _aten.detach.default: lambda weight: weight.with_parts(lambda part: part.detach()),
        _aten.alias.default: lambda weight: weight.with_parts(lambda part: part),
        _aten.view.default: _view,
        _aten.view_as.default: lambda weight, other: _view(weight, other.shape),  # in ``inference_mode``
        _aten.clone.default: _clone,
        _aten._to_copy.default: _to_copy,
        _aten.copy_.default: _copy,
        _aten.empty_like.default: _empty_like,
        _aten.zeros_like.default: _like(torch.zeros),
        _aten.ones_like.default: _like(torch.ones),
        _aten.full_like.default: _like(torch.full),
    }
)
