"""The plan of a step: which parameters take part, checked, and the tables that the kernels go through.

A plan takes milliseconds to make, so it is kept while parameters, their state and their groups stay what they are. To
find out that nothing has moved takes about a microsecond a parameter. A plan holds no gradient between steps.
"""

from __future__ import annotations

import ctypes
import operator
from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

from ..backends.interface import ByMember, Update
from ..backends.reference import updates as reference
from ..backends.selection import step_backend, updater_of
from ..core.dtensors import is_dtensor, waited
from ..core.settings import Settings
from ..params.aliasing import check_separate
from ..params.blocks import SPANS_RANKS, obstacle_to_8bit
from ..params.checks import check_gradient, check_parameter
from ..params.differences import warn_of_blocks
from ..params.fake import fake_mode_of, make_state_like, real_numbers
from ..params.member import Member, Param, Part, find_shard, gradient_of, group_indices, params_of
from ..params.sharding import LocalShard
from ..params.state import check_count, check_memory, check_state, has_begun, lay_out
from .agreement import Agreement
from .caches import Caches
from .collectives import Collectives, finish_gradients
from .fingerprint import Given, Groups, States, places_of, structure
from .tables import make_tables


class Plan:
    """Who is updated by what in a step.

    ``members``: every parameter with a gradient. ``counts`` and ``steps``: how many steps each has taken, on the host
    and in its state. ``tables``: what the kernels update, low-rank ones first. ``captured``: whether a CUDA graph reads
    the tables. ``devices``: where members are. ``changed``: the parameters that a step writes to. ``collectives`` adds
    up what is sharded. ``clips``: whether all gradients are clipped together, to ``max_grad_norm``.
    """

    def __init__(
        self,
        groups: Groups,
        states: States,
        settings: list[Settings],
        given: Given,
        on_device: bool,
        agreement: Agreement,
        caches: Caches,
    ) -> None:
        self._settings = dict(zip(group_indices(groups), settings, strict=True))
        self._given = dict(given)  # of the current step; ``updates`` empties it
        found = self._checked(groups, states, on_device)  # raises before anything changes
        agreement.check([(param, shard) for param, shard, _ in found], self._settings, states, given)
        without_state = [param for param, _, _ in found if not has_begun(states.get(param.tensor))]
        self._tell_of_blocks(without_state, groups, caches)
        finish_gradients(param.tensor for param, _, _ in found)
        made = [
            None if has_begun(states.get(param.tensor)) else make_state_like(param, self._settings[param.group], shard)
            for param, shard, _ in found
        ]  # all of it before any of it is kept: there may be no memory for the next
        self.members = [
            Member(param, states[param.tensor], shard, backend, self._given) for param, shard, backend in found
        ]
        self.on_device = on_device
        self.captured = False
        self._structure = structure(settings)
        for member, state in zip(self.members, made, strict=True):
            member.state.update(state or {})
            lay_out(member.state, member.parameter, member.geometry is not None)
        self._is_fake = any(fake_mode_of(member.parameter) is not None for member in self.members)
        self.devices = {member.parameter.device for member in self.members}
        self.changed = [member.parameter for member in self.members if member.backend != "none"]
        self.collectives = Collectives(self.members)
        self.max_grad_norm = settings[0].max_grad_norm if settings else None
        self.clips = self.max_grad_norm is not None
        # Read where they are, and not what the host has counted: that holds updates which a scaler had skipped on the
        # device and none that a graph has replayed, and a launch is for parameters of one count.
        with real_numbers(self._is_fake):
            self.counts = _values([member.state["step"] for member in self.members])
        self.steps: list[Tensor] = []
        for member in self.members:
            step = member.state["step"].to(member.parameter.device if on_device else "cpu")
            self.steps.append(step)
            member.state["step"] = step
        # The same memory as plain C floats: an addition through torch takes 1.8 us a tensor, half a step of 290.
        self._host_steps = [] if on_device else [ctypes.c_float.from_address(step.data_ptr()) for step in self.steps]
        self._reference = {i: member for i, member in enumerate(self.members) if member.backend == "reference"}
        on_kernels = {i: member for i, member in enumerate(self.members) if member.backend == "triton"}
        self.tables = make_tables(on_kernels, self._settings, self.counts, on_device, caches)
        self._places = None if self._is_fake else places_of(groups, states, given)

    def _tell_of_blocks(self, new: list[Param], groups: Groups, caches: Caches) -> None:
        """Say once of an optimizer which moments are not 8-bit though ``state_bits`` asks for it, since no rank holds
        whole blocks. Before anything changes, since warnings may be errors."""
        spanning = [] if caches.has_told_of_blocks else _spanning(new, self._settings)
        if not spanning:
            return
        if isinstance(groups, Part):  # the other parts will say nothing
            settings = dict(zip(group_indices(groups.whole), map(Settings.of, groups.whole), strict=True))
            trained = (param for param in params_of(groups.whole) if param.tensor.requires_grad)
            spanning = _spanning(trained, settings)
        warn_of_blocks(spanning)
        caches.has_told_of_blocks = True

    def holds(
        self,
        groups: Groups,
        states: States,
        settings: list[Settings],
        given: Given,
        on_device: bool,
        capturing: bool,
    ) -> bool:
        """Whether the plan is still right. Gradients may have moved; the tables are then told."""
        if self._places is None:
            return False
        if self.collectives.axes:
            finish_gradients(member.parameter for member in self.members)
        gradients = self._places.unless_moved(groups, states, given)
        if (
            gradients is None
            or [*group_indices(groups)] != [*self._settings]
            or on_device != self.on_device
            or not (self._has_read(settings) or structure(settings) == self._structure)
            or not (on_device or [step.value for step in self._host_steps] == self.counts)
        ):
            return False
        self._settings = dict(zip(group_indices(groups), settings, strict=True))
        self._given.update(given)
        if capturing:
            self.captured = True
            for table in self.tables:
                table.update_gradient_addresses_in_capture(gradients)
        elif gradients != self._places.gradients or self.captured:
            for table in self.tables:
                table.update_gradient_addresses(gradients)
        self._places.gradients = gradients
        return True

    def _has_read(self, settings: list[Settings]) -> bool:
        """Whether the settings are the very objects of the last step."""
        return len(settings) == len(self._settings) and all(map(operator.is_, settings, self._settings.values()))

    def advance(self) -> None:
        """Count one step of every member."""
        self.counts = [count + 1 for count in self.counts]
        if not self.on_device:
            for step, count in zip(self._host_steps, self.counts, strict=True):
                step.value = count
        elif self.steps:
            torch._foreach_add_(self.steps, 1)

    def take_back(self, found_inf: Tensor) -> None:
        """Count the step back on the device, if ``found_inf`` is above 0: it was none, and skipped nothing."""
        for device in self.devices:
            overflow = (found_inf.to(device) > 0).float().reshape(())
            steps = [step for step in self.steps if step.device == device]
            torch._foreach_sub_(steps, [overflow] * len(steps))
            for table in self.tables:  # the scale was NaN, so the kernels have counted each of the table's matrices
                if table.device == device:
                    table.skipped -= overflow.int()

    def updates(self, caches: Caches) -> list[Update]:
        """What is to be done in this step, by either backend."""
        settings, cache = self._settings, caches.projections
        updates: list[Update] = []
        try:
            if self._reference:
                updates += reference.updates_of(self._reference, settings, self.counts, cache, caches.scratch)
            if self.tables:
                from ..backends.triton.updates import updates_of  # imports triton

                for table in self.tables:
                    table.gather_strided()
                steps = self.steps if self.on_device else None
                updates += updates_of(self.tables, settings, self.counts, steps, cache)
        finally:
            self._given.clear()  # a plan keeps no gradient alive
        return updates

    def squared_norms(self, updates: Sequence[Update]) -> ByMember:
        """|G|_F^2 of this rank's part of every matrix of every member: ``[all matrices]``, 0 where an expert is not
        here.

        The order is that of the members, which all ranks count alike.
        """
        norms = {index: value for update in updates for index, value in update.squared_norms().items()}
        for index, member in self._reference.items():
            if index not in norms:  # a rank that has no experts of this weight
                norms[index] = torch.zeros(0, dtype=torch.float32, device=member.parameter.device)
        for index, here in norms.items():
            shard = self.members[index].shard
            if shard.whole is not None and len(here) < shard.whole.matrices:
                norms[index] = here.new_zeros(shard.whole.matrices)
                norms[index][shard.first_matrix : shard.first_matrix + len(here)] = here
        return dict(sorted(norms.items()))

    def _checked(self, groups: Groups, states: States, on_device: bool) -> list[tuple[Param, LocalShard, str]]:
        """Every parameter with a gradient, what of it is here, and its backend.

        Raises what is wrong with any of them, and changes nothing.
        """
        if len({settings.max_grad_norm for settings in self._settings.values()}) > 1:
            raise ValueError("max_grad_norm differs between parameter groups; it is one norm over all gradients")
        found = []
        for param in params_of(groups):
            parameter, settings = param.tensor, self._settings[param.group]
            gradient = gradient_of(parameter, self._given)
            if gradient is None:
                continue
            if (arrived := waited(gradient)) is not gradient:
                parameter.grad = gradient = arrived
            check_parameter(param, settings)
            if isinstance(gradient, Tensor):
                check_gradient(param, gradient)
            shard, state = find_shard(param, settings), states.get(parameter, {})
            if has_begun(state):
                check_state(param, state, settings, shard)
            backend = step_backend(param, settings, state, on_device, is_implicit=not isinstance(gradient, Tensor))
            found.append((param, shard, updater_of(backend, parameter, shard)))
        begun = [(param, states[param.tensor]) for param, _, _ in found if has_begun(states.get(param.tensor))]
        with real_numbers(any(fake_mode_of(param.tensor) is not None for param, _ in begun)):
            counts = _values([state["step"] for _, state in begun])
        for (param, state), count in zip(begun, counts, strict=True):
            check_count(param, state, count)
        check_memory(begun)
        check_separate(param for param, _, _ in found)
        return found


def _spanning(params: Iterable[Param], settings: Mapping[int, Settings]) -> list[Param]:
    """The parameters whose moments would be 8-bit if their blocks did not span ranks."""
    wanted = [param for param in params if is_dtensor(param.tensor) and settings[param.group].state_bits == 8]
    return [param for param in wanted if obstacle_to_8bit(param.tensor, settings[param.group]) == SPANS_RANKS]


def _values(steps: list[Tensor]) -> list[float]:
    """Of scalars, which are read together where they are on one device."""
    values = [0.0] * len(steps)
    for device in {step.device for step in steps}:
        here = [index for index, step in enumerate(steps) if step.device == device]
        for index, value in zip(here, torch.stack([steps[index] for index in here]).tolist(), strict=True):
            values[index] = value
    return values
