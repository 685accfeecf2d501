"""Weights that are sharded over devices: the shard on this rank, and the mesh dimensions over which its sums are split.

The local tensor of a ``DTensor`` weight (FSDP2, tensor parallel, or both) is a shard of matrices. The shape of the
whole weight decides which dimension is kept. If the kept dimension is sharded, everything except the limiter's sums is
local. If the projected dimension is sharded, the sketch is a sum over ranks, and each rank keeps the moments of its own
slice of the channels. In both cases the moments on a rank shrink as ranks are added.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.dtensors import as_dtensor, chunk, cut, cuts_of, is_dtensor, local, place_of
from ..core.geometry import Geometry


@dataclass(frozen=True)
class MeshAxis:
    """One mesh dimension: the ranks that hold shards along it, identified by the name of their process group."""

    name: str
    size: int
    rank: int
    group: Any = field(compare=False, repr=False)


@dataclass(frozen=True)
class LocalShard:
    """What this rank holds of a weight. With one GPU you can skip this class: a whole weight is a shard without axes.

    ``geometry`` describes the shard's matrices, ``whole`` those of the whole weight. Both are None for dense AdamW.
    ``first_matrix``, ``first_channel`` and ``first_width`` are the indices in the weight at which the shard begins.
    ``first_element`` is the number of elements in all shards before it.

    ``mesh_axes`` are all axes of the weight's mesh, and ``shard_axes`` those that shard the weight. ``sum_axes`` are
    those over which a matrix's sums are split: all shard axes except one that distributes experts. ``width_axes`` are
    those that shard the projected dimension. ``row_axes`` are those that cut the rows of a dense weight, over which the
    sums of its rows are split.

    This rank keeps the moments of ``moments`` channels, from ``first_moment`` on.
    """

    geometry: Geometry | None
    whole: Geometry | None
    first_matrix: int = 0
    first_channel: int = 0
    first_width: int = 0
    first_element: int = 0
    shard_axes: tuple[MeshAxis, ...] = ()
    sum_axes: tuple[MeshAxis, ...] = ()
    width_axes: tuple[MeshAxis, ...] = ()
    row_axes: tuple[MeshAxis, ...] = ()
    mesh_axes: tuple[MeshAxis, ...] = ()
    first_moment: int = 0
    moments: int = 0

    @property
    def rounding_offsets(self) -> list[int]:
        """For each matrix, the index of the shard's first channel in the whole, unsharded parameter. Times the width,
        it is the index of the first element, from which the bits for stochastic rounding are drawn.

        Shards of whole rows are thus rounded as the unsharded weight is. Shards of some columns draw other bits. Shards
        of a part of the width get indices behind all elements of the shards before them, so that no two share bits.
        """
        if self.geometry is None:
            return [0]
        before = 0
        if self.first_width:
            assert self.whole is not None
            channels = self.whole.matrices * self.whole.channels
            before = -(-channels * self.first_width // max(1, self.geometry.width))
        return [before + index for index in self._indices_in_whole(self.first_channel)]

    @property
    def moment_rounding_offsets(self) -> list[int]:
        """For each matrix, the index in the whole parameter of the first channel whose moments are on this rank."""
        return self._indices_in_whole(self.first_moment)

    def _indices_in_whole(self, channel: int) -> list[int]:
        assert self.geometry is not None
        assert self.whole is not None
        matrices = range(self.first_matrix, self.first_matrix + self.geometry.matrices)
        return [matrix * self.whole.channels + channel for matrix in matrices]


def local_shard(parameter: Tensor, geometry: Geometry | None) -> LocalShard:
    """This rank's shard of ``parameter``. ``geometry`` is that of the whole parameter.

    Raises ValueError for placements whose shards are not matrices.
    """
    channels = 0 if geometry is None else geometry.channels
    if not is_dtensor(parameter):
        return LocalShard(geometry, geometry, moments=channels)
    cuts = _cuts(parameter)
    shape, offset = _place(parameter)
    mesh: Any = parameter.device_mesh  # type: ignore[attr-defined]
    mesh_axes = tuple(_axis(mesh, index) for index in range(mesh.ndim))
    first_element = sum(
        offset[d] * math.prod(shape[:d]) * math.prod(parameter.shape[d + 1 :]) for d in range(parameter.dim())
    )
    shard_axes = tuple(axis for _, axis, _ in cuts)
    if geometry is None:
        first_element = -(-first_element // 8) * 8  # kernels draw the bits of eight elements in one call
        return LocalShard(
            None,
            None,
            first_element=first_element,
            shard_axes=shard_axes,
            sum_axes=shard_axes,
            row_axes=tuple(axis for dim, axis, _ in cuts if dim > 0),
            mesh_axes=mesh_axes,
        )
    if any(dim >= 2 for dim, _, _ in cuts) and parameter.dim() != 3:
        raise ValueError(
            "is sharded along a dimension of its kernel, so its shards are not matrices; use Shard(0) or Shard(1)"
        )
    experts = parameter.dim() == 3
    if experts and parameter.shape[0] == 1 and any(dim == 0 for dim, _, _ in cuts):
        raise ValueError("is one matrix, sharded along a dimension of length 1; make it 2-D")
    rows, columns = (1, 2) if experts else (0, 1)
    kept = rows if geometry.keeps_rows else columns
    # Columns of the matrix for each index of dimension ``columns``: the size of a convolution's kernel, else 1.
    inner = math.prod(parameter.shape[columns + 1 :])
    shard = Geometry(shape[0] if experts else 1, shape[rows], math.prod(shape[columns:]), geometry.keeps_rows)
    first_row, first_column = offset[rows], offset[columns] * inner
    projected = sorted(
        ((index, axis) for dim, axis, index in cuts if dim not in ((0, kept) if experts else (kept,))),
        key=lambda cut: cut[0],
    )
    width_axes = tuple(axis for _, axis in projected)
    first_channel = first_row if geometry.keeps_rows else first_column
    first_moment, moments = first_channel, shard.channels
    for axis in width_axes:
        first, moments = chunk(moments, axis.size, axis.rank)
        first_moment += first
    return LocalShard(
        shard,
        geometry,
        first_matrix=offset[0] if experts else 0,
        first_channel=first_channel,
        first_width=first_column if geometry.keeps_rows else first_row,
        first_element=first_element,
        shard_axes=shard_axes,
        sum_axes=tuple(axis for dim, axis, _ in cuts if not (experts and dim == 0)),
        width_axes=width_axes,
        mesh_axes=mesh_axes,
        first_moment=first_moment,
        moments=moments,
    )


def _cuts(parameter: Any) -> list[tuple[int, MeshAxis, int]]:
    """How a ``DTensor`` was sharded, cut by cut in their order: tensor dimension, mesh axis, index of the mesh
    dimension."""
    return [(dim, _axis(parameter.device_mesh, index), index) for dim, index in cuts_of(parameter)]


def _axis(mesh: Any, index: int) -> MeshAxis:
    group = mesh.get_group(index)
    return MeshAxis(group.group_name, mesh.size(index), mesh.get_local_rank(index), group)


def _cut(whole: Sequence[int], cuts: Sequence[tuple[int, MeshAxis, int]]) -> tuple[list[int], list[int]]:
    """The shape of this rank's part of a tensor of shape ``whole``, and the index at which it begins."""
    return cut(whole, ((dim, axis.size, axis.rank) for dim, axis, _ in cuts))


