"""Whether weights share memory: elements of one weight, or two weights of one optimizer.

Kernels update all elements of all weights at once, so that two writes to one place are a race.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from ..core.dtensors import local
from ..int8.weight import Int8Weight
from .member import Param


def check_elements(param: Param) -> None:
    """Raise ValueError for a parameter of which several elements are one place in memory, as ``expand`` makes them."""
    for tensor in _memory_of(param.tensor):
        if overlaps_itself(tensor):
            raise ValueError(
                f"{param} has strides {tensor.stride()}, with which several of its elements are one place in memory "
                "(expand and as_strided make such tensors), and each update would write there again; train the tensor "
                "that was expanded, or give each element its own place: nn.Parameter(weight.detach().clone())"
            )


def check_separate(params: Iterable[Param]) -> None:
    """Raise ValueError for two parameters that overlap in memory. Slices of one buffer that do not are allowed."""
    found: dict[torch.device, list[tuple[int, int, Param, Tensor]]] = {}
    for param in params:
        for tensor in _memory_of(param.tensor):
            if start := address(tensor):
                memory = (start, start + _extent(tensor) * tensor.element_size(), param, tensor)
                found.setdefault(tensor.device, []).append(memory)
    for memories in found.values():
        begun: list[tuple[int, int, Param, Tensor]] = []
        for memory in sorted(memories, key=lambda memory: memory[:2]):
            begun = [other for other in begun if other[1] > memory[0]]
            for other in begun:
                if other[2].tensor is not memory[2].tensor and _overlap(other[3], memory[3]):
                    first, second = sorted((other[2], memory[2]), key=lambda param: param.index)
                    raise ValueError(
                        f"{first} and {second} are two parameters in one place in memory, and each would be updated by "
                        "its own gradient and state; tie them as one nn.Parameter (second.weight = first.weight), or "
                        "give one its own memory: nn.Parameter(weight.detach().clone())"
                    )
            begun.append(memory)


def _memory_of(parameter: Tensor) -> list[Tensor]:
    """What an update writes of a parameter on this rank."""
    tensor = local(parameter)
    parts = (tensor.q, tensor.scale, tensor.zero) if isinstance(tensor, Int8Weight) else (tensor,)
    return [part for part in parts if isinstance(part, Tensor) and part.layout == torch.strided]


def address(tensor: Tensor) -> int:
    """Where a tensor begins; 0 if it has no memory: empty, on the meta device, a FakeTensor, freed by FSDP1."""
    if tensor.is_meta or not tensor.numel() or hasattr(tensor, "fake_mode"):  # which warns if it is asked
        return 0
    try:
        # Of a freed storage a slice's own data_ptr() is its offset.
        return tensor.data_ptr() if tensor.untyped_storage().data_ptr() else 0
    except (RuntimeError, NotImplementedError):  # of a subclass that has none
        return 0


def overlaps_itself(tensor: Tensor) -> bool:
    """Whether several elements of a tensor are one place in memory."""
    if tensor.is_contiguous() or not tensor.numel():
        return False
    reached = 0  # the offset of the last element of the dimensions so far, from the smallest stride up
    nested = True
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1:
            nested = nested and stride > reached
            reached += stride * (size - 1)
    if nested:
        return False
    if tensor.numel() > reached + 1:
        return True
    places = torch.zeros(reached + 1, dtype=torch.bool, device="cpu")  # strides such as (3, 2) may or may not meet
    places.as_strided(tensor.shape, tensor.stride()).fill_(True)
    return int(places.sum()) < tensor.numel()


def _overlap(first: Tensor, second: Tensor) -> bool:
    """Whether two tensors, the first of which begins first, have a byte in common."""
    if first.is_contiguous() and second.is_contiguous():
        return True  # their ranges meet
    start = second.data_ptr() - first.data_ptr()
    size = max(_extent(first) * first.element_size(), start + _extent(second) * second.element_size())
    return bool((_bytes(first, 0, size) & _bytes(second, start, size)).any())


def _bytes(tensor: Tensor, start: int, size: int) -> Tensor:
    """Which of ``size`` bytes a tensor covers that begins at ``start``."""
    width = tensor.element_size()
    places = torch.zeros(size, dtype=torch.bool, device="cpu")
    strides = [stride * width for stride in tensor.stride()]
    places.as_strided((*tensor.shape, width), (*strides, 1), start).fill_(True)
    return places


def _extent(tensor: Tensor) -> int:
    """How many elements' places lie from the first to the last element."""
    return 1 + sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
