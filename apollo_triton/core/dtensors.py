"""Whether a tensor is a ``DTensor``, and its part on this rank, without the import of ``torch.distributed``."""

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
