"""The optimizer's update of fake tensors, run on twins of the meta device.

A step on fake tensors computes nothing. On the meta device every operation of a step runs, so what it allocates in
passing can be followed, and with the kernels' code nothing is launched.
"""

from __future__ import annotations

from collections import defaultdict
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import unset_fake_temporarily

from ...core import gpu
from ...core.dtensors import is_dtensor, local, placed_as
from ...int8.weight import Int8Weight
from ...params.member import Param, Part

if TYPE_CHECKING:
    from .storages import Storages


class Twins:
    """Twins of parameters, with their states. ``kernels``: they are updated by the code of the kernels."""

    def __init__(self, storages: Storages, kernels: bool) -> None:
        self._storages, self._kernels = storages, kernels
        self._of: dict[Tensor, Tensor] = {}
        self._states: dict[Tensor, dict[str, Any]] = defaultdict(dict)

    def run(self, run: Any, engine: Any, groups: Any, *arguments: Any, **options: Any) -> list[dict[str, Any]]:
        """``run`` with twins instead of the groups' parameters. Returns their states."""
        with unset_fake_temporarily():
            with self._storages.paused():
                twins = self._groups(groups)
            try:
                with gpu.counting_launches() if self._kernels else nullcontext():
                    run(engine, twins, self._states, *arguments, **options)
            finally:
                for group in twins:
                    for parameter in group["params"]:
                        parameter.grad = None
        return [self._states[parameter] for group in twins for parameter in group["params"]]

    def _groups(self, groups: Any) -> Any:
        if not isinstance(groups, Part):
            return [self._group(group) for group in groups]
        by_index = {index: self._group(group) for index, group in zip(groups.group_indices, groups, strict=True)}
        params = [Param(param.group, param.index, param.name, self._of[param.tensor]) for param in groups.params]
        return Part(by_index, params)

    def _group(self, group: dict[str, Any]) -> dict[str, Any]:
        for parameter in group["params"]:
            if parameter not in self._of:
                self._of[parameter] = self._made(parameter)
                self._of[parameter].requires_grad_(parameter.requires_grad)
            self._of[parameter].grad = None if parameter.grad is None else self._made(parameter.grad)
        return {**group, "params": [self._of[parameter] for parameter in group["params"]]}

    def _made(self, tensor: Tensor) -> Tensor:
        """A twin that is not counted: the tensor itself is."""
        made = twin(tensor)
        self._storages.ignore([made])
        return made


def twin(tensor: Tensor) -> Tensor:
    """A tensor of the same kind, shape and strides on the meta device."""
    tensor = tensor.detach()
    if is_dtensor(tensor):
        return placed_as(tensor, twin(local(tensor)))
    if isinstance(tensor, Int8Weight):
        return tensor.with_parts(twin)
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
