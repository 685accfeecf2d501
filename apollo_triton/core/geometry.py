"""Any weight seen as matrices of channels x width: which dimension is kept, which is projected.

A 2-D weight is one matrix, ``[experts, rows, columns]`` one per expert, a convolution ``[out, in, *kernel]`` is
flattened to ``[out, in * prod(kernel)]``. Everything after this file sees 2-D matrices only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Geometry:
    """How one weight is cut up: ``matrices`` of ``[rows, columns]``, keeping rows or columns as channels.

    >>> Geometry.of((512, 1376), "std")
    Geometry(matrices=1, rows=512, columns=1376, keeps_rows=False)
    >>> Geometry.of((8, 64, 32), "std").channels
    64
    """

    matrices: int
    rows: int
    columns: int
    keeps_rows: bool

    @classmethod
    def of(cls, shape: Sequence[int], proj_type: str) -> Geometry:
        """The geometry of a weight of two or more dimensions.

        ``std`` projects the shorter side (a square keeps its rows), ``reverse_std`` the longer; ``right``
        always keeps rows, ``left`` always columns. Spec of apollo-torch 1.0.3, made to work in every case.
        """
        matrices = shape[0] if len(shape) == 3 else 1
        rows = shape[1] if len(shape) == 3 else shape[0]
        columns = 1
        for size in shape[2:] if len(shape) == 3 else shape[1:]:
            columns *= size
        keeps_rows = {
            "std": rows >= columns,
            "reverse_std": rows < columns,
            "right": True,
            "left": False,
        }[proj_type]
        return cls(matrices, rows, columns, keeps_rows)

    @property
    def channels(self) -> int:
        """How many independent channels a matrix has: the length of the kept dimension."""
        return self.rows if self.keeps_rows else self.columns

    @property
    def width(self) -> int:
        """The length of the projected dimension."""
        return self.columns if self.keeps_rows else self.rows


def as_matrices(tensor: Tensor, geometry: Geometry) -> list[Tensor]:
    """The ``[rows, columns]`` matrices of a weight or gradient: views where strides allow, else copies.

    Only convolutions whose memory is not laid out row by row (``channels_last``) need a copy; whoever writes
    into the matrices must then bring them back (see ``Batch.write_back``).
    """
    if tensor.dim() != 3:
        return [tensor if tensor.dim() == 2 else tensor.reshape(geometry.rows, geometry.columns)]
    return list(tensor.unbind(0))


def per_matrix(state: Tensor, dimensions: int) -> list[Tensor]:
    """The state of a weight, whose state of one matrix has so many dimensions, cut into one view per matrix."""
    return [state] if state.dim() == dimensions else list(state.unbind(0))
