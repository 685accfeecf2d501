"""``Batch``: matrices of one geometry and one set of hyperparameters, which the three verbs update together.

A batch is all that the verbs see of the model: lists of ``[rows, columns]`` views with their state, one entry a matrix.
An expert tensor contributes one entry for each expert. A batch lives for one step. It owns no memory except copies of
weights whose matrices are no views.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ...core.geometry import Geometry, as_matrices, per_matrix
from ...core.implicit_gradient import G_SLOT, ImplicitGradient
from ...core.moments_8bit import Blockwise
from ...core.scratch import Scratch
from ...params.member import Member
from ..interface import Factors

# The parts of a batch hold at most so many elements of R, so that rank 1 takes one small operation for many matrices
# (LLaMA-60M, rank 1, 2 cores: 24 ms a step, 42 ms matrix by matrix). A matrix with a larger R is a part of its own.
STACK_ELEMENTS = 1 << 16


@dataclass
class Batch:
    """Matrices alike except for their values. Entry i of every list belongs to matrix i.

    weights and gradients ``[rows, columns]``, a gradient that is never formed as ``ImplicitGradient``; exp_avg and
    exp_avg_sq ``[channels, rank]``, 8-bit ones as ``Blockwise``; update_norm (u_prev), float32 scalars; projections
    ``[rank, width]``, float32; rounding_offsets and moment_rounding_offsets: the channels from which the bits for
    stochastic rounding are counted (``LocalShard``). ``scale`` is the one of each. ``scratch`` lends float32 memory.
    """

    geometry: Geometry
    scale: float
    seed: int
    scratch: Scratch
    weights: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor | ImplicitGradient] = field(default_factory=list)
    exp_avg: list[Tensor | Blockwise] = field(default_factory=list)
    exp_avg_sq: list[Tensor | Blockwise] = field(default_factory=list)
    update_norm: list[Tensor] = field(default_factory=list)
    projections: list[Tensor] = field(default_factory=list)
    rounding_offsets: list[int] = field(default_factory=list)
    moment_rounding_offsets: list[int] = field(default_factory=list)
    _copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.weights)

    @property
    def rank(self) -> int:
        """The rank of the projections."""
        return len(self.projections[0])

    def add(self, member: Member, projection: Tensor) -> None:
        """Append the matrices of one parameter; ``projection`` is shared, or ``[experts, rank, width]`` for svd."""
        geometry, weight, gradient = self.geometry, member.weight, member.gradient
        weights = as_matrices(weight, geometry)
        if weights[0] is not weight and weights[0].untyped_storage().data_ptr() != weight.untyped_storage().data_ptr():
            self._copies.append((weight, weights[0]))
        self.weights += weights
        self.gradients += as_matrices(gradient, geometry) if isinstance(gradient, Tensor) else [gradient]
        self.exp_avg += _moments(member, "exp_avg")
        self.exp_avg_sq += _moments(member, "exp_avg_sq")
        self.update_norm += per_matrix(member.local_state("update_norm"), 0)
        self.projections += list(projection) if projection.dim() == 3 else [projection] * geometry.matrices
        self.rounding_offsets += member.shard.rounding_offsets
        self.moment_rounding_offsets += member.shard.moment_rounding_offsets

    def gradient_rows(self, matrix: int, rows: slice) -> Tensor:
        """Some rows of a matrix's gradient in float32, in memory that the next call overwrites."""
        gradient = self.gradients[matrix]
        if isinstance(gradient, Tensor):
            return self.scratch.floats(gradient[rows], G_SLOT)
        return gradient.rows(rows, self.scratch)

    def parts(self) -> Iterator[Batch]:
        """The batch cut into runs of matrices, in order. Results do not depend on the cut."""
        count = max(1, STACK_ELEMENTS // max(1, self.geometry.channels * self.rank))
        for start in range(0, len(self), count):
            cut = slice(start, start + count)
            yield replace(self, **{name: getattr(self, name)[cut] for name in _LISTS})

    def write_back(self) -> None:
        """Copy weights whose matrices had to be copies (``channels_last`` convolutions) back into their parameters."""
        for parameter, matrix in self._copies:
            parameter.copy_(matrix.view(parameter.shape))


def joined_factors(parts: list[Factors]) -> Factors:
    """The factors of a whole batch from those of its parts, in order."""
    if len(parts) == 1:
        return parts[0]
    channels = [part.channel for part in parts if part.channel is not None]
    return Factors(torch.cat(channels) if channels else None, torch.cat([part.sums for part in parts]))


_LISTS = (
    "weights",
    "gradients",
    "exp_avg",
    "exp_avg_sq",
    "update_norm",
    "projections",
    "rounding_offsets",
    "moment_rounding_offsets",
)


def _moments(member: Member, name: str) -> list[Tensor | Blockwise]:
    """One moment of each matrix of a parameter."""
    values = per_matrix(member.moment(name), 2)
    if not member.is_8bit:
        return [*values]
    absmaxes = per_matrix(member.local_state(f"{name}_absmax"), 1)
    return [Blockwise(q, absmax, name == "exp_avg") for q, absmax in zip(values, absmaxes, strict=True)]
