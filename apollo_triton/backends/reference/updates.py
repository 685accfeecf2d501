"""What one step does on the PyTorch path: an update for each batch of matrices, and one for each dense parameter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ...core.projection import ProjectionCache
from ...core.scale import scale_of
from ...core.scratch import Scratch
from ...core.settings import Settings
from ...params.member import Member, has_row_moments
from ..interface import ByMember, Factors, Sketch, StepScalars, Update, keeps_sketch
from ..projection import projection_of
from . import dense, dense_8bit, dense_rows, verbs
from .matrices import Batch, joined_factors


def updates_of(
    members: Mapping[int, Member],
    settings: Mapping[int, Settings],
    counts: Sequence[float],
    projections: ProjectionCache,
    scratch: Scratch,
) -> list[Update]:
    """The updates of this backend's ``members``, by their index in the plan.

    ``settings`` are by the index of the group and ``counts`` (t) by that of the member. Members of one geometry, scale,
    group, step count, dtype and sharding share a batch.
    """
    updates: list[Update] = []
    batches: dict[tuple[Any, ...], BatchUpdate] = {}
    for index, member in members.items():
        group, step, geometry = settings[member.param.group], int(counts[index]), member.geometry
        if geometry is None:
            dense_update = DenseRowsUpdate if has_row_moments(member.parameter, group) else DenseUpdate
            updates.append(dense_update(index, member, group, step, scratch))
            continue
        if not geometry.matrices:
            continue
        weight, gradient, shard = member.parameter, member.gradient, member.shard
        assert shard.whole is not None
        scale = scale_of(group, shard.whole)
        key = (
            geometry,
            scale,  # shards of one geometry may be of weights of several widths
            (shard.sum_axes, shard.width_axes, shard.moments),
            id(group),
            step,
            member.state["seed"],
            weight.device,
            (type(weight), weight.dtype),
            (isinstance(gradient, Tensor), gradient.dtype),
        )
        if key not in batches:
            batch = Batch(geometry, scale, member.state["seed"], scratch)
            batches[key] = BatchUpdate(batch, member, group, step)
            updates.append(batches[key])
        batches[key].add(index, member, projection_of(member, group, step, projections))
    return updates


class BatchUpdate:
    """One step of the matrices of a batch."""

    def __init__(self, batch: Batch, first: Member, settings: Settings, step: int) -> None:
        self.device = first.parameter.device
        self.is_sum_sharded, self.is_width_sharded = bool(first.shard.sum_axes), bool(first.shard.width_axes)
        self._batch, self._settings, self._scalars = batch, settings, StepScalars(step)
        self._matrices: dict[int, slice] = {}  # of each member
        self._squared_norms: Tensor | None = None  # |G_c|^2 or |G|^2 of the local shard, once there is a sketch
        self._kept: list[tuple[Batch, Sketch]] = []  # of each part, from ``squared_norms`` to ``rescale``

    def add(self, index: int, member: Member, projection: Tensor) -> None:
        """Add a parameter of the batch's geometry."""
        first = len(self._batch)
        self._batch.add(member, projection)
        self._matrices[index] = slice(first, len(self._batch))

    def squared_norms(self) -> ByMember:
        batch, geometry = self._batch, self._batch.geometry
        gradients = [gradient for gradient in batch.gradients if isinstance(gradient, Tensor)]
        R = 4 * len(batch) * geometry.channels * batch.rank
        # As on the kernels: in a cache R costs nothing, and here most of it is in one as long as it is not kept.
        if self._squared_norms is None and keeps_sketch(R, sum(G.nbytes for G in gradients), is_fused=True):
            self._kept = self._sketches()
        if self._squared_norms is None:
            squares = dense.squared_norms(gradients, batch.scratch)
        else:
            squares = self._squared_norms.sum(1)
        return {index: squares[matrices] for index, matrices in self._matrices.items()}

    def _sketches(self) -> list[tuple[Batch, Sketch]]:
        sketches = [(part, verbs.sketch(part, self._settings, self._scalars)) for part in self._batch.parts()]
        self._squared_norms = torch.cat([sketch.squared_norms for _, sketch in sketches])
        return sketches

    def sketch(self) -> ByMember:
        projected = torch.cat([sketch.projected for _, sketch in self._sketches()])
        assert self._squared_norms is not None
        if self._settings.scale_type == "channel":
            projected = torch.cat((projected, self._squared_norms.unsqueeze(-1)), -1)
        return {index: projected[matrices] for index, matrices in self._matrices.items()}

    def rescale(self, sketches: ByMember, gradient_scale: Tensor | None) -> None:
        self._scalars = self._scalars.scaled(gradient_scale)
        if self._kept:
            kept, self._kept = self._kept, []
            self._factors = joined_factors([verbs.rescale(part, self._settings, self._scalars, R) for part, R in kept])
            return
        if not self.is_width_sharded:
            self._factors = verbs.sketch_and_rescale(self._batch, self._settings, self._scalars)
            return
        projected = torch.cat([sketches[index] for index in self._matrices])
        first = self._batch.gradients[0]
        if not isinstance(first, Tensor) and first.limiter_norm == "sketch":
            R = projected[..., : self._batch.rank].contiguous()
            sketch = Sketch(R, R.square().sum(-1))  # of the whole sketch, not the sum of those of its parts
        elif self._settings.scale_type == "channel":
            sketch = Sketch(projected[..., :-1].contiguous(), projected[..., -1])
        else:  # |G|^2 of the local shard, which the limiter's sums add up over ranks
            assert self._squared_norms is not None
            sketch = Sketch(projected, self._squared_norms)
        self._factors = verbs.rescale(self._batch, self._settings, self._scalars, sketch)

    def sharded_results(self) -> tuple[ByMember, ByMember]:
        channel, sums = self._factors
        factors: ByMember = {}
        if channel is not None and self.is_width_sharded:
            factors = {index: channel[matrices] for index, matrices in self._matrices.items()}
        return factors, {index: sums[matrices] for index, matrices in self._matrices.items()}

    def apply(self, factors: ByMember, sums: ByMember) -> Tensor:
        channel = self._factors.channel
        if channel is not None and self.is_width_sharded:
            channel = torch.cat([factors[index] for index in self._matrices])
        total = torch.cat([sums[index] for index in self._matrices]) if self.is_sum_sharded else self._factors.sums
        skipped = verbs.apply(self._batch, self._settings, self._scalars, Factors(channel, total))
        self._batch.write_back()
        return skipped


