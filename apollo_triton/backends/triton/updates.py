"""What one step does on the kernels: an update for each table."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ...core.implicit_gradient import ImplicitGradient
from ...core.projection import ProjectionCache
from ...core.settings import Settings
from ..interface import ByMember, Factors, Sketch, StepScalars, Update, keeps_sketch
from ..projection import projection_of
from . import dense, dense_rows, implicit, projections, verbs
from .arguments import step_scalars
from .matrices import Table


def updates_of(
    tables: Sequence[Table],
    settings: Mapping[int, Settings],
    counts: Sequence[float],
    step_tensors: Sequence[Tensor] | None,
    cache: ProjectionCache,
) -> list[Update]:
    """The updates of this backend's ``tables``.

    ``settings`` are by the index of the group, ``counts`` (t) and ``step_tensors`` by that of the member. With
    ``step_tensors`` t is on the device. ``cache`` has the P of weights that are sharded along the projected dimension.
    """
    updates: list[Update] = []
    shared: dict[tuple[int, float, torch.device], StepScalars] = {}
    for table in tables:
        table.uses.hold()
        group, step = settings[table.group].with_lr_for(table.device), int(counts[table.first])
        key = table.group, step, table.device
        if key not in shared:
            step_tensor = None if step_tensors is None else step_tensors[table.first]
            shared[key] = step_scalars(group, step, step_tensor, table.device)
        scalars = shared[key]
        if table.is_dense:
            updates.append((DenseRowsUpdate if table.by_rows else DenseUpdate)(table, group, scalars))
            continue
        if group.proj == "svd" or (table.is_width_sharded and not table.projections):
            table.set_projections(_projections(table, group, step, cache))
        updates.append(
            ImplicitUpdate(table, group, scalars) if table.is_implicit else TableUpdate(table, group, scalars)
        )
    return updates


def _projections(table: Table, settings: Settings, step: int, cache: ProjectionCache) -> list[Tensor]:
    """P of each matrix of a table, where it is no buffer's."""
    result: list[Tensor] = []
    for member, geometry in zip(table.members, table.geometries, strict=True):
        P = projection_of(member, settings, step, cache)
        result += list(P) if P.dim() == 3 else [P] * geometry.matrices
    return result


