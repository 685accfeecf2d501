"""The plan of a step: which parameters take part, checked, and the tables that the kernels will go through.

Making a plan takes milliseconds, so it is kept for as long as parameters, their state and their groups stay what they
are. Finding that out takes about a microsecond a parameter. A plan holds no gradient between steps.
"""

from __future__ import annotations

import ctypes
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..backends.selection import engine_of
from ..core.settings import FIELD_NAMES, LASTING, Settings
from ..int8.weight import Int8Weight
from ..params.checks import check_gradient, check_parameter
from ..params.member import Label, Member, find_piece, labels
from ..params.sharding import Piece, is_dtensor, local
from ..params.state import check_device, check_state, make_state
from .agreement import Agreement
from .collectives import Exchange, finish_gradients

if TYPE_CHECKING:
    from ..backends.triton.projections import Projection
    from ..backends.triton.table import Table


Groups = list[dict[str, Any]]
States = Mapping[Tensor, dict[str, Any]]


class Plan:
    """Who is updated by what in a step.

    ``members``: every parameter with a gradient; ``counts`` and ``steps``: how many steps each has taken, on the host
    and in its state. ``reference``: indices of the members that the reference path updates. ``tables``: for the
    kernels; ``low_rank`` and ``dense`` share them out. ``captured``: whether
    a CUDA graph reads them. ``devices``: where members are. ``exchange`` adds up what several ranks hold pieces of.

    ``projections`` that are in memory already serve on; ``first_number`` is the first parameter's in the optimizer.
    """

    def __init__(
        self,
        groups: Groups,
        states: States,
        settings: list[Settings],
        on_device: bool,
        agreement: Agreement,
        projections: Iterable[Projection] = (),
        first_number: int = 0,
    ) -> None:
        found = _checked(groups, states, settings, on_device, first_number)  # raises before anything changes
        pieces = [piece for _, _, piece, _ in found]
        agreement.check([(label, number) for label, number, _, _ in found], pieces, settings, states)
        finish_gradients(label.parameter for label, _, _, _ in found)
        self.on_device = on_device
        self.captured = False
        self._structure = _structure(settings)
        self.members: list[Member] = []
        self.engines: list[str] = []
        for label, number, piece, engine in found:
            state, own = states[label.parameter], settings[number]
            if "step" not in state:
                state.update(make_state(label, own, piece))
            self.members.append(Member(label, label.parameter, state, number, piece))
            self.engines.append(engine)
        self.devices = {member.parameter.device for member in self.members}
        self.exchange = Exchange(self.members, settings)
        # Read where they are, and not what the host has counted: that holds updates which a scaler had skipped on the
        # device and none that a graph has replayed, and a launch is for parameters of one count.
        self.counts = _values([member.state["step"] for member in self.members])
        self.steps: list[Tensor] = []
        for member in self.members:
            step = member.state["step"].to(member.parameter.device if on_device else "cpu")
            self.steps.append(step)
            member.state["step"] = step
        # The same memory as plain C floats: an addition through torch takes 1.8 us a tensor, half a step of 290.
        self._host_steps = [] if on_device else [ctypes.c_float.from_address(step.data_ptr()) for step in self.steps]
        self.reference = [i for i, engine in enumerate(self.engines) if engine == "reference"]
        self.low_rank: list[Table] = []
        self.dense: list[Table] = []
        if "triton" in self.engines:
            self._make_tables(settings, list(projections))
        self._places, self._gradients = _addresses(groups, states)

    def holds(self, groups: Groups, states: States, settings: list[Settings], on_device: bool, capturing: bool) -> bool:
        """Whether the plan is still right; gradients may have moved, of which the tables are told."""
        if self.exchange.axes:
            finish_gradients(member.parameter for member in self.members)
        places, gradients = _addresses(groups, states)
        if (
            places is None
            or places != self._places
            or on_device != self.on_device
            or _structure(settings) != self._structure
            or not (on_device or [each.value for each in self._host_steps] == self.counts)
        ):
            return False
        if capturing:
            self.captured = True
            for table in self.tables:
                table.move_gradients_in_capture()
        elif gradients != self._gradients or self.captured:
            self._gradients = gradients
            for table in self.tables:
                table.move_gradients()
        return True

    @property
    def tables(self) -> list[Table]:
        """All tables, low-rank ones first."""
        return self.low_rank + self.dense

    def moment_of(self, table: Table) -> tuple[int, Tensor | None]:
        """t of a table's members: on the host, or 0 and where it is on the device."""
        return (0, self.steps[table.first]) if self.on_device else (int(self.counts[table.first]), None)

    def advance(self) -> None:
        """Count one step of every member."""
        self.counts = [count + 1 for count in self.counts]
        if not self.on_device:
            for step, count in zip(self._host_steps, self.counts, strict=True):
                step.value = count
        elif self.steps:
            torch._foreach_add_(self.steps, 1)

    def projections(self) -> list[Projection]:
        """The materialised projections of all tables, each once."""
        unique = {id(each): each for table in self.low_rank for each in table.projections}
        return list(unique.values())

    def _make_tables(self, settings: list[Settings], old: list[Projection]) -> None:
        from ..backends.triton.layout import is_aligned, settle
        from ..backends.triton.table import Int8, Table

        identities = _identities(settings)
        launches: dict[tuple[Any, ...], list[int]] = {}
        for index, (member, engine) in enumerate(zip(self.members, self.engines, strict=True)):
            if engine != "triton":
                continue
            settle(member)
            geometry, piece = member.geometry, member.piece
            key = (
                geometry is None,
                geometry is not None and geometry.keeps_rows,
                bool(piece.summed),
                bool(piece.scattered),
                identities[member.group],
                self.counts[index],
                member.parameter.device,
                member.parameter.dtype,
                Int8.of(member.parameter),
                member.gradient.dtype,
                member.state["exp_avg"].dtype,
                is_aligned(member),
            )
            launches.setdefault(key, []).append(index)
        for key, indices in launches.items():
            members = {index: self.members[index] for index in indices}
            table = Table(members, settings[self.members[indices[0]].group], aligned=key[-1])
            (self.dense if key[0] else self.low_rank).append(table)
        self._place_projections(settings, old)

    def _place_projections(self, settings: list[Settings], old: list[Projection]) -> None:
        """Give the tables whose P is in memory theirs: one a seed and width, shared by all at the same step."""
        from ..backends.triton.projections import Projection, projection_kind
        from ..kernels.sketch import MATERIALISED

        made: dict[tuple[Any, ...], Projection] = {}
        for table in self.low_rank:
            own, count = settings[table.group], self.counts[table.first]
            if projection_kind(own, table.is_scattered) is not MATERIALISED:
                continue
            for seed, start, width in sorted(set(table.slices_of_P)):
                kind = own.distribution, seed, table.rank, start, width, table.device
                key = kind, own.update_proj_gap, count
                if key not in made:
                    # What another plan has made of this epoch serves on; with t on the device it cannot be known.
                    holds = kind, own.epoch(int(count) + 1)
                    made[key] = next(
                        (each for each in old if not self.on_device and (each.kind, each.epoch) == holds),
                        None,
                    ) or Projection.empty(*kind)
                table.projections.append(made[key])
            at = {(each.seed, each.start, each.width): each.buffer for each in table.projections}
            table.point_at([at[each] for each in table.slices_of_P])


