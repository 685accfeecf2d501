"""One step from end to end: the plan, the norm of all gradients if anything needs it, and the verbs of both engines.

What it keeps between steps is made again whenever it is missing: nothing here is state, or saved.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..backends.interface import WARM_UP, Work
from ..backends.reference import verbs as reference
from ..backends.reference.batch import Batch
from ..backends.reference.work import BatchWork, DenseWork
from ..core.geometry import as_matrices
from ..core.projection import top_singular_vectors
from ..core.settings import Settings
from ..params.member import Member
from .agreement import Agreement
from .caches import Caches
from .plan import Groups, Plan, States

if TYPE_CHECKING:
    from .operand_steps import OperandSteps


class Engine:
    """Runs steps. ``gradient_norm`` is that of the last one, where ``max_grad_norm`` asked for it.

    An engine may be given a part of an optimizer's parameters: one group, number ``first_group``, from parameter
    ``first_number`` on. It shares ``caches`` with the other parts.
    """

    def __init__(self, caches: Caches, first_group: int = 0, first_number: int = 0) -> None:
        self.gradient_norm: Tensor | None = None
        self._plan: Plan | None = None
        self._captured: list[Plan] = []
        self._agreement = Agreement()
        self._first_group, self._first_number = first_group, first_number
        self._projections, self._materialised, self._scratch = caches.projections, caches.materialised, caches.scratch
        self._skipped: dict[torch.device, Tensor] = {}

    def skipped(self) -> list[Tensor]:
        """How many updates of a matrix or dense parameter were skipped: int64 scalars to be added up, on the
        parameters' devices."""
        counts = list(self._skipped.values())
        if self._plan is not None:
            counts += [table.skipped.sum() for table in self._plan.tables]
        return counts

    def take_over(self, other: Engine | OperandSteps) -> None:
        """Count another engine's skipped updates as its own, so that it can go."""
        for count in other.skipped():
            self._count_skipped(count)

    @torch._disable_dynamo  # as torch.optim's own methods: torch.compiler.disable imports the compiler at once
    def run(self, groups: Groups, states: States, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        """Update every parameter that has a gradient, which is divided by ``grad_scale``; nothing if ``found_inf``."""
        numbered = enumerate(groups, self._first_group)
        settings = [Settings.of(group, f"parameter group {number}") for number, group in numbered]
        plan = self._planned(groups, states, settings, found_inf)
        plan.advance()
        for table in plan.tables:
            table.copy_in()
        norms = self._squared_norms(plan, settings)
        works = self._works(plan, settings, norms)
        # Autocast would round the projection's operands to half precision.
        with _no_autocast(plan):
            sketches: dict[int, Tensor] = {}
            for work in works:
                if work.is_scattered:
                    sketches |= work.sketch()
            sketches, totals = plan.exchange.scatter(sketches, self._totals(plan, settings, norms))
            scales = self._gradient_scales(plan, settings, totals, grad_scale, found_inf)
            channel: dict[int, Tensor] = {}
            sums: dict[int, Tensor] = {}
            for work in works:
                work.factors(sketches, scales.get(work.device))
                if work.is_split:
                    own_channel, own_sums = work.shares()
                    channel |= own_channel
                    sums |= own_sums
            channel, sums = plan.exchange.gather(channel, sums)
            for work in works:
                skipped = work.apply(channel, sums)
                if skipped is not None:
                    self._count_skipped(skipped)
        if found_inf is not None:  # the step has not been one
            for device in {step.device for step in plan.steps}:
                steps = [step for step in plan.steps if step.device == device]
                torch._foreach_sub_(steps, [found_inf.to(device, torch.float32).clamp(max=1).reshape(())] * len(steps))

    def _planned(self, groups: Groups, states: States, settings: list[Settings], found_inf: Tensor | None) -> Plan:
        """The last step's plan if it still holds, else a new one."""
        plan = self._plan
        # A GradScaler tells of an overflow on the device alone, so the step count must be there too, and stay.
        on_device = (
            found_inf is not None
            or any(each.capturable for each in settings)
            or (plan is not None and plan.on_device and bool(plan.tables))
        )
        capturing = _is_capturing()
        if capturing and not on_device:
            raise RuntimeError(
                "step() is captured in a CUDA graph, which would replay one step's numbers; use capturable=True"
            )
        if plan is None or not plan.holds(groups, states, settings, on_device, capturing):
            if capturing:
                raise RuntimeError(WARM_UP)
            new = Plan(groups, states, settings, on_device, self._agreement, self._materialised, self._first_number)
            if not on_device:  # with t on the device the host does not know what they hold
                self._materialised.update(new.projections())
            if plan is not None:
                for table in plan.tables:
                    self._count_skipped(table.skipped.sum())
                if plan.captured:
                    self._captured.append(plan)  # a graph may be replayed at any time
            self._plan = plan = new
        return plan

    def _squared_norms(self, plan: Plan, settings: list[Settings]) -> dict[int, Tensor]:
        """|G|_F^2 of what waits for it, dense parameters and all that is to be clipped: ``[matrices, parts]`` of each
        table by its ``id``, ``[matrices]`` of each member of the reference path by its index."""
        clips = plan.exchange.clips
        tables = plan.tables if clips else plan.dense
        if tables:
            from ..backends.triton import verbs as fused

            norms = {id(table): fused.squared_norms(table) for table in tables}
        else:
            norms = {}
        for index in plan.reference:
            member = plan.members[index]
            if member.geometry is None:
                norms[index] = reference.squared_norm(member.gradient, self._scratch).reshape(1)
            elif clips:
                squares = [
                    reference.squared_norm(matrix, self._scratch)
                    for matrix in as_matrices(member.gradient, member.geometry)
                ]
                none = torch.zeros(0, dtype=torch.float32, device=member.parameter.device)
                norms[index] = torch.stack(squares) if squares else none
        return norms

    def _totals(self, plan: Plan, settings: list[Settings], norms: dict[int, Tensor]) -> dict[int, Tensor]:
        """|G|_F^2 of this rank's part of every matrix of every member, for clipping: ``[all matrices]``, 0 where an
        expert is not here."""
        if not plan.exchange.clips:
            return {}
        totals = {index: norms[index] for index in plan.reference}
        for table in plan.tables:
            sums = norms[id(table)].sum(1)
            totals |= {index: sums[matrices] for index, matrices in table.matrices_of.items()}
        for index, total in totals.items():
            piece = plan.members[index].piece
            if piece.whole is not None and len(total) < piece.whole.matrices:
                whole = total.new_zeros(piece.whole.matrices)
                whole[piece.first_matrix : piece.first_matrix + len(total)] = total
                totals[index] = whole
        return dict(sorted(totals.items()))

    def _gradient_scales(
        self,
        plan: Plan,
        settings: list[Settings],
        totals: dict[int, Tensor],
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> dict[torch.device, Tensor]:
        """What multiplies all gradients on each device, empty for 1: the clipping coefficient of
        ``torch.nn.utils.clip_grad_norm_``, min(1, max_grad_norm / (norm + 1e-6)), over the finite matrices, times
        1 / ``grad_scale``; NaN, with which nothing moves, if ``found_inf``."""
        limit = settings[0].max_grad_norm if settings and plan.members else None
        self.gradient_norm = None
        scale = None if grad_scale is None else grad_scale.to(torch.float32).reciprocal().reshape(())
        if limit is not None:
            self.gradient_norm = norm = _norm(plan, totals)
            if scale is not None:
                self.gradient_norm = norm = norm * scale.to(norm.device)
            clip = (limit / (norm + 1e-6)).clamp(max=1.0)
            scale = clip if scale is None else clip * scale.to(clip.device)
        if found_inf is not None:
            scale = torch.ones_like(found_inf, dtype=torch.float32) if scale is None else scale.to(found_inf.device)
            scale = torch.where(found_inf > 0, float("nan"), scale).reshape(())
        return {} if scale is None else {device: scale.to(device) for device in plan.devices}

    def _works(self, plan: Plan, settings: list[Settings], norms: dict[int, Tensor]) -> list[Work]:
        """What there is to do, in the plan's order; members of one geometry share a batch."""
        works: list[Work] = []
        batches: dict[tuple[Any, ...], BatchWork] = {}
        for index in plan.reference:
            member, step = plan.members[index], int(plan.counts[index])
            weight, own, seed, geometry = (
                member.parameter,
                settings[member.group],
                member.state["seed"],
                member.geometry,
            )
            if geometry is None:
                works.append(DenseWork(index, member, own, step, norms[index], self._scratch))
                continue
            if not geometry.matrices:
                continue
            axes = member.piece.summed, member.piece.scattered, member.piece.moments
            key = (
                geometry,
                axes,
                id(own),
                step,
                seed,
                weight.device,
                type(weight),
                weight.dtype,
                member.gradient.dtype,
            )
            if key not in batches:
                batches[key] = BatchWork(Batch(geometry, own, step, seed, self._scratch), member)
                works.append(batches[key])
            batches[key].add(index, member, self._projection(member, own, step))
        if plan.tables:
            from ..backends.triton.work import TableWork  # imports triton
        for table in plan.tables:
            own = settings[table.group].with_lr_for(table.device)
            if own.proj == "svd" and not table.is_dense:
                step = int(plan.counts[table.first])
                table.point_at([matrix for each in table.members for matrix in _singular_vectors(each, own, step)])
            elif table.is_scattered and not table.projections:
                step = int(plan.counts[table.first])
                table.point_at(
                    [self._projection(member, own, step) for member in table.members for _ in member.piece.numbers]
                )
            works.append(TableWork(table, *plan.moment_of(table), own, norms.get(id(table))))
        return works

    def _projection(self, member: Member, settings: Settings, step: int) -> Tensor:
        """P of this step for the reference path: from the cache, or svd's own."""
        geometry = member.geometry
        assert geometry is not None
        assert settings.rank is not None
        if settings.proj == "svd":
            _singular_vectors(member, settings, step)
            return member.state["projection"]
        return self._projections.get(
            member.state["seed"],
            settings.epoch(step),
            settings.rank,
            member.piece.first_width,
            member.piece.first_width + geometry.width,
            settings.distribution,
            member.parameter.device,
        )

    def _count_skipped(self, skipped: Tensor) -> None:
        known = self._skipped.get(skipped.device)
        self._skipped[skipped.device] = skipped if known is None else known + skipped


def _singular_vectors(member: Member, settings: Settings, step: int) -> list[Tensor]:
    """svd's P of each matrix, made from the gradient once a period and kept in the state."""
    state, geometry = member.state, member.geometry
    assert geometry is not None
    assert settings.rank is not None
    if "projection" not in state or (step - 1) % settings.update_proj_gap == 0:
        vectors = [
            top_singular_vectors(matrix, settings.rank, geometry.keeps_rows)
            for matrix in as_matrices(member.gradient, geometry)
        ]
        state["projection"] = torch.stack(vectors) if geometry.matrices > 1 else vectors[0]
    projection = state["projection"]
    return list(projection) if projection.dim() == 3 else [projection]


def _norm(plan: Plan, totals: dict[int, Tensor]) -> Tensor:
    """The 2-norm of all matrices' gradients that are finite: float32 scalar on the first parameter's device."""
    device = plan.members[0].parameter.device
    squared = torch.cat(
        [each.to(device) for each in totals.values()] + [torch.zeros(1, dtype=torch.float32, device=device)]
    )
    squared = torch.where(squared.isfinite(), squared, 0)
    # By the largest, so that many large norms do not overflow together.
    largest = squared.max().clamp(min=torch.finfo(torch.float32).tiny)
    return (squared / largest).sum().sqrt() * largest.sqrt()


@contextlib.contextmanager
def _no_autocast(plan: Plan) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for device_type in {device.type for device in plan.devices}:
            stack.enter_context(torch.autocast(device_type, enabled=False))
        yield


def _is_capturing() -> bool:
    """Whether launches now go into a CUDA graph instead of running."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()
