"""Any weight seen as matrices of channels x width: which dimension is kept, and which is projected.

A 2-D weight is one matrix. A weight ``[experts, rows, columns]`` is one matrix per expert. A convolution
``[out, in, *kernel]`` is flattened to ``[out, in * prod(kernel)]``. All other code sees only 2-D matrices.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

# What an error says of such a weight (``is_flattened``) after its name.
FLATTENED = (
    "is a flattened FSDP shard: its rows and columns are gone, so it cannot be projected; shard with FSDP2, "
    "torch.distributed.fsdp.fully_shard(model), which keeps them, or wrap with FullyShardedDataParallel(..., "
    "use_orig_params=True, sharding_strategy=NO_SHARD)"
)


@dataclass(frozen=True)
class Geometry:
    """One weight as ``matrices`` matrices of ``[rows, columns]``. Their channels are the rows if ``keeps_rows``, else
    the columns.

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

        ``proj_type`` says which side is projected. ``std`` projects the shorter side (a square matrix keeps its rows),
        ``reverse_std`` the longer side. ``right`` always keeps the rows, ``left`` always the columns. These are the
        rules of apollo-torch 1.0.3, made to work for every shape.
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
        """The number of channels of a matrix, which are independent: the length of the kept dimension."""
        return self.rows if self.keeps_rows else self.columns

    @property
    def width(self) -> int:
        """The length of the projected dimension."""
        return self.columns if self.keeps_rows else self.rows


def is_flattened(parameter: Tensor) -> bool:
    """Whether ``parameter`` is FSDP1's flat parameter or, with use_orig_params=True, a weight's shard of it, a vector.
    Its rows and columns are gone."""
    return getattr(parameter, "_is_flat_param", False) or getattr(parameter, "_fsdp_flattened", False)


def as_matrices(tensor: Tensor, geometry: Geometry) -> list[Tensor]:
    """The ``[rows, columns]`` matrices of a weight or gradient: views if its strides allow it, else copies.

    Only convolutions that are not row-major in memory (``channels_last``) need a copy. Code that writes into such a
    copy must then copy it back into the weight (see ``Batch.write_back``).
    """
    if tensor.dim() != 3:
        return [tensor if tensor.dim() == 2 else tensor.reshape(geometry.rows, geometry.columns)]
    return list(tensor.unbind(0))


def per_matrix(state: Tensor, dimensions: int) -> list[Tensor]:
    """A state tensor of a weight, as one view per matrix; the state of one matrix has ``dimensions`` dimensions."""
    return [state] if state.dim() == dimensions else list(state.unbind(0))