class TableUpdate:
    """One step of the matrices of a low-rank table."""

    def __init__(self, table: Table, settings: Settings, scalars: StepScalars) -> None:
        self.device, self.is_sum_sharded, self.is_width_sharded = (
            table.device,
            table.is_sum_sharded,
            table.is_width_sharded,
        )
        self._table, self._settings, self._scalars = table, settings, scalars
        self._channel_norms: Tensor | None = None  # |G_c|^2 of the local shard, once there is a sketch
        self._kept: Sketch | None = None  # from ``squared_norms`` to ``rescale``
        self._takes_norms_of_R = False  # in place of G's

    def squared_norms(self) -> ByMember:
        table = self._table
        if self._channel_norms is None and keeps_sketch(table.sketch_bytes, table.gradient_bytes, table.is_fused):
            self._kept = self._sketch()
        if self._channel_norms is None:
            norms = dense.squared_norms(table).sum(1)
        else:
            norms = _sum_segments(self._channel_norms, table.channel_counts)
        return {index: norms[matrices] for index, matrices in table.matrices_of.items()}

    def _sketch(self) -> Sketch:
        projections.refresh(self._table, self._settings, self._scalars)
        sketch = verbs.sketch(self._table, self._settings, self._scalars)
        self._channel_norms = sketch.squared_norms
        return sketch

    def sketch(self) -> ByMember:
        table = self._table
        projected, norms = self._sketch()
        if self._settings.scale_type == "channel":
            projected = torch.cat((projected, norms[:, None]), 1)
        result: ByMember = {}
        first = 0
        for index, geometry in zip(table.matrices_of, table.geometries, strict=True):
            last = first + geometry.matrices * geometry.channels
            result[index] = projected[first:last].view(geometry.matrices, geometry.channels, -1)
            first = last
        return result

    def rescale(self, sketches: ByMember, gradient_scale: Tensor | None) -> None:
        table, settings = self._table, self._settings
        self._scalars = self._scalars.scaled(gradient_scale)
        if self._kept is not None:
            self._factors = verbs.rescale(table, settings, self._scalars, self._kept)
            self._kept = None
            return
        if not self.is_width_sharded:
            self._factors = self._sketch_and_rescale()
            return
        projected = torch.cat([sketches[index].flatten(0, 1) for index in table.matrices_of])
        if self._takes_norms_of_R:
            R = projected[:, : table.rank].contiguous()
            sketch = Sketch(R, R.square().sum(1))  # of the whole sketch, not the sum of those of its parts
        elif settings.scale_type == "channel":
            sketch = Sketch(projected[:, :-1].contiguous(), projected[:, -1].contiguous())
        else:  # |G|^2 enters the sums in ``sharded_results``
            sketch = Sketch(
                projected.contiguous(), torch.zeros(len(projected), dtype=torch.float32, device=self.device)
            )
        assert table.moments is not None
        self._factors = verbs.rescale(table.moments, settings, self._scalars, sketch)

    def _sketch_and_rescale(self) -> Factors:
        projections.refresh(self._table, self._settings, self._scalars)
        return verbs.sketch_and_rescale(self._table, self._settings, self._scalars)

    def sharded_results(self) -> tuple[ByMember, ByMember]:
        table, channel = self._table, self._factors.channel
        sums = _sum_segments(self._factors.sums, (table.moments or table).program_counts)
        factors: ByMember = {}
        if channel is not None and self.is_width_sharded:
            first = 0
            for (index, matrices), member in zip(table.matrices_of.items(), table.members, strict=True):
                count, channels = matrices.stop - matrices.start, member.shard.moments
                factors[index] = channel[first : first + count * channels].view(count, channels)
                first += count * channels
        elif self.is_width_sharded and not self._takes_norms_of_R:
            # The local shard's |G|^2 is summed as it lies, not by the channels whose moments are here.
            assert self._channel_norms is not None
            squared, scale = _sum_segments(self._channel_norms, table.channel_counts), self._scalars.gradient_scale
            sums[:, 2] = squared if scale is None else squared * scale * scale
        return factors, {index: sums[matrices] for index, matrices in table.matrices_of.items()}

    def apply(self, factors: ByMember, sums: ByMember) -> None:
        table, channel = self._table, self._factors.channel
        if channel is not None and self.is_width_sharded:
            channel = torch.cat([factors[index].reshape(-1) for index in table.matrices_of])
        own_sums = self._factors.sums
        if self.is_sum_sharded:
            own_sums = _sums_by_program(table, torch.cat([sums[index] for index in table.matrices_of]))
        self._apply(Factors(channel, own_sums))

    def _apply(self, factors: Factors) -> None:
        verbs.apply(self._table, self._settings, self._scalars, factors)
        self._table.scatter_strided()


class ImplicitUpdate(TableUpdate):
    """One step of a matrix whose gradient is never formed."""

    def __init__(self, table: Table, settings: Settings, scalars: StepScalars) -> None:
        super().__init__(table, settings, scalars)
        (member,) = table.members
        gradient = member.gradient
        assert isinstance(gradient, ImplicitGradient)
        self._gradient = gradient
        self._takes_norms_of_R = gradient.limiter_norm == "sketch"

    def squared_norms(self) -> ByMember:
        norm = implicit.squared_norms(self._table, self._gradient).sum(0, keepdim=True)
        return {self._table.first: norm}

    def _sketch(self) -> Sketch:
        sketch = implicit.sketch(self._table, self._settings, self._scalars, self._gradient)
        self._channel_norms = sketch.squared_norms
        return sketch

    def _sketch_and_rescale(self) -> Factors:
        return verbs.rescale(self._table, self._settings, self._scalars, self._sketch())

    def _apply(self, factors: Factors) -> None:
        implicit.apply(self._table, self._settings, self._scalars, factors, self._gradient)


