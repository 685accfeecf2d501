"""The kernels on one table in one step."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ...core.settings import Settings
from ..interface import ByMember, Moment, Sketch
from . import projections
from . import verbs as fused

if TYPE_CHECKING:
    from .table import Table


class TableWork:
    """The kernels on one table, low-rank or dense."""

    def __init__(
        self, table: Table, step: int, step_tensor: Tensor | None, settings: Settings, squared_norms: Tensor | None
    ) -> None:
        self.device, self.is_split, self.is_scattered = table.device, table.is_split, table.is_scattered
        self._table, self._settings, self._squared_norms = table, settings, squared_norms
        self._step, self._step_tensor = step, step_tensor
        self._matrices = table.matrices_of
        self._at_scale(None)

    def _at_scale(self, scale: Tensor | None) -> None:
        self._moment = Moment(self._step, self._step_tensor, scale)

    def sketch(self) -> ByMember:
        table, result, first = self._table, {}, 0
        projections.refresh(table, self._settings, self._moment)
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
        self._at_scale(scale)
        table, settings = self._table, self._settings
        if table.is_dense:
            return
        if not self.is_scattered:
            projections.refresh(table, settings, self._moment)
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
