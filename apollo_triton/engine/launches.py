"""How many kernels a step launches, found by a step that launches none: on tensors of the meta device, without memory.

The tables are those of a plan, and the verbs those of a step, so there is no second account of what launches what.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from ..core import gpu
from ..core.dtensors import local
from ..core.settings import Settings
from ..int8.weight import Int8Weight
from ..params.member import Member, Param
from ..params.sharding import LocalShard
from ..params.state import ALL_MOMENTS, has_begun, state_without_memory, with_codes_named
from .caches import Caches
from .engine import joined
from .fingerprint import States
from .tables import make_tables

if TYPE_CHECKING:
    from ..backends.triton.matrices import Table

_ALIGNMENT = 16  # bytes, of the widest load


class Launches(NamedTuple):
    """``step``: how many kernels every step launches. ``projections``: how many more a step that makes a new P."""

    step: int
    projections: int


def launches_of(
    found: Iterable[tuple[Param, LocalShard]],
    settings: Mapping[int, Settings],
    states: States,
    alone: Collection[Tensor] = (),
) -> Launches:
    """The launches of a step in which each of these parameters has a gradient and the kernels update it.

    A gradient that is not there yet is taken to lie in memory as its weight does. ``alone`` are the parameters that
    have an engine of their own, as with layer-wise updates. Nothing is allocated on a device or changed.
    """
    engines: dict[torch.device, dict[int | None, dict[int, Member]]] = defaultdict(lambda: defaultdict(dict))
    counts: list[float] = []
    for index, (param, shard) in enumerate(found):
        state = states.get(param.tensor, {})
        counts.append(float(state["step"]) if has_begun(state) else 0.0)
        own = index if param.tensor in alone else None
        engines[param.tensor.device][own][index] = _member(param, shard, settings[param.group], state)
    on_device = any(group.capturable for group in settings.values())
    first = second = 0
    for members_of in engines.values():
        caches = Caches()
        made = []
        for members in members_of.values():
            made.append(make_tables(members, settings, counts, on_device, caches))
            first += _launched(made[-1], settings, 1, on_device, caches)  # in which every P is new
        second += sum(_launched(tables, settings, 2, on_device, caches) for tables in made)
    return Launches(second, first - second)


def _member(param: Param, shard: LocalShard, settings: Settings, state: Mapping[str, Any]) -> Member:
    """The parameter's part on this rank, with its gradient and state, as a member without memory."""
    weight = _without_memory(param.tensor)
    gradient = torch.empty_like(weight) if param.tensor.grad is None else _without_memory(param.tensor.grad)
    tensors = state_without_memory(param.tensor, settings, shard)
    if has_begun(state):
        state = with_codes_named(state)
        tensors = {name: value for name, value in tensors.items() if name not in ALL_MOMENTS}
        tensors |= {name: _without_memory(state[name]) for name in (*tensors, *ALL_MOMENTS) if name in state}
    described = Param(param.group, param.index, param.name, weight)
    return Member(described, {"seed": settings.seed, **state, **tensors}, shard, "triton", {weight: gradient})


def _without_memory(tensor: Tensor) -> Tensor:
    """The same on the meta device, with the same strides and as well aligned."""
    here = local(tensor.detach())
    if isinstance(here, Int8Weight):
        return here.to("meta")
    skew = here.data_ptr() % _ALIGNMENT // here.element_size()
    length = 1 + sum((size - 1) * stride for size, stride in zip(here.shape, here.stride(), strict=True))
    whole = torch.empty(skew + max(0, length), dtype=here.dtype, device="meta")
    return whole.as_strided(here.shape, here.stride(), skew)


def _launched(
    tables: Sequence[Table], settings: Mapping[int, Settings], step: int, on_device: bool, caches: Caches
) -> int:
    """The launches of step number ``step``, as ``Engine.run`` goes through it."""
    if not tables:
        return 0
    from ..backends.triton.updates import updates_of

    members = 1 + max(index for table in tables for index in table.matrices_of)
    steps = [torch.empty((), dtype=torch.float32, device="meta")] * members if on_device else None
    with torch.no_grad(), gpu.counting_launches() as kernels:
        updates = updates_of(tables, settings, [step] * members, steps, caches.projections)
        sketches = joined(update.sketch() for update in updates if update.is_width_sharded)
        if any(group.max_grad_norm is not None for group in settings.values()):
            for update in updates:
                update.squared_norms()
        for update in updates:
            update.rescale(sketches, None)
        results = [update.sharded_results() for update in updates if update.is_sum_sharded]
        factors, sums = joined(found for found, _ in results), joined(found for _, found in results)
        for update in updates:
            update.apply(factors, sums)
    return len(kernels)
