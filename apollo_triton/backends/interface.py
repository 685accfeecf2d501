"""What a step has to do, cut into works that run the verbs the same way on either engine.

    sketch     only for weights that are cut along their width: R of this rank's part of it
    factors    the moments and the factors, from the sketches that were summed over ranks or from the gradients at once
    shares     what other ranks need of them
    apply      W, given what came back

A work holds the results of one step. Dictionaries are by the index of the member in the plan.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

ByMember = dict[int, Tensor]


class Work(Protocol):
    """One batch, dense parameter or table in one step. ``apply`` returns the skipped updates where it counts them."""

    is_scattered: bool
    is_split: bool
    device: torch.device

    def sketch(self) -> ByMember: ...

    def factors(self, sketches: ByMember, scale: Tensor | None) -> None: ...

    def shares(self) -> tuple[ByMember, ByMember]: ...

    def apply(self, channel: ByMember, sums: ByMember) -> Tensor | None: ...


class Moment(NamedTuple):
    """What one step passes to every launch: t on the host (0 where ``step_tensor``, float32, has it on the device), and
    ``gradient_scale``, a float32 scalar that multiplies every gradient; None for 1."""

    step: int
    step_tensor: Tensor | None
    gradient_scale: Tensor | None


WARM_UP = "a step is captured before one was run as it is: run a step with the same parameters before every capture"


class Sketch(NamedTuple):
    """R ``[matrices, channels, rank]``, and |G_c|^2 ``[matrices, channels]`` (|G|_F^2 ``[matrices, 1]`` for
    ``scale_type="tensor"``), float32. Sums over the projected dimension: additive where that is sharded."""

    projected: Tensor
    squared_norms: Tensor
