"""Which parameters layer-wise updates move together, and when: a unit, as soon as all its gradients have come.

A parameter that FSDP2 manages moves with its module, so that a step takes two collectives a module and mesh dimension,
not two a weight. Every other parameter is a unit by itself.

A module may hold parameters that get no gradient in a backward. The unit is *open* then: it moves when the next
module's gradients come, or at the end of backward. Modules come in the same order on all ranks, or FSDP2 itself could
not reduce them, so that no rank waits for an exchange that another one never begins.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Variable

from ..core.dtensors import is_dtensor
from ..core.implicit_gradient import ImplicitGradient
from ..core.settings import Settings
from ..engine.agreement import Agreement
from ..engine.caches import Caches
from ..engine.engine import Engine
from ..optimizer import APOLLOAdamW
from ..params.member import Param, Part, find_shard
from .fsdp2 import ShardedModule, sharded_modules


class Unit:
    """Parameters that move together, by one engine. ``module`` is None for a parameter by itself."""

    def __init__(self, parameters: list[Tensor], module: ShardedModule | None) -> None:
        self.parameters, self.module = parameters, module
        self.engine: Engine | None = None
        self._task = -1  # the backward of which these are
        self._arrived: list[Tensor] = []
        self._missing: set[Tensor] = set()

    def has(self, parameter: Tensor, task: int) -> bool:
        """Whether the gradient of ``parameter`` has come in the backward ``task``, and waits for the others."""
        return self._task == task and any(each is parameter for each in self._arrived)

    def arrive(self, parameter: Tensor, task: int) -> bool:
        """Note that a gradient has come; whether it was the last one that can."""
        if self._task != task or not self._arrived:  # what a backward left that has raised is not of this one
            self._task, self._arrived = task, []
            self._missing = {each for each in self.parameters if each.requires_grad}
        self._arrived.append(parameter)
        self._missing.discard(parameter)
        return not self._missing

    def take(self, task: int) -> list[Tensor]:
        """The parameters whose gradients have come in the backward ``task``. They are to be moved now."""
        arrived, self._arrived = self._arrived, []
        return arrived if self._task == task else []

    def step(
        self,
        params: list[Param],
        groups: list[dict[str, Any]],
        states: Mapping[Tensor, dict[str, Any]],
        caches: Caches,
        given: dict[Tensor, ImplicitGradient],
    ) -> None:
        """One step of ``params``, in any order. What goes wrong names one of them."""
        params = sorted(params, key=attrgetter("index"))
        if self.engine is None:
            self.engine = Engine(caches)
        try:
            self.engine.run(Part(groups, params), states, given=given)
        except (ValueError, RuntimeError) as error:
            if any(str(param) in str(error) for param in params):
                raise
            more = f" and {len(params) - 1} more of its module" if len(params) > 1 else ""
            raise type(error)(f"{params[0]}{more}: {error}") from error


class Units:
    """All units of one handle."""

    def __init__(self, model: nn.Module) -> None:
        self._modules = sharded_modules(model)
        self._units: dict[Tensor, Unit] = {}
        self._open: Unit | None = None
        self._queued = -1  # the backward at whose end open units move
        self._moved: ShardedModule | None = None  # the last module

    def __getitem__(self, parameter: Tensor) -> Unit:
        return self._units[parameter]

    @property
    def engines(self) -> list[Engine]:
        return [unit.engine for unit in {*self._units.values()} if unit.engine is not None]

    def forget(self) -> None:
        """Drop all engines."""
        for unit in self._units.values():
            unit.engine = None

    def regroup(self, parameters: Collection[Tensor]) -> list[Engine]:
        """Make units of ``parameters``, and keep those that stay as they were. Returns the engines of the others."""
        if parameters == self._units.keys():
            return []
        old, known = self._units, {*parameters}
        self._units, self._open = {}, None
        for module in self._modules:
            self._keep_or_make([each for each in module.parameters if each in known], module, old)
        for parameter in parameters:
            if parameter not in self._units:
                self._keep_or_make([parameter], None, old)
        return [unit.engine for unit in {*old.values()} - {*self._units.values()} if unit.engine is not None]

    def _keep_or_make(self, own: list[Tensor], module: ShardedModule | None, old: Mapping[Tensor, Unit]) -> None:
        if own:
            unit = old.get(own[0])
            if unit is None or {*unit.parameters} != {*own}:
                unit = Unit(own, module)
            self._units |= dict.fromkeys(own, unit)

    def is_waiting(self, parameter: Tensor) -> bool:
        """Whether its gradient has come in this backward, and the unit has not moved yet."""
        return self._units[parameter].has(parameter, torch._C._current_graph_task_id())

    def arrive(self, parameter: Tensor, at_end: Callable[[], None]) -> Iterator[tuple[Unit, list[Tensor]]]:
        """Note that a gradient has come. Yields the units that are to move now, with those of their parameters that
        have gradients. ``at_end`` is called at the end of this backward if a unit is open."""
        task = torch._C._current_graph_task_id()
        unit = self._units[parameter]
        is_complete = unit.arrive(parameter, task)
        if unit.module is None:  # its gradient is all there is; others wait on, as it may come at any time
            yield unit, unit.take(task)
            return
        before, self._open = self._open, None if is_complete else unit
        if not is_complete and self._queued != task:
            self._queued = task
            Variable._execution_engine.queue_callback(at_end)
        if before is not None and before is not unit and (waiting := before.take(task)):
            yield before, waiting
        if is_complete:
            yield unit, unit.take(task)

    def left(self) -> Iterator[tuple[Unit, list[Tensor]]]:
        """The unit that is open at the end of backward."""
        unit, self._open = self._open, None
        if unit is not None and (waiting := unit.take(torch._C._current_graph_task_id())):
            yield unit, waiting

    def moved(self, unit: Unit) -> None:
        """Let go of what FSDP2 holds of the gradients of the module before. That of this one it has yet to keep."""
        if unit.module is not None:
            if self._moved is not None and self._moved is not unit.module:
                self._moved.release()
            self._moved = unit.module


class SameUpdates:
    """Finds out whether hooks move other parameters on other ranks.

    A rank on which one had no gradient would go on, while others wait for it in their backward for ever.
    """

    def __init__(self) -> None:
        self._agreement = Agreement()
        self._known: list[int] | None = None
        self._has_begun = False

    def begin(self, parameter: Tensor, params: Collection[Param], optimizer: APOLLOAdamW) -> None:
        """Raise ValueError on every rank if ranks want gradients of other parameters. Asks once, when the first
        gradient of a ``DTensor`` has come: at the next one the collectives of backward itself may not fit each other.
        """
        if not self._has_begun and is_dtensor(parameter):
            wanted = {param.tensor for param in params if param.tensor.requires_grad}
            self._compare(wanted, params, optimizer, Agreement())
            self._has_begun = True

    def check(self, updated: Collection[Tensor], params: Collection[Param], optimizer: APOLLOAdamW) -> None:
        """Raise ValueError on every rank if they have moved others. Compares when these are not those of the step
        before."""
        indices = [param.index for param in params if param.tensor in updated and is_dtensor(param.tensor)]
        if indices != self._known:
            self._compare(updated, params, optimizer, self._agreement)
            self._known = indices

    @staticmethod
    def _compare(
        these: Collection[Tensor], params: Collection[Param], optimizer: APOLLOAdamW, agreement: Agreement
    ) -> None:
        sharded = [param for param in params if is_dtensor(param.tensor)]
        if sharded:
            settings = {
                index: Settings.of(optimizer.param_groups[index], f"parameter group {index}")
                for index in {each.group for each in sharded}
            }
            shards = [(param, find_shard(param, settings[param.group])) for param in sharded]
            found = [(param, shard) for param, shard in shards if param.tensor in these]
            agreement.check(found, settings, optimizer.state, {}, among=shards)