def _checked(
    groups: Groups, states: States, settings: list[Settings], on_device: bool, first_number: int
) -> list[tuple[Label, int, Piece, str]]:
    """Every parameter with a gradient, its group, the piece of it that is here and its engine; raises what is wrong
    with any, and changes nothing."""
    if len({each.max_grad_norm for each in settings}) > 1:
        raise ValueError("max_grad_norm differs between parameter groups; it is one norm over all gradients")
    found = []
    for number, label in labels(groups, first_number):
        parameter, own = label.parameter, settings[number]
        if parameter.grad is None:
            continue
        check_parameter(label, own)
        check_gradient(label, parameter.grad)
        state = states.get(parameter, {})
        if "step" in state:
            check_state(label, state, own)
            check_device(label, state)
        try:
            backend = engine_of(parameter, own, state)
        except ValueError as error:
            raise ValueError(f"{label}: {error}") from None
        if on_device and backend.name != "triton":
            raise ValueError(
                f"{label}: capturable=True needs the Triton kernels, which do not update it ({backend.reason}); "
                "use capturable=False"
            )
        if own.capturable and own.proj == "svd" and label.parameter.dim() > 1:
            raise ValueError(f"{label}: proj='svd' reads the step count on the host; use capturable=False")
        piece, name = find_piece(label, own), backend.name
        if not local(parameter).numel():
            # Nothing to update. But an empty piece has a part in the sums, and in low rank a u_prev to keep, to the
            # bit as the other ranks do: on their engine.
            is_matrix = piece.geometry is not None and piece.geometry.matrices > 0
            name = "none" if not is_dtensor(parameter) else name if is_matrix else "reference"
        found.append((label, number, piece, name))
    return found


