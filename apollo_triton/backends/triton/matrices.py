"""Pointer tables: the matrices that one launch updates, as addresses, sizes and strides that stay on the device.

A ``Table`` lives as long as its parameters and their state stay where they are. Gradients may move at every step; then
one vector of addresses is copied, and nothing otherwise. It holds no gradient, so that ``zero_grad`` frees them.
"""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.geometry import Geometry
from ...core.moments_8bit import code_and_thresholds, whole_blocks
from ...core.scale import scale_of
from ...core.settings import Settings
from ...core.streams import Uses
from ...int8.weight import int8_weight_of
from ...kernels import apply, dense, dense_rows, int8, sketch, table
from ...params.member import Member, has_row_moments
from ...params.state import ABSMAXES
from ..interface import WARM_UP
from .channels import Channels, MomentTable, owners_of, programs_for
from .layout import NO_STRIDES, MatrixStrides, flat_geometry, matrix_strides, weight_strides
from .projections import ProjectionBuffer


class StridedCopy(NamedTuple):
    """A parameter whose rows and columns have no strides (a ``channels_last`` convolution), and copies that have."""

    member: Member
    weight: Tensor
    gradient: Tensor


class Int8Format(NamedTuple):
    """What int8 weights of one launch have in common."""

    group_size: int
    stochastic_rounding: bool

    @classmethod
    def of(cls, parameter: Tensor) -> Int8Format | None:
        """None for a weight that is not int8."""
        weight = int8_weight_of(parameter)
        return None if weight is None else cls(weight.group_size, weight.stochastic_rounding)


