"""The two reductions between the verbs, for weights that several ranks hold pieces of, and the check that ranks agree.

    scatter    after ``sketch``: sums R over the axes that cut the projected dimension; each rank keeps its channels
    gather     after ``rescale``: brings the factors of all channels together, and adds up the sums of every matrix

Each is one collective an axis (a mesh dimension) for the whole model. Both add in the order of the ranks on every rank,
so that ranks agree bit for bit whatever the library's algorithm: ``scatter`` is an all-to-all and an ordered sum, which
sends what a reduce-scatter sends. Neither knows which engine runs.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.settings import Settings
from ..params.member import Member
from ..params.sharding import Axis, Piece, is_dtensor, local


class Exchange:
    """The reductions of one plan. All dictionaries are by the index of the member, which
    all ranks count alike, while their batches may come in another order."""

    def __init__(self, members: Sequence[Member], settings: Sequence[Settings]) -> None:
        self._members = list(members)
        self.axes = _ordered_axes([member.piece for member in members])
        self.clips = bool(settings) and settings[0].max_grad_norm is not None

    def scatter(
        self, sketches: dict[int, Tensor], norms: dict[int, Tensor]
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """Sums of ``sketches`` ``[matrices, channels, numbers]`` over the axes that cut their width, of the channels
        whose moments are here; and of ``norms`` ``[all matrices of the whole weight]`` over every axis."""
        sketches, norms = dict(sketches), dict(norms)
        for axis in self.axes:
            cut = [i for i in sorted(sketches) if axis in self._members[i].piece.scattered]
            split = [i for i in sorted(norms) if axis in self._members[i].piece.spread]
            if not cut and not split:
                continue
            parts = [_padded(sketches[i], axis.size).flatten(1) for i in cut]
            parts += [norms[i].expand(axis.size, -1) for i in split]
            sums = _exchanged(torch.cat(parts, 1), axis)
            pieces = iter(sums.split([part.shape[1] for part in parts]))
            for i in cut:
                matrices, channels, numbers = sketches[i].shape
                size = -(-channels // axis.size)
                mine = min(size, max(0, channels - axis.rank * size))
                sketches[i] = next(pieces).view(matrices, size, numbers)[:, :mine]
            for i in split:
                norms[i] = next(pieces)
        return sketches, norms

    def gather(
        self, factors: dict[int, Tensor], sums: dict[int, Tensor]
    ) -> tuple[dict[int, Tensor], dict[int, Tensor]]:
        """``factors`` ``[matrices, channels]`` of all channels of the piece from those of the ranks that share it; and
        ``sums`` ``[matrices, numbers]`` over the axes that split them."""
        factors, sums = dict(factors), dict(sums)
        for axis in reversed(self.axes):
            cut = [i for i in sorted(factors) if axis in self._members[i].piece.scattered]
            split = [i for i in sorted(sums) if axis in self._members[i].piece.summed]
            if not cut and not split:
                continue
            parts = [sums[i].reshape(-1) for i in split]
            for i in cut:
                size = -(-self._channels_before(i, axis) // axis.size)
                parts.append(_pad(factors[i], size - factors[i].shape[1]).reshape(-1))
            lengths = [part.numel() for part in parts]
            gathered = _gathered(torch.cat(parts), axis)
            count = sum(lengths[: len(split)])
            for i, total in zip(split, _added(gathered[:, :count]).split(lengths[: len(split)]), strict=True):
                sums[i] = total.view_as(sums[i])
            for i, piece in zip(cut, gathered[:, count:].split(lengths[len(split) :], 1), strict=True):
                matrices = factors[i].shape[0]
                whole = piece.reshape(axis.size, matrices, -1).transpose(0, 1).reshape(matrices, -1)
                factors[i] = whole[:, : self._channels_before(i, axis)]
        return factors, sums

    def _channels_before(self, index: int, axis: Axis) -> int:
        """How many channels of a member are left when ``axis`` deals them out."""
        piece = self._members[index].piece
        assert piece.geometry is not None
        channels = piece.geometry.channels
        for other in piece.scattered[: piece.scattered.index(axis)]:
            size = -(-channels // other.size)
            channels = min(size, max(0, channels - other.rank * size))
        return channels


def _padded(sketch: Tensor, ranks: int) -> Tensor:
    """``[matrices, channels, numbers]`` dealt out as ``torch.chunk`` does, zeros behind: ``[ranks, matrices, size,
    numbers]``."""
    matrices, channels, numbers = sketch.shape
    size = -(-channels // ranks)
    sketch = _pad(sketch, 0, ranks * size - channels)
    return sketch.view(matrices, ranks, size, numbers).transpose(0, 1)


def _pad(values: Tensor, *behind: int) -> Tensor:
    """Zeros behind the last dimensions, the last one first; where there are none to add, no copy either."""
    return torch.nn.functional.pad(values, [n for each in behind for n in (0, each)]) if any(behind) else values


def _exchanged(rows: Tensor, axis: Axis) -> Tensor:
    """Row ``r`` of ``rows [ranks, length]`` of every rank at rank ``r``, added up."""
    received = torch.empty_like(rows)
    torch.distributed.all_to_all_single(received, rows.contiguous(), group=axis.group)
    return _added(received)


def _gathered(values: Tensor, axis: Axis) -> Tensor:
    """The ``values`` of all ranks, ``[ranks, length]``."""
    received = values.new_empty(axis.size * values.numel())
    # What torch 2.13 calls all_gather_single; its old name warns there.
    gather = getattr(torch.distributed, "all_gather_single", None) or torch.distributed.all_gather_into_tensor
    gather(received, values, group=axis.group)
    return received.view(axis.size, -1)


def _added(rows: Tensor) -> Tensor:
    """The sum of the rows, in their place: halves are added to halves, so that 1024 ranks take 10 launches, and one
    element at a time, so that bits are the same wherever the rows are the same."""
    while len(rows) > 1:
        half = len(rows) // 2
        rows[:half] += rows[len(rows) - half :]
        rows = rows[: len(rows) - half]
    return rows[0]


def _ordered_axes(pieces: Sequence[Piece]) -> list[Axis]:
    """Every axis once, in the order of the mesh dimensions; the largest mesh leads.

    Raises ValueError if two meshes order the same axes differently.
    """
    axes: list[Axis] = []
    for piece in sorted(pieces, key=lambda each: -len(each.mesh_axes)):
        axes += [axis for axis in piece.mesh_axes if axis not in axes]
    for piece in pieces:
        places = [axes.index(axis) for axis in piece.mesh_axes]
        if places != sorted(places):
            raise ValueError(
                "two device meshes have the same dimensions in different order; take all submeshes from one mesh"
            )
    return [axis for axis in axes if axis.size > 1]


def finish_gradients(parameters: Iterable[Tensor]) -> None:
    """Bring ``DTensor`` gradients whose placements are not their weight's into line, in ``.grad``.

    Backward may leave partial sums, as those of norms between sequence-parallel activations: they are added up in one
    all-reduce an axis for the whole model. Anything else is left to ``DTensor.redistribute``.
    """
    sharded: list[Any] = [each for each in parameters if is_dtensor(each) and each.grad is not None]
    unlike = [each for each in sharded if each.grad.placements != each.placements]
    if not unlike:
        return
    from torch.distributed.tensor import DTensor, Replicate

    sums: dict[tuple[Any, torch.dtype], list[tuple[Any, int]]] = {}
    for parameter in unlike:
        mesh = parameter.device_mesh
        for index, placement in enumerate(parameter.grad.placements):
            if placement.is_partial() and placement.reduce_op == "sum":
                sums.setdefault((mesh.get_group(index), parameter.grad.dtype), []).append((parameter, index))
    for (group, _), parts in sums.items():
        flat = torch.cat([local(parameter.grad).reshape(-1) for parameter, _ in parts])
        torch.distributed.all_reduce(flat, group=group)
        for (parameter, index), total in zip(parts, flat.split([local(p.grad).numel() for p, _ in parts]), strict=True):
            gradient = parameter.grad
            placements = list(gradient.placements)
            placements[index] = Replicate()
            parameter.grad = DTensor.from_local(
                total.view_as(local(gradient)),
                gradient.device_mesh,
                placements,
                run_check=False,
                shape=gradient.shape,
                stride=gradient.stride(),
            )
    for parameter in unlike:
        parameter.grad = parameter.grad.redistribute(placements=parameter.placements)
