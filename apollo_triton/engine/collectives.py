"""The two reductions between the verbs, for weights of which several ranks hold shards.

    sum_sketches      after ``sketch``: R is summed over the axes that cut the projected dimension
    gather_factors    after ``rescale``: each rank gets the factors of all channels, and the sums of every matrix

Each is one collective for each axis (mesh dimension) for the whole model. Both add in the order of the ranks, so that
all ranks have the same bits whatever the library's algorithm is: ``sum_sketches`` is an all-to-all and an ordered sum,
which sends as much as a reduce-scatter. Neither depends on the backend.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import torch
from torch import Tensor

from ..backends.interface import ByMember
from ..core.dtensors import is_dtensor, local
from ..params.member import Member
from ..params.sharding import LocalShard, MeshAxis


class Collectives:
    """The reductions of one plan. All dictionaries are by the index of the member, which all ranks count alike, while
    their batches may come in another order."""

    def __init__(self, members: Sequence[Member]) -> None:
        self._shards = [member.shard for member in members]
        self.axes = ordered_axes(self._shards)

    def sum_sketches(self, sketches: ByMember, norms: ByMember) -> tuple[ByMember, ByMember]:
        """Sums of ``sketches`` and ``norms`` over ranks.

        ``sketches`` ``[matrices, channels, columns]`` are summed over the axes that cut the projected dimension, and
        those of the channels whose moments are on this rank are returned. ``norms`` ``[all matrices of the whole
        weight]`` are summed over every axis that cuts the weight.
        """
        if not self.axes:
            return sketches, norms
        sketches, norms = dict(sketches), dict(norms)
        for axis in self.axes:
            cut = [i for i in sorted(sketches) if axis in self._shards[i].width_axes]
            split = [i for i in sorted(norms) if axis in self._shards[i].shard_axes]
            if not cut and not split:
                continue
            parts = [_dealt_out(sketches[i], axis.size).flatten(1) for i in cut]
            parts += [norms[i].expand(axis.size, -1) for i in split]
            sums = iter(_exchanged(torch.cat(parts, 1), axis).split([part.shape[1] for part in parts]))
            for i in cut:
                matrices, channels, columns = sketches[i].shape
                size = -(-channels // axis.size)
                here = min(size, max(0, channels - axis.rank * size))
                sketches[i] = next(sums).view(matrices, size, columns)[:, :here]
            for i in split:
                norms[i] = next(sums)
        return sketches, norms

    def gather_factors(self, factors: ByMember, sums: ByMember) -> tuple[ByMember, ByMember]:
        """``factors`` and ``sums`` of all ranks together.

        ``factors`` ``[matrices, channels]`` of the channels whose moments are here become those of all channels of the
        shard. ``sums`` ``[matrices, columns]`` are added up over the axes that split them: those of a dense weight's
        rows, from the second column on, over the axes that cut rows.
        """
        if not self.axes:
            return factors, sums
        factors, sums = dict(factors), dict(sums)
        for axis in reversed(self.axes):
            cut = [i for i in sorted(factors) if axis in self._shards[i].width_axes]
            split = [i for i in sorted(sums) if axis in self._shards[i].sum_axes]
            if not cut and not split:
                continue
            counts = {i: self._split_columns(i, axis, sums[i]) for i in split}
            parts = [sums[i][:, : counts[i]].reshape(-1) for i in split]
            for i in cut:
                size = -(-self._channels_before(i, axis) // axis.size)
                parts.append(_pad(factors[i], size - factors[i].shape[1]).reshape(-1))
            lengths = [part.numel() for part in parts]
            received = gathered(torch.cat(parts), axis)
            count = sum(lengths[: len(split)])
            for i, total in zip(split, _added(received[:, :count]).split(lengths[: len(split)]), strict=True):
                total = total.view(-1, counts[i])
                sums[i] = total if total.shape == sums[i].shape else torch.cat((total, sums[i][:, counts[i] :]), 1)
            for i, part in zip(cut, received[:, count:].split(lengths[len(split) :], 1), strict=True):
                matrices = factors[i].shape[0]
                whole = part.reshape(axis.size, matrices, -1).transpose(0, 1).reshape(matrices, -1)
                factors[i] = whole[:, : self._channels_before(i, axis)]
        return factors, sums

    def _split_columns(self, index: int, axis: MeshAxis, sums: Tensor) -> int:
        """How many of a member's sums are split over ``axis``: all, but for those of rows, which may be whole."""
        shard = self._shards[index]
        return 1 if shard.whole is None and axis not in shard.row_axes else sums.shape[1]

    def _channels_before(self, index: int, axis: MeshAxis) -> int:
        """How many channels of a member are left when ``axis`` deals them out."""
        shard = self._shards[index]
        assert shard.geometry is not None
        channels = shard.geometry.channels
        for other in shard.width_axes[: shard.width_axes.index(axis)]:
            size = -(-channels // other.size)
            channels = min(size, max(0, channels - other.rank * size))
        return channels


def _dealt_out(sketch: Tensor, ranks: int) -> Tensor:
    """The channels of ``[matrices, channels, columns]`` dealt out as ``torch.chunk`` does, with zeros at the end:
    ``[ranks, matrices, size, columns]``."""
    matrices, channels, columns = sketch.shape
    size = -(-channels // ranks)
    sketch = _pad(sketch, 0, ranks * size - channels)
    return sketch.view(matrices, ranks, size, columns).transpose(0, 1)


def _pad(values: Tensor, *behind: int) -> Tensor:
    """Zeros at the end of the last dimensions, the last one first. Without zeros to add there is no copy."""
    return torch.nn.functional.pad(values, [n for count in behind for n in (0, count)]) if any(behind) else values


def _exchanged(rows: Tensor, axis: MeshAxis) -> Tensor:
    """Row ``r`` of ``rows [ranks, length]`` of every rank at rank ``r``, added up."""
    received = torch.empty_like(rows)
    torch.distributed.all_to_all_single(received, rows.contiguous(), group=axis.group)
    return _added(received)


def gathered(values: Tensor, axis: MeshAxis) -> Tensor:
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


def ordered_axes(shards: Sequence[LocalShard]) -> list[MeshAxis]:
    """Every axis once, in the order of the mesh dimensions; the largest mesh leads.

    Raises ValueError if two meshes order the same axes differently.
    """
    axes: list[MeshAxis] = []
    for shard in sorted(shards, key=lambda shard: -len(shard.mesh_axes)):
        axes += [axis for axis in shard.mesh_axes if axis not in axes]
    for shard in shards:
        places = [axes.index(axis) for axis in shard.mesh_axes]
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
    sharded: list[Any] = [weight for weight in parameters if is_dtensor(weight) and weight.grad is not None]
    unlike = [weight for weight in sharded if weight.grad.placements != weight.placements]
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
