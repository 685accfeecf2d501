"""The check that ranks agree on parameters, settings and steps, so that their collectives fit each other."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.implicit_gradient import ImplicitGradient
from ..core.settings import PER_STEP, STRUCTURAL, Settings
from ..int8.weight import int8_weight_of
from ..params.fake import fake_mode_of
from ..params.member import Param
from ..params.sharding import LocalShard
from .collectives import gathered, ordered_axes

# A parameter as ranks compare it: what it is, and its settings as "name=value".
Described = list[str]


class Agreement:
    """Finds out whether ranks differ in settings or parameters, which would let them wait for each other for ever.

    Compares at the first step, and again when what takes part in a step has changed.
    """

    def __init__(self) -> None:
        self._known = ""

    def check(
        self,
        found: Sequence[tuple[Param, LocalShard]],
        settings: Mapping[int, Settings],
        states: Mapping[Tensor, dict[str, Any]],
        given: Mapping[Tensor, ImplicitGradient],
        among: Sequence[tuple[Param, LocalShard]] = (),
    ) -> None:
        """Raise ValueError on every rank if ranks that share an axis differ; communicates only if there are axes.

        ``settings`` are by the index of the group, ``given`` the gradients that are never formed. ``among``: parameters
        over whose axes to ask as well, because others may have found one of them. Raises ValueError also for shards
        that have no values to send.
        """
        for param, shard in found:
            has_values = fake_mode_of(param.tensor) is None and not param.tensor.is_meta
            if not has_values and any(axis.size > 1 for axis in shard.mesh_axes):
                raise ValueError(
                    f"{param} is a DTensor without values, over which ranks cannot add up anything; step on whole fake "
                    "or meta tensors, or count bytes with apollo-triton memory"
                )
        asked = [*among, *found]
        axes = ordered_axes([shard for _, shard in asked])
        if not axes:
            return
        params = [param for param, _ in found]
        lasting = [_lasting(param, settings[param.group]) for param in params]
        known = hashlib.sha256(repr(lasting).encode()).hexdigest()
        if known == self._known:
            return
        described = [
            each + _per_step(param, settings[param.group], states.get(param.tensor, {}), given)
            for each, param in zip(lasting, params, strict=True)
        ]
        digest = int.from_bytes(hashlib.sha256(repr(described).encode()).digest()[:7], "big")
        device = asked[0][0].tensor.device
        differs = torch.zeros((), dtype=torch.int64, device=device)
        for axis in axes:  # the flag travels along, so that every rank learns of it
            told = gathered(torch.stack((torch.tensor(digest, device=device), differs)), axis)
            differs = (told[:, 1].any() | (told[:, 0] != digest).any()).to(torch.int64)
        if not differs.item():
            self._known = known
            return
        lists: dict[int, list[Described]] = {torch.distributed.get_rank(): described}
        for axis in axes:
            received: list[Any] = [None] * axis.size
            torch.distributed.all_gather_object(received, lists, group=axis.group)
            lists = {rank: found for other in received for rank, found in other.items()}
        raise ValueError(_difference(lists))


def _lasting(param: Param, settings: Settings) -> Described:
    """A parameter and its settings, to be the same on all ranks at every step."""
    values = [f"{name}={getattr(settings, name)!r}" for name in STRUCTURAL]
    placements = getattr(param.tensor, "placements", "whole")
    weight = int8_weight_of(param.tensor)
    if weight is not None:
        values = [f"group_size={weight.group_size}", f"stochastic_rounding={weight.stochastic_rounding}", *values]
    return [f"{param} {param.tensor.dtype} {placements}", *values]


def _per_step(
    param: Param, settings: Settings, state: Mapping[str, Any], given: Mapping[Tensor, ImplicitGradient]
) -> Described:
    """What may change from step to step, and must then change on all ranks alike. It is compared whenever ranks
    compare, but a change of it is no reason to compare."""
    values = {name: getattr(settings, name) for name in PER_STEP}
    if param.tensor in given:
        values["limiter_norm without a gradient"] = given[param.tensor].limiter_norm
    else:
        values["placements of its gradient"] = getattr(param.tensor.grad, "placements", "whole")
    if "step" in state:
        values |= {"step": state["step"], "seed of its state": state["seed"]}
    read = {name: value.item() if isinstance(value, Tensor) else value for name, value in values.items()}
    return [f"{name}={value!r}" for name, value in read.items()]


def _difference(lists: dict[int, list[Described]]) -> str:
    """The first difference between two ranks: of two dozen settings of a parameter, those that differ."""
    first = min(lists)
    other = next((rank for rank in sorted(lists) if lists[rank] != lists[first]), first)
    end = "build the model and the optimizer alike on all ranks"
    for one, two in zip(lists[first], lists[other], strict=False):
        if one == two:
            continue
        (name, *ours), (other_name, *theirs) = one, two
        if name == other_name and len(ours) == len(theirs):
            unlike = [pair for pair in zip(ours, theirs, strict=True) if pair[0] != pair[1]]
            here, there = (", ".join(side) for side in zip(*unlike, strict=True))
            return f"ranks {first} and {other} differ: {name}: {here} on rank {first}, {there} on rank {other}; {end}"
        here, there = (f"{what}: {', '.join(values)}" for what, *values in (one, two))
        return f"ranks {first} and {other} differ: {here!r} on rank {first}, {there!r} on rank {other}; {end}"
    counts = f"{len(lists[first])} and {len(lists[other])} parameters with gradients"
    return f"ranks {first} and {other} differ: {counts}; {end}"
