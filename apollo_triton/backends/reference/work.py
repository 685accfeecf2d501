"""The PyTorch path on one batch or dense parameter in one step."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.scratch import Scratch
from ...core.settings import Settings
from ...params.member import Member
from ..interface import ByMember, Sketch
from . import dense, dense_8bit
from . import verbs as reference
from .batch import Batch
from .verbs import Factors


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