class DenseUpdate:
    """One step of a dense parameter. It has no sketch: it needs the squared norm of the whole gradient."""

    is_width_sharded = False

    def __init__(self, index: int, member: Member, settings: Settings, step: int, scratch: Scratch) -> None:
        self.device, self.is_sum_sharded = member.parameter.device, bool(member.shard.sum_axes)
        self._index, self._member, self._settings, self._scratch = index, member, settings, scratch
        self._scalars = StepScalars(step)
        self._sums: Tensor | None = None

    def squared_norms(self) -> ByMember:
        if self._sums is None:
            self._sums = dense.squared_norms([self._member.formed_gradient], self._scratch)
        return {self._index: self._sums}

    def sketch(self) -> ByMember:
        return {}

    def rescale(self, sketches: ByMember, gradient_scale: Tensor | None) -> None:
        self._scalars = self._scalars.scaled(gradient_scale)

    def sharded_results(self) -> tuple[ByMember, ByMember]:
        return {}, {index: norm.view(1, 1) for index, norm in self.squared_norms().items()}

    def apply(self, factors: ByMember, sums: ByMember) -> Tensor:
        member = self._member
        adamw = dense_8bit.adamw if member.is_8bit else dense.adamw
        squared_norm = (sums if self.is_sum_sharded else self.squared_norms())[self._index]
        return adamw(member, self._settings, self._scalars, squared_norm, self._scratch)


class DenseRowsUpdate(DenseUpdate):
    """The same with one second moment a row, which needs the squared norm of each row too."""

    def _row_sums(self) -> Tensor:
        """|G|^2 and each |G_i|^2 of what is here: ``[1 + rows]``."""
        if self._sums is None:
            of_rows = dense_rows.row_sums(self._member.formed_gradient, self._scratch)
            self._sums = torch.cat((of_rows.sum(0, keepdim=True), of_rows))
        return self._sums

    def squared_norms(self) -> ByMember:
        return {self._index: self._row_sums()[:1]}

    def sharded_results(self) -> tuple[ByMember, ByMember]:
        return {}, {self._index: self._row_sums()[None, : None if self._member.shard.row_axes else 1]}

    def apply(self, factors: ByMember, sums: ByMember) -> Tensor:
        found = self._row_sums()
        if self.is_sum_sharded:
            whole = sums[self._index].view(-1)
            found = torch.cat((whole, found[len(whole) :]))
        return dense_rows.adamw(self._member, self._settings, self._scalars, found, self._scratch)
