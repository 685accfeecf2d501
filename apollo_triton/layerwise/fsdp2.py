"""What layer-wise updates know of FSDP2: which gradients it reduces together, and what it holds of them afterwards.

FSDP2 reduces the gradients of a module in one collective. Then it calls the hooks of its parameters, one after the
other, in the stream of the reduction. So all gradients of a module are there at once, as parts of one buffer.

**Why an update there is seen, and nothing reads half of it.** A shard is read by its module's all-gathers alone. That
of this backward is done: the gradients were computed from what it brought. If a module has run twice, it is gathered
twice, and autograd adds its gradients up before there is one to reduce. The next all-gather is in the next forward, and
waits for the caller's stream. That stream waits at the end of backward for an event that FSDP2 records in the
reduction's stream after the hooks.

**Whose memory it is.** What the first update makes there, as moments and tables, is the reduction's stream's. The
caller may read it and let it go: that stream waits for the caller's before each reduction, and takes nothing too early.
A 1-D mesh makes and uses gradients in one stream. For those of HSDP see ``release``.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..core import streams
from ..core.dtensors import is_dtensor


class ShardedModule:
    """What one call of ``fully_shard`` manages. It keeps neither parameters nor modules alive."""

    def __init__(self, state: Any) -> None:
        self._state = weakref.ref(state)
        self._parameters: list[weakref.ref[Tensor]] = []

    def add(self, parameters: list[Tensor]) -> None:
        self._parameters += map(weakref.ref, parameters)

    @property
    def parameters(self) -> list[Tensor]:
        return [parameter for each in self._parameters if (parameter := each()) is not None]

    def release(self) -> None:
        """Let go of the buffer that HSDP has summed over the replicas, whose gradients have been used.

        FSDP2 keeps each module's until the end of backward, because memory that one stream gives back might be taken
        by another while the sum is under way. So the memory is held for the current stream, which is the sum's.
        There is no public way to it. Where the attributes have other names, the buffers stay as FSDP2 keeps them.
        """
        state = self._state()
        groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
        for group in groups:
            buffer = getattr(getattr(group, "_all_reduce_state", None), "all_reduce_input", None)
            if isinstance(buffer, Tensor):
                streams.hold_here(buffer)
                group._all_reduce_state = None


def sharded_modules(model: nn.Module) -> list[ShardedModule]:
    """Everything in ``model`` that ``fully_shard``, or FSDP2's ``replicate``, was called for. A module in it has the
    parameters that no sharded module within it manages."""
    fsdp: Any = sys.modules.get("torch.distributed.fsdp")  # without it there is no such module
    kind = getattr(fsdp, "FSDPModule", None)
    if kind is None:
        return []
    found: dict[int, ShardedModule] = {}
    taken: set[Tensor] = set()
    for module in reversed([*model.modules()]):  # from the bottom up, as they were sharded
        if isinstance(module, kind):
            own = [each for each in _parameters_of(module, kind) if each not in taken]
            state = _state_of(module)
            found.setdefault(id(state), ShardedModule(state)).add(own)
            taken.update(own)
    return [*found.values()]


def _state_of(module: Any) -> Any:
    """What FSDP2 keeps of a module: one for all modules of ``fully_shard([a, b])``. ``fully_shard.state`` does not know
    that of ``replicate``, which is the same within. Without the private name each module is one by itself."""
    find = getattr(module, "_get_fsdp_state", None)
    return module if find is None else find()


def _parameters_of(module: nn.Module, kind: type) -> Iterator[Tensor]:
    """The sharded parameters of ``module`` outside of the modules of ``kind`` within it, each once."""
    waiting, seen = [module], {module}
    for each in waiting:
        new = [child for child in each.children() if not isinstance(child, kind) and child not in seen]
        waiting += new
        seen.update(new)
    yield from {
        parameter: None for each in waiting for parameter in each.parameters(recurse=False) if is_dtensor(parameter)
    }


def wait_for_offloaded(parameter: Tensor) -> None:
    """Wait for the gradient of a weight that ``CPUOffloadPolicy`` keeps on the CPU.

    Before torch 2.13 FSDP2 copies it there without waiting, also if there are hooks, and in the current stream.
    """
    mesh: Any = getattr(parameter, "device_mesh", None)
    if mesh is not None and mesh.device_type != parameter.device.type:
        stream = streams.current(torch.device(mesh.device_type))
        if stream is not None:
            stream.synchronize()
