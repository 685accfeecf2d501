"""The check that ranks agree."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.settings import CHANGING, LASTING, Settings
from ..params.member import Label
from ..params.sharding import Piece
from .collectives import _gathered, _ordered_axes


class Agreement:
    """Tells ranks whose settings or parameters differ so, which would otherwise wait for each other for ever.

    Compares at the first step, and again when what takes part in a step has changed.
    """

    def __init__(self) -> None:
        self._known = ""

    def check(
        self,
        found: Sequence[tuple[Label, int]],
        pieces: Sequence[Piece],
        settings: Sequence[Settings],
        states: Mapping[Tensor, dict[str, Any]],
    ) -> None:
        """Raise ValueError on every rank if ranks that share an axis differ; communicates only if there are axes."""
        axes = _ordered_axes(pieces)
        if not axes:
            return
        lasting = [_lasting(label, settings[number]) for label, number in found]
        known = hashlib.sha256("\n".join(lasting).encode()).hexdigest()
        if known == self._known:
            return
        mine = [
            f"{each}, {_changing(label, settings[number], states.get(label.parameter, {}))}"
            for each, (label, number) in zip(lasting, found, strict=True)
        ]
        digest = int.from_bytes(hashlib.sha256("\n".join(mine).encode()).digest()[:7], "big")
        device = found[0][0].parameter.device
        differs = torch.zeros((), dtype=torch.int64, device=device)
        for axis in axes:  # the flag travels along, so that every rank learns of it
            told = _gathered(torch.stack((torch.tensor(digest, device=device), differs)), axis)
            differs = (told[:, 1].any() | (told[:, 0] != digest).any()).to(torch.int64)
        if not differs.item():
            self._known = known
            return
        lists: dict[int, list[str]] = {torch.distributed.get_rank(): mine}
        for axis in axes:
            received: list[Any] = [None] * axis.size
            torch.distributed.all_gather_object(received, lists, group=axis.group)
            lists = {rank: each for other in received for rank, each in other.items()}
        raise ValueError(_difference(lists))


def _lasting(label: Label, settings: Settings) -> str:
    """A parameter and its settings, to be the same on all ranks at every step."""
    values = [f"{name}={getattr(settings, name)!r}" for name in LASTING]
    placements = getattr(label.parameter, "placements", "whole")
    return f"{label} {label.parameter.dtype} {placements}: {', '.join(values)}"


def _changing(label: Label, settings: Settings, state: Mapping[str, Any]) -> str:
    """What may change from step to step, and must then change on all ranks alike: compared when ranks compare, and
    never a reason to."""
    values = {name: getattr(settings, name) for name in CHANGING}
    values["placements of its gradient"] = getattr(label.parameter.grad, "placements", "whole")
    if "step" in state:
        values |= {"step": state["step"], "seed of its state": state["seed"]}
    read = {name: value.item() if isinstance(value, Tensor) else value for name, value in values.items()}
    return ", ".join(f"{name}={value!r}" for name, value in read.items())


def _difference(lists: dict[int, list[str]]) -> str:
    """The first difference between two ranks."""
    first = min(lists)
    other = next((rank for rank in sorted(lists) if lists[rank] != lists[first]), first)
    end = "build the model and the optimizer alike on all ranks"
    for one, two in zip(lists[first], lists[other], strict=False):
        if one != two:
            return f"ranks {first} and {other} differ: {one!r} on rank {first}, {two!r} on rank {other}; {end}"
    counts = f"{len(lists[first])} and {len(lists[other])} parameters with gradients"
    return f"ranks {first} and {other} differ: {counts}; {end}"
