"""One step from end to end, on either backend: sketch, rescale, apply.

What an engine keeps between steps is made again whenever it is missing. Nothing here is state, and nothing is saved.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import NamedTuple

import torch
from torch import Tensor

from ..backends.interface import WARM_UP, ByMember
from ..core import streams
from ..core.implicit_gradient import ImplicitGradient
from ..core.settings import SettingsReader
from ..params.member import group_indices
from .agreement import Agreement
from .caches import Caches
from .fingerprint import Groups, States
from .plan import Plan


class Scaling(NamedTuple):
    """What a ``torch.amp.GradScaler`` tells a step: float32 scalars on a device, None without a scaler.

    Every gradient is divided by ``grad_scale``. Nothing moves if ``found_inf`` is above 0.
    """

    grad_scale: Tensor | None = None
    found_inf: Tensor | None = None


class Engine:
    """Runs steps. ``gradient_norm`` is that of the last one, where ``max_grad_norm`` asked for it.

    An engine may be given a part of an optimizer's parameters, as a ``Part`` of its groups. It shares ``caches`` with
    the engines of the other parts.
    """

    def __init__(self, caches: Caches) -> None:
        self.gradient_norm: Tensor | None = None
        self._caches = caches
        self._readers: list[SettingsReader] = []
        self._agreement = Agreement()
        self._plan: Plan | None = None
        self._captured: list[Plan] = []  # a graph that was captured may be replayed at any time
        self._skipped: dict[torch.device, Tensor] = {}

    @torch._disable_dynamo  # as torch.optim's own methods: torch.compiler.disable imports the compiler at once
    def run(
        self,
        groups: Groups,
        states: States,
        scaling: Scaling = Scaling(),  # noqa: B008  (immutable)
        given: Mapping[Tensor, ImplicitGradient] | None = None,
    ) -> None:
        """Update every parameter that has a gradient, in ``.grad`` or among the ``given`` ones.

        Raises ValueError or RuntimeError, before anything changes, for what cannot be updated.
        """
        if torch.is_inference_mode_enabled():  # what a step makes there could not be changed outside
            with torch.inference_mode(False), torch.no_grad():
                return self.run(groups, states, scaling, given)
        plan = self._plan_for(groups, states, scaling, given or {})  # kept while nothing has moved
        plan.advance()
        updates = plan.updates(self._caches)
        with _no_autocast(plan.devices):  # autocast would round the products of the projection
            # G -> R, only if R must be summed over ranks. Elsewhere ``squared_norms`` makes R, or without clipping
            # ``rescale``, on a GPU in the same launch.
            sketches = joined(update.sketch() for update in updates if update.is_width_sharded)
            norms = plan.squared_norms(updates) if plan.clips else {}
            sketches, norms = plan.collectives.sum_sketches(sketches, norms)
            scales = self._gradient_scales(plan, norms, scaling)
            for update in updates:
                update.rescale(sketches, scales.get(update.device))  # R -> M, V, s
            results = [update.sharded_results() for update in updates if update.is_sum_sharded]
            factors, sums = joined(found for found, _ in results), joined(found for _, found in results)
            factors, sums = plan.collectives.gather_factors(factors, sums)
            for update in updates:
                self._count_skipped(update.apply(factors, sums))  # s, G -> W
        torch.autograd.graph.increment_version(plan.changed)  # autograd does not see what kernels write
        if scaling.found_inf is not None:
            plan.take_back(scaling.found_inf)

    def skipped(self) -> list[Tensor]:
        """How many updates of a matrix or dense parameter were skipped: int64 scalars to be added up, on the devices of
        the parameters."""
        counts = list(self._skipped.values())
        for count in counts:
            streams.hold_here(count)
        if self._plan is not None:
            counts += [table.count_skipped() for table in self._plan.tables]
        return counts

    def take_over(self, other: Engine) -> None:
        """Count another engine's skipped updates as its own, so that the other engine can be dropped."""
        for count in other.skipped():
            self._count_skipped(count)

    def _plan_for(
        self, groups: Groups, states: States, scaling: Scaling, given: Mapping[Tensor, ImplicitGradient]
    ) -> Plan:
        """The last step's plan if it still holds, else a new one."""
        while len(self._readers) < len(groups):
            self._readers.append(SettingsReader())
        settings = [
            reader.read(group, f"parameter group {index}")
            for index, group, reader in zip(group_indices(groups), groups, self._readers, strict=False)
        ]
        plan = self._plan
        # A GradScaler tells of an overflow on the device alone, so the step count must be there too, and stay.
        on_device = (
            scaling.found_inf is not None
            or any(group.capturable for group in settings)
            or (plan is not None and plan.on_device and bool(plan.tables))
        )
        capturing = _is_capturing()
        if capturing and not on_device:
            raise RuntimeError(
                "step() is captured in a CUDA graph, which would replay one step's numbers; use capturable=True"
            )
        if plan is not None and plan.holds(groups, states, settings, given, on_device, capturing):
            return plan
        if capturing:
            raise RuntimeError(WARM_UP)
        self._plan = Plan(groups, states, settings, given, on_device, self._agreement, self._caches)
        if plan is not None:
            for table in plan.tables:
                self._count_skipped(table.count_skipped())
            if plan.captured:
                self._captured.append(plan)
        return self._plan

    def _gradient_scales(self, plan: Plan, norms: ByMember, scaling: Scaling) -> dict[torch.device, Tensor]:
        """What multiplies all gradients on each device, empty for 1.

        The clipping coefficient of ``torch.nn.utils.clip_grad_norm_``, min(1, max_grad_norm / (norm + 1e-6)), over the
        finite matrices, times 1 / ``grad_scale``; NaN, with which nothing moves, if ``found_inf``.
        """
        grad_scale, found_inf = scaling
        scale = None if grad_scale is None else grad_scale.to(torch.float32).reciprocal().reshape(())
        self.gradient_norm = None
        if plan.max_grad_norm is not None and plan.members:
            self.gradient_norm = norm = _norm(norms, plan.members[0].parameter.device)
            if scale is not None:
                self.gradient_norm = norm = norm * scale.to(norm.device)
            clip = (plan.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
            scale = clip if scale is None else clip * scale.to(clip.device)
        if found_inf is not None:
            scale = torch.ones_like(found_inf, dtype=torch.float32) if scale is None else scale.to(found_inf.device)
            scale = torch.where(found_inf > 0, float("nan"), scale).reshape(())
        return {} if scale is None else {device: scale.to(device) for device in plan.devices}

    def _count_skipped(self, skipped: Tensor | None) -> None:
        if skipped is not None:
            known = self._skipped.get(skipped.device)
            if known is not None:
                streams.hold_here(known)
            self._skipped[skipped.device] = skipped if known is None else known + skipped


def joined(results: Iterable[ByMember]) -> ByMember:
    """The results of several updates as one dictionary."""
    return {index: value for result in results for index, value in result.items()}


def _norm(squared_norms: ByMember, device: torch.device) -> Tensor:
    """The 2-norm of all matrices' gradients that are finite: float32 scalar on ``device``."""
    none = torch.zeros(1, dtype=torch.float32, device=device)
    squared = torch.cat([norms.to(device) for norms in squared_norms.values()] + [none])
    squared = torch.where(squared.isfinite(), squared, 0)
    # By the largest, so that many large norms do not overflow together.
    largest = squared.max().clamp(min=torch.finfo(torch.float32).tiny)
    return (squared / largest).sum().sqrt() * largest.sqrt()


def _no_autocast(devices: Iterable[torch.device]) -> AbstractContextManager[object]:
    """Autocast off wherever it is on. Where it is off a context would cost 7 us."""
    stack: ExitStack | None = None  # it takes 1 us itself
    for device_type in {device.type for device in devices}:
        if torch.amp.is_autocast_available(device_type) and torch.is_autocast_enabled(device_type):
            stack = stack or ExitStack()
            stack.enter_context(torch.autocast(device_type, enabled=False))
    return stack or nullcontext()


def _is_capturing() -> bool:
    """Whether launches now go into a CUDA graph instead of running."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