class Table(Channels):
    """The matrices of one launch of each kernel: same dtypes, orientation, alignment, settings and step count.

    A weight whose gradient is implicit has a table of its own, since its kernels are given X and dY as tensors.

    ``members``: whose matrices they are; ``matrices_of``: which of them are whose, by the member's index in the plan,
    and ``first`` the first such index. ``gradients`` int64 ``[matrices]``: their addresses. ``root_scales`` float32
    ``[matrices, 2]``: what multiplies s before the limiter and after it, sqrt(scale) and 1 as ``scale_front`` asks;
    none of dense ones. ``by_rows``: whether dense ones have one second moment a row; then a row is a channel, all rows'
    sums have ``row_parts`` parts, and ``row_fields`` int64 ``[matrices, 3]`` has what kernels/dense_rows.py says.
    ``tile_programs`` int32: the index of the matrix of each program of ``apply``. ``norm_programs`` int32 ``[programs,
    2]``: matrix and part. ``projections``: the buffers that hold P, if P is in memory. ``split``: how many programs of
    ``sketch`` share the channels of one program of ``rescale``, above 1 where moments are 8-bit. ``skipped`` int32
    ``[matrices]``: how many updates gradients that are not finite have cost. ``moments``: the table for ``rescale`` if
    sketches are summed. ``constants``: those of its sketch, which arguments.py keeps. ``uses``: which streams use all
    this, because a plan may be replaced while another stream's kernels read its tables.
    """

    def __init__(self, members: Mapping[int, Member], settings: Settings, aligned: bool) -> None:
        self.members = list(members.values())
        self.first = next(iter(members))
        first = members[self.first]
        self.group = first.param.group
        self.device = first.parameter.device
        self.weight_dtype = first.parameter.dtype
        self.is_implicit = not isinstance(first.gradient, Tensor)
        self.gradient_dtype = first.gradient.dtype
        self.state_dtype = first.moment_dtype
        self.int8 = Int8Format.of(first.parameter)
        self.is_sum_sharded = bool(first.shard.sum_axes)
        self.is_width_sharded = bool(first.shard.width_axes)
        self.aligned = aligned
        self.is_dense = first.geometry is None
        self.by_rows = has_row_moments(first.parameter, settings)
        self.keeps_rows = first.geometry is None or first.geometry.keeps_rows
        self.rank = 0 if settings.rank is None or self.is_dense else settings.rank
        self.copies: list[StridedCopy] = []
        self.projections: list[ProjectionBuffer] = []
        self.constants: dict[tuple[Any, ...], dict[str, Any]] = {}
        self.channel_blocks = {} if self.is_dense else sketch.blocks(self.rank)
        self.split = 1
        if self.state_dtype == torch.uint8 and not self.is_dense:
            block = self.channel_blocks["BLOCK_CHANNELS"]
            self.channel_blocks["BLOCK_CHANNELS"] = max(block, whole_blocks(self.rank))
            self.split = self.channel_blocks["BLOCK_CHANNELS"] // block
        self.geometries = [member.geometry or flat_geometry(member, self.by_rows) for member in self.members]
        self.tile_blocks = {}
        if self.int8 is not None:
            self.tile_blocks = int8.blocks(self.int8.group_size)
        elif not self.is_dense:
            in_16_bits = aligned and self.weight_dtype.itemsize == self.gradient_dtype.itemsize == 2
            self.tile_blocks = apply.blocks(max(geometry.columns for geometry in self.geometries), in_16_bits)
        counts = [geometry.matrices for geometry in self.geometries]
        self.matrices_of = {
            index: slice(end - count, end)
            for index, count, end in zip(members, counts, itertools.accumulate(counts), strict=True)
        }
        rows = self._build(settings)
        self._gradient_addresses: list[int] = []
        self._projection_addresses: list[int] = []
        self._staging: Tensor | None = None
        self._kept: list[Tensor] = []
        self.moments = MomentTable(self, rows, self.members) if self.is_width_sharded else None
        values = [*vars(self).values(), *vars(self.moments or self).values()]
        values += [each for copy in self.copies for each in (copy.weight, copy.gradient)]
        self.uses = Uses([value for value in values if isinstance(value, Tensor)])
        if not self.is_implicit:
            self._gradient_places = [*self._find_gradient_places(members)]
            self.update_gradient_addresses({at: each.formed_gradient.data_ptr() for at, each in members.items()})

    def _build(self, settings: Settings) -> list[list[int]]:
        """Everything that is on the device. Returns the rows of ``addresses``."""
        rows: list[list[int]] = []
        root_scales: list[tuple[float, float]] = []
        channel_programs, tile_programs, norm_programs = [], [], []
        channel = channel_program = tile_program = 0
        for member, geometry in zip(self.members, self.geometries, strict=True):
            weight, gradient = self._strides(member, geometry)
            size = member.parameter.element_size()
            exp_avg, exp_avg_sq = member.moment("exp_avg"), member.moment("exp_avg_sq")
            norm = 0 if self.is_dense else member.local_state("update_norm").data_ptr()
            moments = 1 if self.is_dense else member.shard.moments * self.rank
            rounding_offsets = [member.shard.first_element] if self.is_dense else member.shard.rounding_offsets
            for position in range(geometry.matrices):
                state_offset = position * moments * exp_avg.element_size()
                rows.append(
                    [
                        weight.address + position * weight.matrix_stride * size,
                        exp_avg.data_ptr() + state_offset,
                        exp_avg_sq.data_ptr() + state_offset,
                        0 if self.is_dense else norm + 4 * position,
                        0,
                        member.state["seed"],
                        geometry.rows,
                        geometry.columns,
                        weight.row_stride,
                        weight.column_stride,
                        gradient.row_stride,
                        gradient.column_stride,
                        rounding_offsets[position],
                        channel,
                        channel_program,
                        tile_program,
                    ]
                )
                if self.is_dense:
                    moment = matrix_strides(exp_avg, geometry)
                    assert moment is not None
                    rows[-1][table.STATE_ROW_STRIDE.value] = moment.row_stride
                    rows[-1][table.STATE_COLUMN_STRIDE.value] = moment.column_stride
                    tile_programs.append(_blocks(geometry.rows * geometry.columns, dense.BLOCK))
                    if self.by_rows:
                        channel_program += geometry.rows * dense_rows.segments(geometry.columns)
                else:
                    assert member.shard.whole is not None
                    root = math.sqrt(scale_of(settings, member.shard.whole))
                    root_scales.append((root, 1.0) if settings.scale_front else (1.0, root))
                    channel_programs.append(self._channel_programs(geometry.channels))
                    tile_programs.append(self._tiles(geometry))
                    channel_program += channel_programs[-1]
                if self.by_rows:
                    parts = dense_rows.tiles(geometry.rows, geometry.columns)
                else:
                    parts = programs_for(geometry.rows * geometry.columns, dense.BLOCK)
                norm_programs.append(min(parts, dense.NORM_PROGRAMS))
                tile_program += tile_programs[-1]
                channel += geometry.channels
        self.channels, self.row_parts = channel, channel_program
        self.projection_keys = [
            (member.state["seed"], member.shard.first_width, geometry.width)
            for member, geometry in zip(self.members, self.geometries, strict=True)
            for _ in range(geometry.matrices)
        ]
        self.matrices = len(rows)
        # Not of what is here: see ``keeps_sketch``.
        wholes = [
            (member.shard.whole or geometry, math.prod(axis.size for axis in member.shard.shard_axes))
            for member, geometry in zip(self.members, self.geometries, strict=True)
        ]
        self.sketch_bytes = sum(4 * self.rank * whole.matrices * whole.channels // ranks for whole, ranks in wholes)
        self.gradient_bytes = sum(
            self.gradient_dtype.itemsize * whole.matrices * whole.rows * whole.columns // ranks
            for whole, ranks in wholes
        )
        stride, columns = table.GRADIENT_ROW_STRIDE.value, table.COLUMNS.value
        self.flat_gradients = self.aligned and all(
            row[table.ROWS.value] == 1 or row[stride] == row[columns] for row in rows
        )
        self.addresses = self._on_device(torch.tensor(rows, dtype=torch.int64, device="cpu"))
        self.gradients = torch.empty(self.matrices, dtype=torch.int64, device=self.device)
        self.skipped = torch.zeros(self.matrices, dtype=torch.int32, device=self.device)
        self.previous = torch.empty(self.matrices, dtype=torch.float32, device=self.device)
        self.root_scales = self._on_device(torch.tensor(root_scales, dtype=torch.float32, device="cpu"))
        self.channel_programs = self._on_device(owners_of(channel_programs))
        self.absmaxes = None
        if self.by_rows:
            self.row_fields = self._row_fields()
        elif self.state_dtype == torch.uint8:
            self.absmaxes = self._absmax_addresses()
        clips = settings.max_grad_norm is not None
        if self.is_sum_sharded or (clips and not self.is_dense):  # lengths of what is added up to a matrix's norm
            counts = [geometry.channels for geometry in self.geometries for _ in range(geometry.matrices)]
            self.channel_counts = self._on_device(torch.tensor(counts, dtype=torch.int64, device="cpu"))
        if self.is_sum_sharded:  # and to the sums of ``rescale``
            self.program_counts = self._on_device(torch.tensor(channel_programs, dtype=torch.int64, device="cpu"))
        self.tile_programs = self._on_device(owners_of(tile_programs))
        parts_of = [torch.arange(count, dtype=torch.int32, device="cpu") for count in norm_programs]
        self.norm_programs = self._on_device(
            torch.stack((owners_of(norm_programs), torch.cat(parts_of)), 1).contiguous()
        )
        return rows

    def _row_fields(self) -> Tensor:
        """The length of each matrix's whole, unsharded rows, and where its 8-bit M has its absmaxes and its code."""
        code = code_and_thresholds(True, self.device).data_ptr() if self.state_dtype == torch.uint8 else 0
        rows = []
        for member in self.members:
            absmax = member.local_state(ABSMAXES[0]).data_ptr() if code else 0
            rows.append([math.prod(member.parameter.shape[1:]), absmax, code])
        return self._on_device(torch.tensor(rows, dtype=torch.int64, device="cpu"))

    def _absmax_addresses(self) -> Tensor:
        """Of each matrix's 8-bit M and V."""
        rows = []
        for member, geometry in zip(self.members, self.geometries, strict=True):
            for position in range(geometry.matrices):
                absmaxes = (member.local_state(name) for name in ABSMAXES)
                rows.append([absmax.data_ptr() + 4 * position * absmax.shape[-1] for absmax in absmaxes])
        return self._on_device(torch.tensor(rows, dtype=torch.int64, device="cpu"))

    def _channel_programs(self, channels: int) -> int:
        """How many blocks of channels a matrix has. The last may be empty, where the sketch takes them two by two."""
        at_a_time = sketch.programs_at_a_time(self.rank)
        return programs_for(channels, at_a_time * self.channel_blocks["BLOCK_CHANNELS"]) * at_a_time

    def _tiles(self, geometry: Geometry) -> int:
        """How many programs of ``apply`` a matrix has."""
        if self.int8 is not None:
            return programs_for(
                geometry.rows * geometry.columns, self.int8.group_size * self.tile_blocks["BLOCK_GROUPS"]
            )
        in_row = _blocks(geometry.columns, self.tile_blocks["BLOCK_COLUMNS"])
        return max(1, _blocks(geometry.rows, self.tile_blocks["BLOCK_ROWS"]) * in_row)

    def _strides(self, member: Member, geometry: Geometry) -> tuple[MatrixStrides, MatrixStrides]:
        """Of weight and gradient, or of contiguous copies where either has no strides for rows and columns."""
        parameter, gradient = member.weight, member.gradient
        of_weight = weight_strides(parameter, geometry)
        if not isinstance(gradient, Tensor):
            assert of_weight is not None
            return of_weight, NO_STRIDES
        of_gradient = matrix_strides(gradient, geometry)
        if of_weight is None or of_gradient is None:
            shape = (geometry.rows, geometry.columns)
            weight = torch.empty(shape, dtype=parameter.dtype, device=parameter.device)
            self.copies.append(StridedCopy(member, weight, torch.empty_like(weight, dtype=gradient.dtype)))
            of_weight = MatrixStrides(weight.data_ptr(), 0, *weight.stride())
            of_gradient = MatrixStrides(self.copies[-1].gradient.data_ptr(), 0, *weight.stride())
        return of_weight, of_gradient

    def _on_device(self, values: Tensor) -> Tensor:
        return self._pinned(values).to(self.device, non_blocking=True)

    def _pinned(self, values: Tensor) -> Tensor:
        """To be copied without waiting. The caching host allocator lends the memory to nobody else before the copy, of
        whose stream it is told, is done."""
        return values.pin_memory() if self._pins else values

    @property
    def _pins(self) -> bool:
        return self.device.type not in ("cpu", "meta")

    @property
    def is_fused(self) -> bool:
        """Whether sketch and rescale are one launch: R fits the registers, and its moments end where channels end."""
        return self.rank <= sketch.FUSED_RANK and self.absmaxes is None

    def count_skipped(self) -> Tensor:
        """How many updates of all matrices were skipped."""
        self.uses.hold()
        return self.skipped.sum()

    def set_projections(self, matrices: Sequence[Tensor]) -> None:
        """Tell the kernels where P of each matrix is."""
        addresses = [matrix.data_ptr() for matrix in matrices]
        if addresses != self._projection_addresses:
            self.addresses[:, table.PROJECTION.value].copy_(self._on_device(_int64(addresses)))
            self._projection_addresses = addresses

    def update_gradient_addresses(self, gradients: Mapping[int, int] | Sequence[int]) -> None:
        """Copy the addresses of the matrices' gradients if one of them has changed. ``gradients``: where they are, by
        the member's index."""
        if self.is_implicit:
            return
        addresses = self._addresses_of_matrices(gradients)
        # A replayed graph leaves its own addresses there, of which the host learns nothing.
        if addresses != self._gradient_addresses or self._kept:
            self.gradients.copy_(self._pinned(_int64(addresses)), non_blocking=True)
            self._gradient_addresses = addresses
        if self._staging is None:
            self._staging = torch.empty(self.matrices, dtype=torch.int64, device="cpu", pin_memory=self._pins)

    def update_gradient_addresses_in_capture(self, gradients: Sequence[int]) -> None:
        """The same in a captured graph, which copies from memory that is its own from then on: allocated before, since
        no host memory can be pinned during a capture."""
        if self._staging is None:
            raise RuntimeError(WARM_UP)
        self._staging.copy_(_int64(self._addresses_of_matrices(gradients)))
        self.gradients.copy_(self._staging, non_blocking=True)
        self._kept.append(self._staging)
        self._staging = None

    def _addresses_of_matrices(self, gradients: Mapping[int, int] | Sequence[int]) -> list[int]:
        return [at if index is None else gradients[index] + at for index, at in self._gradient_places]

    def _find_gradient_places(self, members: Mapping[int, Member]) -> Iterator[tuple[int | None, int]]:
        """Where each matrix's gradient begins: so many bytes into the gradient of the member of an index, or at an
        address of its own (index None) if it is copied."""
        copies = {id(copy.member): copy.gradient for copy in self.copies}
        for (index, member), geometry in zip(members.items(), self.geometries, strict=True):
            copy = copies.get(id(member))
            gradient = member.formed_gradient if copy is None else copy
            stride = gradient.stride(0) * gradient.element_size() if geometry.matrices > 1 else 0
            for position in range(geometry.matrices):
                yield (index, position * stride) if copy is None else (None, copy.data_ptr() + position * stride)

    def gather_strided(self) -> None:
        """Copy weights and gradients without strides for rows and columns to where the kernels find them."""
        for member, weight, gradient in self.copies:
            parameter = member.weight
            weight.view(parameter.shape).copy_(parameter)
            gradient.view(parameter.shape).copy_(member.formed_gradient)

    def scatter_strided(self) -> None:
        """Copy the updated weights back."""
        for member, weight, _ in self.copies:
            member.weight.copy_(weight.view(member.weight.shape))


def _blocks(length: int, block: int) -> int:
    return -(-length // block)


def _int64(values: list[int]) -> Tensor:
    """On the host, in half of ``torch.tensor``'s 11 us for 224 values."""
    return torch.frombuffer(array("q", values), dtype=torch.int64)
