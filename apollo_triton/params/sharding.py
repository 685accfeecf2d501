"""Weights that are cut over devices: which piece this rank holds, and along which mesh dimensions its sums are split.

A ``DTensor`` weight (FSDP2, tensor parallel, both) is a piece of matrices whose orientation follows from the whole. Cut
along the kept dimension, everything but the limiter's sums is local. Cut along the projected dimension, the sketch is a
sum over ranks, and each rank keeps the moments of its own slice of the channels: they shrink with the ranks either way.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.geometry import Geometry

# The types of a tensor that is whole; all others are asked whether they are DTensors, which costs more.
_WHOLE = (torch.nn.Parameter, Tensor)


def is_dtensor(tensor: Tensor) -> bool:
    """Whether the tensor is a ``DTensor``, without importing what defines it."""
    return type(tensor) not in _WHOLE and hasattr(tensor, "placements") and hasattr(tensor, "device_mesh")


def local(tensor: Tensor) -> Tensor:
    """What this rank holds of a tensor: of a ``DTensor`` its piece, anything else itself."""
    if not is_dtensor(tensor):
        return tensor
    with torch.no_grad():
        return tensor.to_local()  # type: ignore[attr-defined]


@dataclass(frozen=True)
class Axis:
    """One mesh dimension: the ranks that hold pieces along it, known by the name of their process group."""

    name: str
    size: int
    rank: int
    group: Any = field(compare=False, repr=False)


@dataclass(frozen=True)
class Piece:
    """What a rank holds of a weight: a whole weight is a piece without axes.

    ``geometry`` is that of the piece's matrices and ``whole`` the weight's, both None for dense AdamW.
    ``first_matrix``, ``first_channel`` and ``first_width`` say where it begins in the weight, and ``first_element``
    counts the elements of the pieces before it. ``spread``: every axis that cuts the weight; ``summed``: those that
    a matrix's sums are split over, which is all but an axis that deals out experts; ``scattered``: those that cut the
    projected dimension; ``mesh_axes``: all of its mesh.
    ``first_moment`` and ``moments``: the first channel and the number of channels whose moments are here.
    """

    geometry: Geometry | None
    whole: Geometry | None
    first_matrix: int = 0
    first_channel: int = 0
    first_width: int = 0
    first_element: int = 0
    spread: tuple[Axis, ...] = ()
    summed: tuple[Axis, ...] = ()
    scattered: tuple[Axis, ...] = ()
    mesh_axes: tuple[Axis, ...] = ()
    first_moment: int = 0
    moments: int = 0

    @property
    def numbers(self) -> list[int]:
        """For each matrix the number of its first channel: element i of the matrix is then element ``number * width +
        i`` for stochastic rounding. Pieces of whole channels count as the unsharded weight does."""
        if self.geometry is None:
            return [0]
        before = 0
        if self.first_width:  # behind all elements of the pieces before
            assert self.whole is not None
            channels = self.whole.matrices * self.whole.channels
            before = -(-channels * self.first_width // max(1, self.geometry.width))
        return [before + number for number in self._counted(self.first_channel)]

    @property
    def moment_numbers(self) -> list[int]:
        """For each matrix the number of the first channel whose moments are here, counted through the whole weight."""
        return self._counted(self.first_moment)

    def _counted(self, first: int) -> list[int]:
        assert self.geometry is not None
        assert self.whole is not None
        matrices = range(self.first_matrix, self.first_matrix + self.geometry.matrices)
        return [matrix * self.whole.channels + first for matrix in matrices]


def piece_of(parameter: Tensor, geometry: Geometry | None) -> Piece:
    """Which piece of ``parameter``, whose whole ``geometry`` is given, this rank holds.

    Raises ValueError for placements that leave no matrices to work on.
    """
    channels = 0 if geometry is None else geometry.channels
    if not is_dtensor(parameter):
        return Piece(geometry, geometry, moments=channels)
    cuts = _cuts(parameter)
    shape, offset = _place(parameter, cuts)
    mesh: Any = parameter.device_mesh  # type: ignore[attr-defined]
    mesh_axes = tuple(_axis(mesh, index) for index in range(mesh.ndim))
    first_element = sum(
        offset[d] * math.prod(shape[:d]) * math.prod(parameter.shape[d + 1 :]) for d in range(parameter.dim())
    )
    spread = tuple(axis for _, axis, _ in cuts)
    if geometry is None:
        first_element = -(-first_element // 8) * 8  # kernels draw rounding bits by eights
        return Piece(None, None, first_element=first_element, spread=spread, summed=spread, mesh_axes=mesh_axes)
    if any(dim >= 2 for dim, _, _ in cuts) and parameter.dim() != 3:
        raise ValueError(
            "is cut along a dimension of its kernel, so its pieces are no matrices; use Shard(0) or Shard(1)"
        )
    experts = parameter.dim() == 3
    if experts and parameter.shape[0] == 1 and any(dim == 0 for dim, _, _ in cuts):
        raise ValueError("is one matrix that is cut along a dimension of length 1; make it 2-D")
    rows, columns = (1, 2) if experts else (0, 1)
    kept = rows if geometry.keeps_rows else columns
    # Elements of a matrix for each step along dimension ``columns``: the kernel of a convolution.
    inner = math.prod(parameter.shape[columns + 1 :])
    piece = Geometry(shape[0] if experts else 1, shape[rows], math.prod(shape[columns:]), geometry.keeps_rows)
    first_row, first_column = offset[rows], offset[columns] * inner
    projected = sorted(
        ((index, axis) for dim, axis, index in cuts if dim not in ((0, kept) if experts else (kept,))),
        key=lambda cut: cut[0],
    )
    scattered = tuple(axis for _, axis in projected)
    first_channel = first_row if geometry.keeps_rows else first_column
    first_moment, moments = first_channel, piece.channels
    for axis in scattered:
        first, moments = _chunk(moments, axis)
        first_moment += first
    return Piece(
        piece,
        geometry,
        first_matrix=offset[0] if experts else 0,
        first_channel=first_channel,
        first_width=first_column if geometry.keeps_rows else first_row,
        first_element=first_element,
        spread=spread,
        summed=tuple(axis for dim, axis, _ in cuts if not (experts and dim == 0)),
        scattered=scattered,
        mesh_axes=mesh_axes,
        first_moment=first_moment,
        moments=moments,
    )


def _cuts(parameter: Any) -> list[tuple[int, Axis, int]]:
    """The cuts of a ``DTensor`` in the order in which they were made: dimension, axis and mesh dimension."""
    mesh = parameter.device_mesh
    order: list[int] = []
    for index in reversed(range(mesh.ndim)):
        placement = parameter.placements[index]
        if placement.is_partial():
            raise ValueError(f"has placements {parameter.placements}: partial sums are no weight; redistribute it")
        if placement.is_replicate():
            continue
        # A strided shard was cut after mesh dimensions to its right, into as many pieces as split_factor says.
        strides, at, pieces = getattr(placement, "split_factor", 1), 0, 1
        while pieces < strides and at < len(order):
            if parameter.placements[order[at]].dim == placement.dim:
                pieces *= mesh.size(order[at])
            at += 1
        order.insert(at, index)
    return [(parameter.placements[i].dim % parameter.dim(), _axis(mesh, i), i) for i in order]


def _axis(mesh: Any, index: int) -> Axis:
    group = mesh.get_group(index)
    return Axis(group.group_name, mesh.size(index), mesh.get_local_rank(index), group)


def _chunk(length: int, axis: Axis) -> tuple[int, int]:
    """Where this rank's part of ``length`` begins, and its length: ``torch.chunk``'s partition, as ``DTensor``'s."""
    size = -(-length // axis.size)
    first = min(axis.rank * size, length)
    return first, min(size, length - first)


def _place(parameter: Any, cuts: list[tuple[int, Axis, int]]) -> tuple[list[int], list[int]]:
    """Shape of the piece and where it begins in each dimension."""
    shape, offset = list(parameter.shape), [0] * parameter.dim()
    for dim, axis, _ in cuts:
        first, shape[dim] = _chunk(shape[dim], axis)
        offset[dim] += first
    found = list(local(parameter).shape)
    if found != shape:
        raise ValueError(
            f"has a local piece of shape {found} where {parameter.placements} of DTensor makes {shape}; "
            "shard it with fully_shard, parallelize_module or distribute_tensor"
        )
    return shape, offset


class Layout(NamedTuple):
    """Where a state tensor lies: ``DTensor`` placements, and the local piece's first indices and shape."""

    placements: tuple[Any, ...]
    first: tuple[int, ...]
    shape: tuple[int, ...]


def state_layout(name: str, parameter: Any, piece: Piece, shape: Sequence[int]) -> Layout:
    """The layout of the state tensor ``name``, of this whole ``shape``, of a ``DTensor`` weight.

    Dense moments lie as the weight. Those of low rank are cut along their channels, first by what cuts the kept
    dimension and then by what cuts the projected one; ``update_norm`` and svd's projection along the experts alone.
    """
    from torch.distributed.tensor import Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    cuts, mesh = _cuts(parameter), parameter.device_mesh
    if piece.geometry is None:
        local_shape, first = _place(parameter, cuts)
        return Layout(tuple(parameter.placements), tuple(first), tuple(local_shape))
    experts = len(shape) == (1 if name == "update_norm" else 3)
    is_moment = name in ("exp_avg", "exp_avg_sq")
    dealt = [index for dim, axis, index in cuts if axis not in piece.summed]
    kept = [index for _, axis, index in cuts if axis in piece.summed and axis not in piece.scattered]
    scattered = sorted(index for _, axis, index in cuts if axis in piece.scattered)
    placements: list[Any] = [Replicate()] * mesh.ndim
    for order, dim in ((dealt, 0), (kept + scattered if is_moment else [], int(experts))):
        for position, index in enumerate(order):
            if mesh.size(index) == 1:
                continue
            # A mesh dimension to the right that has cut before makes this cut a strided one.
            factor = math.prod(mesh.size(i) for i in order[:position] if i > index)
            placements[index] = Shard(dim) if factor == 1 else _StridedShard(dim, split_factor=factor)
    first = [piece.first_matrix] if experts else []
    local_shape = [piece.geometry.matrices] if experts else []
    if is_moment:
        first.append(piece.first_moment)
        local_shape.append(piece.moments)
    rest = shape[len(local_shape) :]
    return Layout(tuple(placements), (*first, *[0] * len(rest)), (*local_shape, *rest))


def sharded_zeros(name: str, parameter: Any, piece: Piece, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Zeros for the state tensor ``name`` of a ``DTensor`` weight."""
    layout = state_layout(name, parameter, piece, shape)
    return _as_dtensor(torch.zeros(layout.shape, dtype=dtype, device=parameter.device), parameter, layout, shape)


def resharded(name: str, value: Tensor, parameter: Tensor, piece: Piece) -> Tensor:
    """A saved state tensor, whole or a ``DTensor`` of any placement, as ``parameter`` needs it: a copy.

    Whole ones are cut without communication; another placement costs gathering that tensor.
    """
    value = value.detach()
    if is_dtensor(value):
        if is_dtensor(parameter):
            layout = state_layout(name, parameter, piece, value.shape)
            if (value.device_mesh, tuple(value.placements)) == (parameter.device_mesh, layout.placements):  # type: ignore[attr-defined]
                return value.to(parameter.device, copy=True)
        value = value.full_tensor()  # type: ignore[attr-defined]
    if not is_dtensor(parameter):
        return value.to(parameter.device, copy=True)
    layout = state_layout(name, parameter, piece, value.shape)
    cut = tuple(slice(first, first + length) for first, length in zip(layout.first, layout.shape, strict=True))
    mine = value[cut].to(parameter.device, copy=True, memory_format=torch.contiguous_format)
    return _as_dtensor(mine, parameter, layout, value.shape)


def _as_dtensor(mine: Tensor, parameter: Any, layout: Layout, shape: Sequence[int]) -> Tensor:
    from torch.distributed.tensor import DTensor

    strides = tuple(math.prod(shape[i + 1 :]) for i in range(len(shape)))
    return DTensor.from_local(
        mine, parameter.device_mesh, layout.placements, run_check=False, shape=torch.Size(shape), stride=strides
    )