def _place(parameter: Any) -> tuple[list[int], list[int]]:
    """The shape of the local shard, and the index at which it begins in each dimension."""
    shape, offset = place_of(parameter)
    found = list(local(parameter).shape)
    if found != shape:
        raise ValueError(
            f"has a local shard of shape {found}, and {parameter.placements} makes one of shape {shape}; "
            "shard it with fully_shard, parallelize_module or distribute_tensor"
        )
    return shape, offset


class StatePlacement(NamedTuple):
    """How a state tensor is sharded: its ``DTensor`` placements, and the local shard's first indices and shape."""

    placements: tuple[Any, ...]
    first: tuple[int, ...]
    shape: tuple[int, ...]


def moment_cuts(parameter: Any, shard: LocalShard) -> list[tuple[int, MeshAxis, int]]:
    """How the moments of a ``DTensor`` weight are cut, in the order of the cuts: dimension of the moments, mesh axis,
    index of the mesh dimension.

    Dense moments are cut as the weight is. Low-rank moments are cut along their experts as the weight is and along
    their channels, first by the axes that shard the kept dimension and then by those that shard the projected one.
    """
    cuts = _cuts(parameter)
    if shard.whole is None:
        return cuts
    channels = int(shard.whole.matrices > 1)
    over_experts = [(0, axis, index) for _, axis, index in cuts if axis not in shard.sum_axes]
    over_kept = [(axis, index) for _, axis, index in cuts if axis in shard.sum_axes and axis not in shard.width_axes]
    over_width = sorted(((axis, index) for _, axis, index in cuts if axis in shard.width_axes), key=lambda cut: cut[1])
    return over_experts + [(channels, axis, index) for axis, index in over_kept + over_width]


