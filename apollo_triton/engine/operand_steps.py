"""The steps of one weight whose gradient is never formed: the same verbs as everywhere, from the operands.

    sketch(X, dY) -> R, |G_c|^2      rescale -> moments, s_c      apply(X, dY) -> W

``engine.py`` plans for what has a gradient; here there is one weight and none. State, step count, settings and checks
are those of any other parameter, so a weight may be updated now by its operands and now by its gradient.
"""

from __future__ import annotations

from typing import Any, Protocol

import torch
from torch import Tensor

from ..backends.interface import Moment
from ..backends.reference import operands as verbs
from ..backends.reference import verbs as reference
from ..backends.reference.batch import Batch
from ..backends.selection import engine_of
from ..core.operands import Operands
from ..core.settings import LASTING, Settings
from ..params.checks import check_parameter
from ..params.member import Label, Member, find_piece
from ..params.state import check_device, check_state, make_state
from .caches import Caches

_STATE = ("exp_avg", "exp_avg_sq", "update_norm", "exp_avg_absmax", "exp_avg_sq_absmax")


class Verbs(Protocol):
    """The three verbs on one weight, by either engine."""

    def step(self, settings: Settings, count: int, operands: Operands, limiter_norm: str) -> None: ...

    def skipped(self) -> list[Tensor]: ...


class OperandSteps:
    """Runs the steps of one low-rank weight from its operands, with autocast off; ``limiter_norm`` is one of
    ``LIMITER_NORMS``."""

    def __init__(self, caches: Caches, label: Label, group_number: int, limiter_norm: str) -> None:
        self._caches, self._label, self._limiter_norm = caches, label, limiter_norm
        self._group_number = group_number
        self._where = f"parameter group {group_number}"
        self._made_for: tuple[Any, ...] = ()
        self._verbs: Verbs | None = None
        self._skipped: list[Tensor] = []

    def skipped(self) -> list[Tensor]:
        """How many updates were skipped: scalars to be added up, on the weight's device."""
        return self._skipped + (self._verbs.skipped() if self._verbs is not None else [])

    @torch._disable_dynamo
    def run(self, group: dict[str, Any], state: dict[str, Any], operands: Operands) -> None:
        """One step; raises what ``APOLLOAdamW.step`` does, before anything changes."""
        settings = Settings.of(group, self._where)
        found = self._identity(settings, state)
        if self._verbs is None or found != self._made_for:
            self._prepare(settings, state)
            self._made_for = self._identity(settings, state)
        assert self._verbs is not None
        count = int(state["step"].tolist()) + 1  # host memory, read without a dispatch
        state["step"].fill_(count)
        self._verbs.step(settings, count, operands, self._limiter_norm)

    def _identity(self, settings: Settings, state: dict[str, Any]) -> tuple[Any, ...]:
        """What the verbs were made for: where weight and state are, and the settings that are no plain numbers."""
        weight = self._label.parameter
        addresses = [state[name].data_ptr() for name in _STATE if name in state]
        place = getattr(weight, "q", weight).data_ptr(), weight.dtype, *weight.stride()
        step = id(state), "step" in state and state["step"].device
        return *place, *addresses, *step, *(getattr(settings, name) for name in LASTING)

    def _prepare(self, settings: Settings, state: dict[str, Any]) -> None:
        label = self._label
        check_parameter(label, settings)
        if "step" in state:
            check_state(label, state, settings)
            check_device(label, state)
        try:
            name = engine_of(label.parameter, settings, state).name
        except ValueError as error:
            raise ValueError(f"{label}: {error}") from None
        piece = find_piece(label, settings)
        if "step" not in state:
            state.update(make_state(label, settings, piece))
        state["step"] = state["step"].to("cpu")
        for key in _STATE[:2]:
            state[key] = state[key].contiguous()
        self._skipped = self.skipped()
        member = Member(label, label.parameter, state, self._group_number, piece)
        self._verbs = _on_kernels(member, settings, self._caches) if name == "triton" else None
        if self._verbs is None:
            self._verbs = OnPyTorch(member, self._caches)


class OnPyTorch:
    """By ``operands.py`` and ``reference.py``."""

    def __init__(self, member: Member, caches: Caches) -> None:
        self._member, self._caches = member, caches
        self._skipped: list[Tensor] = []

    def skipped(self) -> list[Tensor]:
        return self._skipped

    def step(self, settings: Settings, count: int, operands: Operands, limiter_norm: str) -> None:
        member, state, geometry = self._member, self._member.state, self._member.geometry
        assert geometry is not None
        assert settings.rank is not None
        P = self._caches.projections.get(
            state["seed"],
            settings.epoch(count),
            settings.rank,
            0,
            geometry.width,
            settings.distribution,
            member.parameter.device,
        )
        batch = Batch(geometry, settings, count, state["seed"], self._caches.scratch)
        batch.add(member.parameter, operands, {key: state[key] for key in _STATE if key in state}, P, member.piece)
        factors = reference.rescale(batch, verbs.sketch(batch, limiter_norm))
        skipped = reference.apply(batch, factors)
        self._skipped = [skipped + self._skipped[0] if self._skipped else skipped]


def _on_kernels(member: Member, settings: Settings, caches: Caches) -> Verbs | None:
    """The kernels, None where they do not take the weight."""
    from ..backends.triton import operands as fused_operands

    return None if fused_operands.obstacle(member.parameter) else OnKernels(member, settings, caches)


class OnKernels:
    """By ``fused_operands.py``."""

    def __init__(self, member: Member, settings: Settings, caches: Caches) -> None:
        from ..backends.triton.table import OperandTable

        self._table = OperandTable(member, settings, caches.materialised)

    def skipped(self) -> list[Tensor]:
        return [self._table.skipped.sum()]

    def step(self, settings: Settings, count: int, operands: Operands, limiter_norm: str) -> None:
        from ..backends.triton import operands as fused_operands
        from ..backends.triton import verbs as fused

        settings, moment = settings.with_lr_for(self._table.device), Moment(count, None, None)
        sketch = fused_operands.sketch(self._table, settings, moment, operands, limiter_norm)
        factors = fused.rescale(self._table, settings, moment, sketch)
        fused_operands.apply(self._table, settings, moment, factors, operands)