class DenseUpdate:
    """One step of a dense table. It has no sketch: it needs the squared norm of each whole gradient."""

    is_width_sharded = False

    def __init__(self, table: Table, settings: Settings, scalars: StepScalars) -> None:
        self.device, self.is_sum_sharded = table.device, table.is_sum_sharded
        self._table, self._settings, self._scalars = table, settings, scalars
        self._parts: Tensor | None = None

    def _norm_parts(self) -> Tensor:
        """|G|^2 of each gradient in parts: ``[matrices, parts]``."""
        if self._parts is None:
            self._parts = dense.squared_norms(self._table)
        return self._parts

    def squared_norms(self) -> ByMember:
        norms = self._norm_parts().sum(1)
        return {index: norms[matrices] for index, matrices in self._table.matrices_of.items()}

    def sketch(self) -> ByMember:
        return {}

    def rescale(self, sketches: ByMember, gradient_scale: Tensor | None) -> None:
        self._scalars = self._scalars.scaled(gradient_scale)

    def sharded_results(self) -> tuple[ByMember, ByMember]:
        return {}, {index: norms.view(-1, 1) for index, norms in self.squared_norms().items()}

    def apply(self, factors: ByMember, sums: ByMember) -> None:
        table, parts = self._table, self._norm_parts()
        if self.is_sum_sharded:
            parts = torch.zeros_like(parts)
            parts[:, :1] = torch.cat([sums[index] for index in table.matrices_of])
        dense.adamw(table, self._settings, self._scalars, parts)
        table.scatter_strided()


class DenseRowsUpdate(DenseUpdate):
    """The same with one second moment a row, which needs the squared norm of each row too."""

    def __init__(self, table: Table, settings: Settings, scalars: StepScalars) -> None:
        super().__init__(table, settings, scalars)
        self._sums: dense_rows.RowSums | None = None

    def _row_sums(self) -> dense_rows.RowSums:
        if self._sums is None:
            self._sums = dense_rows.row_sums(self._table)
        return self._sums

    def _norm_parts(self) -> Tensor:
        return self._row_sums().parts

    def sharded_results(self) -> tuple[ByMember, ByMember]:
        table, (factors, sums) = self._table, super().sharded_results()
        rows = dense_rows.rows_of(table, self._row_sums())
        for index, member, parts in zip(table.matrices_of, table.members, rows, strict=True):
            if member.shard.row_axes:
                sums[index] = torch.cat((sums[index], parts.sum(1)[None]), 1)
        return factors, sums

    def apply(self, factors: ByMember, sums: ByMember) -> None:
        table, found = self._table, self._row_sums()
        if self.is_sum_sharded:
            found.parts.zero_()[:, :1] = torch.cat([sums[index][:, :1] for index in table.matrices_of])
            for index, parts in zip(table.matrices_of, dense_rows.rows_of(table, found), strict=True):
                if sums[index].shape[1] > 1:
                    parts.zero_()[:, 0] = sums[index][0, 1:]
        dense_rows.adamw(table, self._settings, self._scalars, found)
        table.scatter_strided()


def _sum_segments(values: Tensor, lengths: Tensor) -> Tensor:
    """The sum of each run of rows."""
    # unsafe: else the lengths are read back and checked at every step.
    return torch.segment_reduce(values, "sum", lengths=lengths, axis=0, unsafe=True, initial=0.0)


def _sums_by_program(table: Table, sums: Tensor) -> Tensor:
    """The sums ``[matrices, columns]`` as ``apply`` reads them: all in a matrix's first program, 0 in the others."""
    by_program = torch.zeros(len(table.channel_programs), sums.shape[1], dtype=torch.float32, device=table.device)
    by_program[table.program_counts.cumsum(0) - table.program_counts] = sums
    return by_program