def state_placement(name: str, parameter: Any, shard: LocalShard, shape: Sequence[int]) -> StatePlacement:
    """How the state tensor ``name`` of a ``DTensor`` weight is sharded; ``shape`` is that of the whole state tensor.

    Moments are cut as ``moment_cuts`` says, and the absmaxes of 8-bit ones along the same dimensions. Second moments of
    rows are cut between rows only, ``update_norm`` and svd's projection between experts only.
    """
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    cuts, mesh = moment_cuts(parameter, shard), parameter.device_mesh
    if shard.geometry is None:
        # Absmaxes have no dimension for what an axis of one rank cuts within blocks. What cuts columns cuts no row.
        is_of_rows = name == "exp_avg_sq" and tuple(shape) != tuple(parameter.shape)
        kept = {index for dim, _, index in cuts if dim < (1 if is_of_rows else len(shape))}
        local_shape, first = _cut(shape, [cut for cut in cuts if cut[2] in kept])
        placements = [each if index in kept else Replicate() for index, each in enumerate(parameter.placements)]
        return StatePlacement(tuple(placements), tuple(first), tuple(local_shape))
    if not name.startswith("exp_avg"):
        cuts = [cut for cut in cuts if cut[1] not in shard.sum_axes]
    placements = [Replicate()] * mesh.ndim
    for position, (dim, axis, index) in enumerate(cuts):
        if axis.size == 1:
            continue
        # If mesh dimensions to the right cut before this one, it is a strided shard.
        factor = math.prod(other.size for d, other, i in cuts[:position] if d == dim and i > index)
        placements[index] = Shard(dim) if factor == 1 else _StridedShard(dim, split_factor=factor)
    local_shape, first = _cut(shape, cuts)
    return StatePlacement(tuple(placements), tuple(first), tuple(local_shape))


def local_shape(name: str, parameter: Tensor, shard: LocalShard, shape: Sequence[int]) -> tuple[int, ...]:
    """The shape on this rank of the state tensor ``name``, whose whole shape is ``shape``."""
    return state_placement(name, parameter, shard, shape).shape if is_dtensor(parameter) else tuple(shape)


def sharded_zeros(name: str, parameter: Any, shard: LocalShard, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros for the state tensor ``name`` of a ``DTensor`` weight."""
    placement = state_placement(name, parameter, shard, shape)
    zeros = torch.zeros(placement.shape, dtype=dtype, device=parameter.device)
    return as_dtensor(zeros, parameter.device_mesh, placement.placements, shape)


def as_sharded(name: str, local_value: Tensor, parameter: Tensor, shard: LocalShard, shape: Sequence[int]) -> Tensor:
    """What this rank has made of the state tensor ``name``, as the state of its parameter holds it."""
    if not is_dtensor(parameter):
        return local_value
    placements = state_placement(name, parameter, shard, shape).placements
    return as_dtensor(local_value, parameter.device_mesh, placements, shape)  # type: ignore[attr-defined]


def resharded(name: str, value: Tensor, parameter: Tensor, shard: LocalShard) -> Tensor:
    """A copy of a saved state tensor, whole or a ``DTensor`` of any placement, sharded as ``parameter`` needs it.

    A whole tensor is sliced without communication. A ``DTensor`` of another placement is gathered first.
    """
    value = value.detach()
    if is_dtensor(value):
        if is_dtensor(parameter):
            placement = state_placement(name, parameter, shard, value.shape)
            if (value.device_mesh, tuple(value.placements)) == (parameter.device_mesh, placement.placements):  # type: ignore[attr-defined]
                return value.to(parameter.device, copy=True)
        value = value.full_tensor()  # type: ignore[attr-defined]
    if not is_dtensor(parameter):
        return value.to(parameter.device, copy=True)
    placement = state_placement(name, parameter, shard, value.shape)
    slices = tuple(slice(first, first + length) for first, length in zip(placement.first, placement.shape, strict=True))
    local_value = value[slices].to(parameter.device, copy=True, memory_format=torch.contiguous_format)
    return as_dtensor(local_value, parameter.device_mesh, placement.placements, value.shape)  # type: ignore[attr-defined]
