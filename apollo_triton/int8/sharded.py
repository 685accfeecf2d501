"""How an int8 weight is cut into pieces, for FSDP2 along its rows and for tensor parallel along rows or columns.

The groups of a piece are groups of the whole weight, so that pieces have the bits of the whole. What would let a group
span two pieces is refused, and so are pieces of several sizes.

FSDP2's ``fully_shard`` and ``distribute_tensor`` cut by ``torch.chunk``. The pieces are then sent part by part.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .weight import FUNCTIONS, OPERATIONS, Int8Weight

_aten = torch.ops.aten


def _chunk(weight: Int8Weight, chunks: int, dim: int = 0) -> tuple[Int8Weight, ...]:
    """``torch.chunk``, of equal pieces only: views of rows, or of columns.

    Raises ValueError, before anything is sent, if there are none that hold whole groups.
    """
    dim, length = dim % weight.dim(), weight.shape[dim]
    piece, what = length // chunks, ("rows", "columns")[dim]
    if length % chunks or not length:
        raise ValueError(
            f"{weight.title} cannot be cut into {chunks} equal pieces along its {length} {what}, and int8 weights are "
            f"sharded in no others; use a number of ranks that divides {length}, or leave the layer out of "
            "quantize_model's target_modules"
        )
    run = piece * weight.shape[1] if dim == 0 else piece  # consecutive elements of one piece
    if run % weight.group_size:
        raise ValueError(
            f"{weight.title} has groups of {weight.group_size}, some of which would span two of {chunks} pieces of "
            f"{piece} {what}; use quantize_model(group_size={math.gcd(run, weight.group_size)}), or leave the layer "
            "out of its target_modules"
        )
    return tuple(_slice(weight, dim, start, start + piece) for start in range(0, length, piece))


def _slice(
    weight: Int8Weight, dim: int = 0, start: int | None = 0, end: int | None = None, step: int = 1
) -> Int8Weight:
    """Some rows or columns that hold whole groups, as a view. Of columns the parts are not contiguous:
    ``contiguous()`` makes a weight of them."""
    shape, group_size = weight.shape, weight.group_size
    dim %= weight.dim()
    first, last, step = slice(start, end, step).indices(shape[dim])
    last = max(first, last)
    if (first, last, step) == (0, shape[dim], 1):
        return weight.with_parts(lambda part: part)
    run = shape[1] if weight.dim() == 2 and dim == 0 else 1  # elements of one index
    if step != 1 or first * run % group_size or last * run % group_size or (dim == 1 and shape[1] % group_size):
        raise ValueError(
            f"{weight.title} has groups of {group_size}, and indices {first} to {last} of dimension {dim} do not hold "
            "whole ones; take a slice of weight.dequantize()"
        )
    groups = slice(first * run // group_size, last * run // group_size)
    q = weight.q.narrow(dim, first, last - first)
    if dim == 0:
        return _of_parts(weight, q, weight.scale[groups], weight.zero[groups])
    return _of_parts(weight, q, *(part.view(shape[0], -1)[:, groups] for part in (weight.scale, weight.zero)))


def _of_parts(weight: Int8Weight, q: Tensor, scale: Tensor, zero: Tensor) -> Int8Weight:
    parts = {id(weight.q): q, id(weight.scale): scale, id(weight.zero): zero}
    return weight.with_parts(lambda part: parts[id(part)])


def _new_zeros(weight: Int8Weight, size: Sequence[int], *, dtype: torch.dtype | None = None, **options: Any) -> Tensor:
    """An int8 weight of zeros, which FSDP2 makes before it copies a piece into it. Zeros that are no matrix of whole
    groups, or of another dtype, are no piece: they are what the caller asks for, as those of ``zeros_like``."""
    device = options.get("device") or weight.device
    size, dtype = tuple(size), dtype or weight.dtype
    groups, rest = divmod(math.prod(size), weight.group_size)
    if len(size) != 2 or rest or dtype != weight.dtype:
        return torch.zeros(size, dtype=dtype, device=device)
    return _of_parts(
        weight,
        torch.zeros(size, dtype=torch.uint8, device=device),
        torch.ones(groups, dtype=torch.float32, device=device),
        torch.zeros(groups, dtype=torch.uint8, device=device),
    )


def _as_strided(
    weight: Int8Weight, size: Sequence[int], stride: Sequence[int], storage_offset: int | None = None
) -> Int8Weight:
    """The weight as it is, which FSDP2 asks for."""
    if (tuple(size), tuple(stride), storage_offset or 0) != (tuple(weight.shape), weight.stride(), 0):
        raise NotImplementedError(f"{weight.title} cannot be seen with shape {tuple(size)} and strides {tuple(stride)}")
    return weight.with_parts(lambda part: part)


FUNCTIONS[torch.chunk] = FUNCTIONS[Tensor.chunk] = _chunk
OPERATIONS.update(
    {
        _aten.slice.Tensor: _slice,
        _aten.new_zeros.default: _new_zeros,
        _aten.as_strided.default: _as_strided,
        _aten._pin_memory.default: lambda weight, device=None: weight.with_parts(lambda part: part.pin_memory()),
        _aten.is_pinned.default: lambda weight, device=None: weight.q.is_pinned(),
    }
)
