"""Whether a tensor is a ``DTensor``, which part of it is on this rank, and a ``DTensor`` of such a part, without
importing ``torch.distributed``."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

# The types of a whole tensor. A tensor of any other type is asked whether it is a DTensor, which takes longer.
_WHOLE = (torch.nn.Parameter, Tensor)


def is_dtensor(tensor: Tensor) -> bool:
    """Whether the tensor is a ``DTensor``, without importing the module that defines it."""
    return type(tensor) not in _WHOLE and hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor on this rank: a ``DTensor``'s local shard, any other tensor itself."""
    if not is_dtensor(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()  # type: ignore[attr-defined]


def cuts_of(tensor: Any) -> list[tuple[int, int]]:
    """How a ``DTensor`` was sharded, cut by cut in their order: tensor dimension and index of the mesh dimension."""
    mesh, placements = tensor.device_mesh, tensor.placements
    order: list[int] = []
    for index in reversed(range(mesh.ndim)):
        placement = placements[index]
        if placement.is_partial():
            raise ValueError(f"has placements {placements}: partial sums are no weight; redistribute it")
        if placement.is_replicate():
            continue
        # A strided shard was cut after mesh dimensions to its right, which had made ``split_factor`` shards by then.
        strides, at, shards = getattr(placement, "split_factor", 1), 0, 1
        while shards < strides and at < len(order):
            if placements[order[at]].dim == placement.dim:
                shards *= mesh.size(order[at])
            at += 1
        order.insert(at, index)
    return [(placements[index].dim % tensor.dim(), index) for index in order]


def chunk(length: int, pieces: int, piece: int) -> tuple[int, int]:
    """Where a piece of ``length`` begins, and its length. ``DTensor`` splits as ``torch.chunk`` does."""
    size = -(-length // pieces)
    first = min(piece * size, length)
    return first, min(size, length - first)


def cut(whole: Sequence[int], cuts: Iterable[tuple[int, int, int]]) -> tuple[list[int], list[int]]:
    """The shape of a part of a tensor of shape ``whole``, and the index at which it begins in each dimension. Each cut
    is a dimension, the number of its pieces, and the piece that is taken."""
    shape, offset = list(whole), [0] * len(whole)
    for dim, pieces, piece in cuts:
        first, shape[dim] = chunk(shape[dim], pieces, piece)
        offset[dim] += first
    return shape, offset


def place_of(tensor: Any) -> tuple[list[int], list[int]]:
    """The shape that this rank's part of a ``DTensor`` is to have, and the index at which it begins in each
    dimension."""
    mesh = tensor.device_mesh
    return cut(tensor.shape, ((dim, mesh.size(index), mesh.get_local_rank(index)) for dim, index in cuts_of(tensor)))


def local_slices(tensor: Tensor) -> tuple[slice, ...]:
    """Which part of the whole tensor is on this rank; all of it where it is no ``DTensor``."""
    shape, offset = place_of(tensor) if is_dtensor(tensor) else (list(tensor.shape), [0] * tensor.dim())
    return tuple(slice(first, first + length) for first, length in zip(offset, shape, strict=True))


def as_dtensor(
    part: Tensor, mesh: Any, placements: Sequence[Any], shape: Sequence[int], strides: Sequence[int] | None = None
) -> Tensor:
    """The ``DTensor`` of ``shape`` of which ``part`` is this rank's part, row-major without ``strides``."""
    from torch.distributed.tensor import DTensor

    strides = [math.prod(shape[dim + 1 :]) for dim in range(len(shape))] if strides is None else strides
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=torch.Size(shape), stride=tuple(strides))


def placed_as(tensor: Tensor, part: Tensor) -> Tensor:
    """``part`` as this rank's part of a tensor that is cut as ``tensor`` is, with its shape; itself if it is whole."""
    if not is_dtensor(tensor):
        return part
    return as_dtensor(part, tensor.device_mesh, tensor.placements, tensor.shape, tensor.stride())  # type: ignore[attr-defined]


def waited(tensor: Any) -> Any:
    """The tensor once the collective that makes it has ended. Until then it has no memory of its own."""
    return tensor.wait() if type(tensor).__name__ == "AsyncCollectiveTensor" else tensor  # of torch.distributed
