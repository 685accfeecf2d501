"""What a step has to do, cut into works that run the verbs the same way on either engine.

    sketch     only for weights that are cut along their width: R of this rank's part of it
    factors    the moments and the factors, from the sketches that were summed over ranks or from the gradients at once
    shares     what other ranks need of them
    apply      W, given what came back

A work holds the results of one step. Dictionaries are by the index of the member in the plan.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from . import dense, dense_8bit, reference
from .batches import Batch
from .checks import Member
from .plan import Plan
from .reference import Factors, Sketch
from .scratch import Scratch
from .settings import Settings

if TYPE_CHECKING:
    from .tables import Table

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


class BatchWork:
    """The reference path on matrices of one geometry."""

    def __init__(self, batch: Batch, member: Member) -> None:
        self.batch = batch
        self.device = member.parameter.device
        self.is_split, self.is_scattered = bool(member.piece.summed), bool(member.piece.scattered)
        self._matrices: dict[int, slice] = {}
        self._squared_norms: Tensor | None = None

    def add(self, index: int, member: Member, projection: Tensor) -> None:
        """Take in a parameter of the batch's geometry."""
        names = ("exp_avg", "exp_avg_sq", "update_norm", "exp_avg_absmax", "exp_avg_sq_absmax")
        state = {name: member.local_state(name) for name in names if name in member.state}
        first = len(self.batch)
        self.batch.add(member.weight, member.gradient, state, projection, member.piece)
        self._matrices[index] = slice(first, len(self.batch))

    def sketch(self) -> ByMember:
        parts = [reference.sketch(part) for part in self.batch.parts()]
        projected, norms = (torch.cat(each) for each in zip(*parts, strict=True))
        if self.batch.settings.scale_type == "channel":
            projected = torch.cat((projected, norms.unsqueeze(-1)), -1)
        else:
            self._squared_norms = norms  # enter the sums of a tensor as they are
        return {index: projected[matrices] for index, matrices in self._matrices.items()}

    def factors(self, sketches: ByMember, scale: Tensor | None) -> None:
        self.batch.gradient_scale = scale
        results, first = [], 0
        if self.is_scattered:
            projected = torch.cat([sketches[index] for index in self._matrices])
            if self._squared_norms is None:
                projected, norms = projected[..., :-1].contiguous(), projected[..., -1]
            else:
                norms = self._squared_norms
        for part in self.batch.parts():
            if self.is_scattered:
                matrices = slice(first, first + len(part))
                sketch = Sketch(projected[matrices], norms[matrices])
            else:
                sketch = reference.sketch(part)
            results.append(reference.rescale(part, sketch))
            first += len(part)
        self._factors = reference.join(results)

    def shares(self) -> tuple[ByMember, ByMember]:
        channel, sums = self._factors
        own = (
            {}
            if channel is None or not self.is_scattered
            else {index: channel[cut] for index, cut in self._matrices.items()}
        )
        return own, {index: sums[cut] for index, cut in self._matrices.items()}

    def apply(self, channel: ByMember, sums: ByMember) -> Tensor:
        factors = self._factors
        if self.is_split:
            whole = factors.channel
            if whole is not None and self.is_scattered:
                whole = torch.cat([channel[index] for index in self._matrices])
            factors = Factors(whole, torch.cat([sums[index] for index in self._matrices]))
        skipped = reference.apply(self.batch, factors)
        self.batch.write_back()
        return skipped


class DenseWork:
    """The reference path on one dense parameter, which waits for the squared norm of the whole gradient."""

    is_scattered = False

    def __init__(
        self, index: int, member: Member, settings: Settings, step: int, squared_norm: Tensor, scratch: Scratch
    ) -> None:
        self.device, self.is_split = member.parameter.device, bool(member.piece.summed)
        self._index, self._member, self._settings, self._step = index, member, settings, step
        self._squared_norm, self._scratch = squared_norm, scratch
        self._scale: Tensor | None = None

    def sketch(self) -> ByMember:
        return {}

    def factors(self, sketches: ByMember, scale: Tensor | None) -> None:
        self._scale = scale

    def shares(self) -> tuple[ByMember, ByMember]:
        return {}, {self._index: self._squared_norm.view(1, 1)}

    def apply(self, channel: ByMember, sums: ByMember) -> Tensor:
        member, state = self._member, self._member.state
        common = self._settings, self._step, state["seed"], self._scale
        if state["exp_avg"].dtype == torch.uint8:
            return dense_8bit.adamw(member.weight, member.gradient, state, *common, self._squared_norm)
        return dense.adamw(
            member.weight,
            member.gradient,
            {name: member.local_state(name) for name in ("exp_avg", "exp_avg_sq")},
            *common,
            sums[self._index] if self.is_split else self._squared_norm,
            member.piece.first_element,
            self._scratch,
        )


