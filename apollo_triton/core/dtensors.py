"""Whether a tensor is a ``DTensor``, its part on this rank, and a ``DTensor`` of such a part, without the import of
``torch.distributed`` where there is none."""

from __future__ import annotations

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


def placed_as(tensor: Tensor, part: Tensor) -> Tensor:
    """``part`` as this rank's part of a tensor that is cut as ``tensor`` is, with its shape; itself if it is whole."""
    if not is_dtensor(tensor):
        return part
    from torch.distributed.tensor import DTensor

    mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
    shape, strides = tensor.shape, tensor.stride()
    return DTensor.from_local(part, mesh, placements, run_check=False, shape=shape, stride=strides)