def _values(steps: list[Tensor]) -> list[float]:
    """Of scalars, which are read together where they are on one device."""
    values = [0.0] * len(steps)
    for device in {step.device for step in steps}:
        here = [index for index, step in enumerate(steps) if step.device == device]
        for index, value in zip(here, torch.stack([steps[index] for index in here]).tolist(), strict=True):
            values[index] = value
    return values


def _identities(settings: list[Settings]) -> list[int]:
    """For each group the first that it can share launches with: all hyperparameters equal, a tensor lr the same one."""
    first: dict[tuple[Any, ...], int] = {}
    result = []
    for number, each in enumerate(settings):
        lr = each.lr.data_ptr() if isinstance(each.lr, Tensor) else each.lr
        key = (isinstance(each.lr, Tensor), lr, *(getattr(each, name) for name in FIELD_NAMES if name != "lr"))
        result.append(first.setdefault(key, number))
    return result


def _structure(settings: list[Settings]) -> list[Any]:
    """What a plan was made for, but for the numbers that may change."""
    return [_identities(settings), *(tuple(getattr(each, name) for name in LASTING) for each in settings)]


def _addresses(groups: Groups, states: States) -> tuple[list[tuple[Any, ...]] | None, list[int]]:
    """Where every parameter with a gradient and its state are, and where the gradients are; None where a tensor has no
    address or there is no state yet. Runs at every step, over every parameter."""
    places: list[tuple[Any, ...]] = []
    gradients: list[int] = []
    try:
        for group in groups:
            for parameter in group["params"]:
                gradient = parameter.grad
                if gradient is None:
                    continue
                state = states.get(parameter)
                if not state:
                    return None, []
                identity, norm = (id(parameter), id(state)), state.get("update_norm")
                exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
                absmax = absmax_sq = 0
                if exp_avg.dtype is torch.uint8:
                    absmax, absmax_sq = (state[name].data_ptr() for name in ("exp_avg_absmax", "exp_avg_sq_absmax"))
                if type(parameter) is Int8Weight:
                    parameter = parameter.q
                elif is_dtensor(parameter):
                    parameter, gradient = local(parameter), local(gradient)
                    exp_avg, exp_avg_sq = local(exp_avg), local(exp_avg_sq)
                    norm = None if norm is None else local(norm)
                address = gradient.data_ptr()
                places.append(
                    (
                        identity,
                        state["step"].data_ptr(),
                        parameter.data_ptr(),
                        exp_avg.data_ptr(),
                        exp_avg_sq.data_ptr(),
                        None if norm is None else norm.data_ptr(),
                        absmax,
                        absmax_sq,
                        address & 15,
                        parameter.shape,
                        parameter.stride(),
                        parameter.dtype,
                        gradient.shape,
                        gradient.stride(),
                        gradient.dtype,
                        gradient.is_neg(),
                    )
                )
                gradients.append(address)
    except (RuntimeError, KeyError):  # a sparse gradient has no address; a foreign state no moments
        return None, []
    return places, gradients