class TableWork:
    """The kernels on one table, low-rank or dense."""

    def __init__(self, table: Table, plan: Plan, settings: Settings, squared_norms: Tensor | None) -> None:
        self.device, self.is_split, self.is_scattered = table.device, table.is_split, table.is_scattered
        self._table, self._settings, self._squared_norms = table, settings, squared_norms
        step, step_tensor = (0, plan.steps[table.first]) if plan.on_device else (int(plan.counts[table.first]), None)
        self._step, self._step_tensor = step, step_tensor
        self._matrices = table.matrices_of
        self._at_scale(None)

    def _at_scale(self, scale: Tensor | None) -> None:
        from . import fused

        self._moment = fused.Moment(self._step, self._step_tensor, scale)

    def sketch(self) -> ByMember:
        from . import fused

        table, result, first = self._table, {}, 0
        fused.refresh(table, self._settings, self._moment)
        projected, norms = fused.sketch(table, self._settings, self._moment)
        if self._settings.scale_type == "channel":
            projected = torch.cat((projected, norms[:, None]), 1)
        else:
            self._squared_norms = norms
        for index, geometry in zip(self._matrices, table.geometries, strict=True):
            last = first + geometry.matrices * geometry.channels
            result[index] = projected[first:last].view(geometry.matrices, geometry.channels, -1)
            first = last
        return result

    def factors(self, sketches: ByMember, scale: Tensor | None) -> None:
        from . import fused

        self._at_scale(scale)
        table, settings = self._table, self._settings
        if table.is_dense:
            return
        if not self.is_scattered:
            fused.refresh(table, settings, self._moment)
            self._factors = fused.factors(table, settings, self._moment)
            return
        projected = torch.cat([sketches[index].flatten(0, 1) for index in self._matrices])
        if settings.scale_type == "channel":
            sketch = Sketch(projected[:, :-1].contiguous(), projected[:, -1].contiguous())
        else:
            sketch = Sketch(
                projected.contiguous(), torch.zeros(len(projected), dtype=torch.float32, device=self.device)
            )
        assert table.moments is not None
        self._factors = fused.rescale(table.moments, settings, self._moment, sketch)

    def shares(self) -> tuple[ByMember, ByMember]:
        from . import fused

        table = self._table
        if table.is_dense:
            assert self._squared_norms is not None
            totals = self._squared_norms.sum(1, keepdim=True)
            return {}, {index: totals[cut] for index, cut in self._matrices.items()}
        totals = fused.matrix_sums(table.moments or table, self._factors)
        channel: ByMember = {}
        if self.is_scattered and self._factors.channel is not None:
            first = 0
            for (index, cut), member in zip(self._matrices.items(), table.members, strict=True):
                matrices, channels = cut.stop - cut.start, member.piece.moments
                channel[index] = self._factors.channel[first : first + matrices * channels].view(matrices, channels)
                first += matrices * channels
        elif self.is_scattered:  # the gradient of a tensor is summed as it lies, not by the channels dealt out
            assert self._squared_norms is not None
            squared = fused.squared_norms_of_matrices(table, self._squared_norms)
            scale = self._moment.gradient_scale
            totals[:, 2] = squared if scale is None else squared * scale * scale
        return channel, {index: totals[cut] for index, cut in self._matrices.items()}

    def apply(self, channel: ByMember, sums: ByMember) -> None:
        from . import fused

        table, settings = self._table, self._settings
        mine = [sums[index] for index in self._matrices] if self.is_split else []
        if table.is_dense:
            assert self._squared_norms is not None
            squared_norms = self._squared_norms
            if mine:
                squared_norms = torch.zeros_like(squared_norms)
                squared_norms[:, :1] = torch.cat(mine)
            fused.dense(table, settings, self._moment, squared_norms)
        else:
            factors = self._factors
            if mine:
                own = [] if factors.channel is None else [factors.channel]
                if own and self.is_scattered:
                    own = [channel[index] for index in self._matrices]
                factors = fused.joined_factors(table, own, mine)
            fused.apply(table, settings, self._moment, factors)
        table.copy_out()
