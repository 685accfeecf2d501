"""Batches: matrices of one geometry and one set of hyperparameters, which the three verbs treat together.

A ``Batch`` is all that an engine sees of a step: lists of ``[rows, columns]`` views with their state, one entry
per matrix (an expert tensor contributes one per expert). It owns nothing and lives for one step.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

from torch import Tensor

from ...core.geometry import Geometry, as_matrices, per_matrix
from ...core.moments_8bit import Blockwise
from ...core.scratch import Scratch
from ...core.settings import Settings
from ...params.sharding import Piece

if TYPE_CHECKING:
    from ...core.operands import Operands


# Parts of a batch whose R has no more elements are stacked, so that rank 1 takes one small operation for many matrices
# (LLaMA-60M, rank 1, 2 cores: 24 ms a step, 42 ms matrix by matrix). A matrix with a larger R is a part of its own.
STACK_ELEMENTS = 1 << 16


@dataclass
class Batch:
    """Matrices alike but for their values, entry i of every list belonging to matrix i.

    weights, gradients ``[rows, columns]``, a gradient that is never formed as ``Operands``; exp_avg, exp_avg_sq
    ``[channels, rank]``, 8-bit ones as ``Blockwise``; update_norm (u_prev), float32 scalars; projections
    ``[rank, width]``, float32; numbers and moment_numbers: from which channel on rounding bits are counted (``Piece``).
    ``step`` is t, counted from 1; ``gradient_scale`` a float32 scalar that multiplies every gradient (clipping),
    None for 1.
    """

    geometry: Geometry
    settings: Settings
    step: int
    seed: int
    scratch: Scratch
    gradient_scale: Tensor | None = None
    weights: list[Tensor] = field(default_factory=list)
    gradients: list[Tensor | Operands] = field(default_factory=list)
    exp_avg: list[Tensor | Blockwise] = field(default_factory=list)
    exp_avg_sq: list[Tensor | Blockwise] = field(default_factory=list)
    update_norm: list[Tensor] = field(default_factory=list)
    projections: list[Tensor] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    moment_numbers: list[int] = field(default_factory=list)
    _copies: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def __len__(self) -> int:
        return len(self.weights)

    def add(
        self,
        parameter: Tensor,
        gradient: Tensor | Operands,
        state: dict[str, Tensor],
        projection: Tensor,
        piece: Piece,
    ) -> None:
        """Append the matrices of one parameter; ``projection`` is shared, or ``[experts, rank, width]`` for svd.

        ``parameter``, ``gradient`` and ``state`` are what this rank holds of it, ``piece``.
        """
        geometry = self.geometry
        if not geometry.matrices:
            return
        weights = as_matrices(parameter, geometry)
        if (
            weights[0] is not parameter
            and weights[0].untyped_storage().data_ptr() != parameter.untyped_storage().data_ptr()
        ):
            self._copies.append((parameter, weights[0]))
        self.weights += weights
        self.gradients += as_matrices(gradient, geometry) if isinstance(gradient, Tensor) else [gradient]
        self.exp_avg += _moments(state, "exp_avg")
        self.exp_avg_sq += _moments(state, "exp_avg_sq")
        self.update_norm += per_matrix(state["update_norm"], 0)
        self.projections += list(projection) if projection.dim() == 3 else [projection] * geometry.matrices
        self.numbers += piece.numbers
        self.moment_numbers += piece.moment_numbers

    def gradient_rows(self, matrix: int, rows: slice) -> Tensor:
        """Some rows of a matrix's gradient in float32, made or converted in memory that the next ones take."""
        gradient = self.gradients[matrix]
        if isinstance(gradient, Tensor):
            return self.scratch.floats(gradient[rows], 1)
        return gradient.rows(rows, self.scratch)

    def parts(self) -> Iterator[Batch]:
        """The batch cut into runs of matrices, in order; results do not depend on the cut."""
        count = max(1, STACK_ELEMENTS // max(1, self.geometry.channels * (self.settings.rank or 1)))
        for start in range(0, len(self), count):
            cut = slice(start, start + count)
            yield replace(self, **{name: getattr(self, name)[cut] for name in _LISTS})

    def write_back(self) -> None:
        """Bring weights whose matrices had to be copies (``channels_last`` convolutions) back into their parameters."""
        for parameter, matrix in self._copies:
            parameter.copy_(matrix.view(parameter.shape))


def _moments(state: dict[str, Tensor], name: str) -> list[Tensor | Blockwise]:
    """One moment of each matrix of a parameter."""
    values = per_matrix(state[name], 2)
    absmax = state.get(f"{name}_absmax")
    if absmax is None:
        return [*values]
    return [Blockwise(q, own, name == "exp_avg") for q, own in zip(values, per_matrix(absmax, 1), strict=True)]


_LISTS = ("weights", "gradients", "exp_avg", "exp_avg_sq", "update_norm", "projections", "numbers", "moment_numbers")
