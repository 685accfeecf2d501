"""Pointer tables: the matrices that one launch updates, as addresses, sizes and strides that stay on the device.

A ``Table`` lives as long as its parameters and their state stay where they are. Gradients may move at every step; then
one vector of addresses is copied, and nothing otherwise. It holds no gradient, so that ``zero_grad`` frees them.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, MutableSet, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ...core.geometry import Geometry
from ...core.moments_8bit import whole_blocks
from ...core.operands import Operands
from ...core.settings import Settings
from ...int8.weight import Int8Weight
from ...kernels import apply, dense, int8, sketch, table
from ...kernels import sketch as sketch_kernels
from ...params.member import Member
from ..interface import WARM_UP
from .layout import Layout, flat_geometry, layout_of, weight_layout_of
from .projections import Projection, projection_kind


class Copy(NamedTuple):
    """A parameter whose matrices have no strides (a ``channels_last`` convolution), and stand-ins that have."""

    member: Member
    weight: Tensor
    gradient: Tensor


class Int8(NamedTuple):
    """What int8 weights of one launch have in common."""

    group_size: int
    stochastic_rounding: bool

    @classmethod
    def of(cls, parameter: Tensor) -> Int8 | None:
        """None for a weight that is not int8."""
        if not isinstance(parameter, Int8Weight):
            return None
        return cls(parameter.group_size, parameter.stochastic_rounding)


class MomentTable:
    """The channels of a table's matrices whose moments are on this rank, for ``rescale`` after a sketch that was summed
    over ranks. Fields as in ``Table``."""

    def __init__(self, whole: Table) -> None:
        self.device, self.rank, self.state_dtype = whole.device, whole.rank, whole.state_dtype
        self.keeps_rows, self.aligned, self.channel_blocks = whole.keeps_rows, whole.aligned, whole.channel_blocks
        self.matrices = whole.matrices
        self.absmaxes = whole.absmaxes  # None: 8-bit moments are not sharded
        addresses = whole.addresses.tolist()
        counts = [each.piece.moments for each in whole.members for _ in each.piece.moment_numbers]
        numbers = [number for each in whole.members for number in each.piece.moment_numbers]
        own_programs = [_programs(count, self.channel_blocks["BLOCK_CHANNELS"]) for count in counts]
        self.channels = program = 0
        for row, count, number, programs in zip(addresses, counts, numbers, own_programs, strict=True):
            row[(table.ROWS if self.keeps_rows else table.COLUMNS).value] = count
            row[table.NUMBER.value] = number
            row[table.FIRST_CHANNEL.value], row[table.FIRST_CHANNEL_PROGRAM.value] = self.channels, program
            self.channels += count
            program += programs
        self.addresses = torch.tensor(addresses, dtype=torch.int64, device="cpu").to(self.device)
        self.program_counts = torch.tensor(own_programs, dtype=torch.int64, device="cpu").to(self.device)
        self.channel_programs = _owners(own_programs).to(self.device)


class Table:
    """The matrices of one launch of each kernel: same dtypes, orientation, alignment, settings and step count.

    ``addresses`` int64 ``[matrices, 16]`` (kernels/table.py); ``gradients`` int64 ``[matrices]``;
    ``channel_programs`` and ``tile_programs`` int32, the matrix of each program; ``norm_programs`` int32
    ``[programs, 2]``, matrix and share; ``matrices_of``: which matrices are whose, by the member's index in the plan,
    and ``first`` the first index; ``absmaxes`` int64 ``[matrices, 2]`` where moments are 8-bit, None otherwise, and
    ``split`` how many programs of ``sketch`` share the channels of one of ``rescale`` there; ``skipped`` int32
    ``[matrices]``, updates that gradients which were not finite have cost.
    """

    def __init__(self, members: Mapping[int, Member], settings: Settings, aligned: bool) -> None:
        self.members = list(members.values())
        self.first = next(iter(members))
        first = members[self.first]
        self.group = first.group
        self.device = first.parameter.device
        self.weight_dtype = first.parameter.dtype
        self.gradient_dtype = first.gradient.dtype
        self.state_dtype = first.state["exp_avg"].dtype
        self.int8 = Int8.of(first.parameter)
        self.is_split = bool(first.piece.summed)
        self.is_scattered = bool(first.piece.scattered)
        self.aligned = aligned
        self.is_dense = first.geometry is None
        self.keeps_rows = first.geometry is None or first.geometry.keeps_rows
        self.rank = 0 if settings.rank is None or self.is_dense else settings.rank
        self.copies: list[Copy] = []
        self.projections: list[Projection] = []
        self.channel_blocks = {} if self.is_dense else sketch.blocks(self.rank)
        self.split = 1
        if self.state_dtype == torch.uint8:
            own = self.channel_blocks["BLOCK_CHANNELS"]
            self.channel_blocks["BLOCK_CHANNELS"] = max(own, whole_blocks(self.rank))
            self.split = self.channel_blocks["BLOCK_CHANNELS"] // own
        self.geometries = [member.geometry or flat_geometry(member.weight, member.gradient) for member in self.members]
        self.tile_blocks = {}
        if self.int8 is not None:
            self.tile_blocks = int8.blocks(self.int8.group_size)
        elif not self.is_dense:
            self.tile_blocks = apply.blocks(max(each.columns for each in self.geometries))
        counts = [geometry.matrices for geometry in self.geometries]
        self.matrices_of = {
            index: slice(end - count, end)
            for index, count, end in zip(members, counts, itertools.accumulate(counts), strict=True)
        }
        self._build()
        self._gradient_addresses: list[int] = []
        self._projection_addresses: list[int] = []
        self._staging: Tensor | None = None
        self._kept: list[Tensor] = []
        self.moments = MomentTable(self) if self.is_scattered else None
        self.move_gradients()

    def _build(self) -> None:
        rows: list[list[int]] = []
        channel_programs, tile_programs, norm_programs = [], [], []
        channel = channel_program = tile_program = 0
        for member, geometry in zip(self.members, self.geometries, strict=True):
            weight, gradient = self._layouts(member, geometry)
            size = member.parameter.element_size()
            exp_avg, exp_avg_sq = member.local_state("exp_avg"), member.local_state("exp_avg_sq")
            norm = 0 if self.is_dense else member.local_state("update_norm").data_ptr()
            moments = 1 if self.is_dense else member.piece.moments * self.rank
            numbers = [member.piece.first_element] if self.is_dense else member.piece.numbers
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
                        numbers[position],
                        channel,
                        channel_program,
                        tile_program,
                    ]
                )
                if self.is_dense:
                    moments_layout = layout_of(exp_avg, geometry)
                    assert moments_layout is not None
                    rows[-1][table.STATE_ROW_STRIDE.value] = moments_layout.row_stride
                    rows[-1][table.STATE_COLUMN_STRIDE.value] = moments_layout.column_stride
                    tile_programs.append(_blocks(geometry.rows * geometry.columns, dense.BLOCK))
                else:
                    channel_programs.append(_programs(geometry.channels, self.channel_blocks["BLOCK_CHANNELS"]))
                    tile_programs.append(self._tiles(geometry))
                    channel_program += channel_programs[-1]
                shares = _programs(geometry.rows * geometry.columns, dense.BLOCK)
                norm_programs.append(min(shares, dense.NORM_PROGRAMS))
                tile_program += tile_programs[-1]
                channel += geometry.channels
        self.channels = channel
        self.slices_of_P = [
            (member.state["seed"], member.piece.first_width, geometry.width)
            for member, geometry in zip(self.members, self.geometries, strict=True)
            for _ in range(geometry.matrices)
        ]
        self.matrices = len(rows)
        stride, columns = table.GRADIENT_ROW_STRIDE.value, table.COLUMNS.value
        self.flat_gradients = self.aligned and all(
            row[table.ROWS.value] == 1 or row[stride] == row[columns] for row in rows
        )
        self.addresses = self._on_device(torch.tensor(rows, dtype=torch.int64, device="cpu"))
        self.gradients = torch.empty(self.matrices, dtype=torch.int64, device=self.device)
        self.skipped = torch.zeros(self.matrices, dtype=torch.int32, device=self.device)
        self.channel_programs = self._on_device(_owners(channel_programs))
        self.absmaxes = self._absmax_addresses() if self.state_dtype == torch.uint8 else None
        if self.is_split:  # what sums over ranks are made of
            counts = [geometry.channels for geometry in self.geometries for _ in range(geometry.matrices)]
            self.channel_counts = self._on_device(torch.tensor(counts, dtype=torch.int64, device="cpu"))
            self.program_counts = self._on_device(torch.tensor(channel_programs, dtype=torch.int64, device="cpu"))
        self.tile_programs = self._on_device(_owners(tile_programs))
        of_each = [torch.arange(count, dtype=torch.int32, device="cpu") for count in norm_programs]
        self.norm_programs = self._on_device(torch.stack((_owners(norm_programs), torch.cat(of_each)), 1).contiguous())

    def _absmax_addresses(self) -> Tensor:
        """Of each matrix's 8-bit M and V."""
        rows = []
        for member, geometry in zip(self.members, self.geometries, strict=True):
            for position in range(geometry.matrices):
                both = (member.state[f"{name}_absmax"] for name in ("exp_avg", "exp_avg_sq"))
                rows.append([each.data_ptr() + 4 * position * each.shape[-1] for each in both])
        return self._on_device(torch.tensor(rows, dtype=torch.int64, device="cpu"))

    def _tiles(self, geometry: Geometry) -> int:
        """How many programs of ``apply`` a matrix has."""
        if self.int8 is not None:
            return _programs(geometry.rows * geometry.columns, self.int8.group_size * self.tile_blocks["BLOCK_GROUPS"])
        in_row = _blocks(geometry.columns, self.tile_blocks["BLOCK_COLUMNS"])
        return max(1, _blocks(geometry.rows, self.tile_blocks["BLOCK_ROWS"]) * in_row)

    def _layouts(self, member: Member, geometry: Geometry) -> tuple[Layout, Layout]:
        """Of weight and gradient; of contiguous stand-ins where either has no strides."""
        parameter, gradient = member.weight, member.gradient
        weight_layout, gradient_layout = weight_layout_of(parameter, geometry), layout_of(gradient, geometry)
        if weight_layout is None or gradient_layout is None:
            shape = (geometry.rows, geometry.columns)
            weight = torch.empty(shape, dtype=parameter.dtype, device=parameter.device)
            self.copies.append(Copy(member, weight, torch.empty_like(weight, dtype=gradient.dtype)))
            weight_layout = Layout(weight.data_ptr(), 0, *weight.stride())
            gradient_layout = Layout(self.copies[-1].gradient.data_ptr(), 0, *weight.stride())
        return weight_layout, gradient_layout

    def _on_device(self, values: Tensor) -> Tensor:
        """Copied without waiting: from pinned memory, which the caching host allocator keeps until the copy is done."""
        if self.device.type == "cpu":
            return values
        return values.pin_memory().to(self.device, non_blocking=True)

    def point_at(self, matrices: Sequence[Tensor]) -> None:
        """Tell the kernels where P of each matrix is."""
        addresses = [matrix.data_ptr() for matrix in matrices]
        if addresses != self._projection_addresses:
            self._projection_addresses = addresses
            column = torch.tensor(addresses, dtype=torch.int64, device="cpu")
            self.addresses[:, table.PROJECTION.value].copy_(self._on_device(column))

    def move_gradients(self) -> None:
        """Copy the gradients' addresses if one of them has changed."""
        addresses = self._find_gradients()
        # A replayed graph leaves its own addresses there, of which the host learns nothing.
        if addresses != self._gradient_addresses or self._kept:
            self._gradient_addresses = addresses
            self.gradients.copy_(self._on_device(torch.tensor(addresses, dtype=torch.int64, device="cpu")))
        if self._staging is None:
            self._staging = torch.empty(
                self.matrices, dtype=torch.int64, device="cpu", pin_memory=self.device.type != "cpu"
            )

    def move_gradients_in_capture(self) -> None:
        """The same in a captured graph, which copies from memory that is its own from then on: allocated before, since
        no host memory can be pinned during a capture."""
        if self._staging is None:
            raise RuntimeError(WARM_UP)
        self._staging.copy_(torch.tensor(self._find_gradients(), dtype=torch.int64, device="cpu"))
        self.gradients.copy_(self._staging, non_blocking=True)
        self._kept.append(self._staging)
        self._staging = None

    def _find_gradients(self) -> list[int]:
        addresses: list[int] = []
        stand_ins = {id(copy.member): copy.gradient for copy in self.copies}
        for member, geometry in zip(self.members, self.geometries, strict=True):
            gradient = stand_ins.get(id(member))
            if gradient is None:
                gradient = member.gradient
            address = gradient.data_ptr()
            if geometry.matrices == 1:
                addresses.append(address)
            else:
                stride = gradient.stride(0) * gradient.element_size()
                addresses += [address + position * stride for position in range(geometry.matrices)]
        return addresses

    def copy_in(self) -> None:
        """Bring weights and gradients that need a stand-in there."""
        for member, weight, gradient in self.copies:
            parameter = member.weight
            weight.view(parameter.shape).copy_(parameter)
            gradient.view(parameter.shape).copy_(member.gradient)

    def copy_out(self) -> None:
        """Bring the updated stand-ins back."""
        for member, weight, _ in self.copies:
            member.weight.copy_(weight.view(member.weight.shape))


def _blocks(length: int, block: int) -> int:
    return -(-length // block)


def _programs(length: int, block: int) -> int:
    """How many programs share ``length``: one where it is 0, so that an empty piece's matrix keeps its u_prev."""
    return max(1, _blocks(length, block))


def _owners(programs: list[int]) -> Tensor:
    """The number of the matrix of each program, int32."""
    counts = torch.tensor(programs, dtype=torch.int64, device="cpu")
    return torch.repeat_interleave(torch.arange(len(programs), dtype=torch.int32, device="cpu"), counts)


class OperandTable:
    """A table of one matrix, which knows no gradient; fields as in ``tables.Table``. It keeps the ``member`` alive.

    It lives as long as the parameter and its state stay where they are. ``shared`` holds the projections in memory that
    other tables use, and takes this one's.
    """

    matrices = 1

    def __init__(self, member: Member, settings: Settings, shared: MutableSet[Projection]) -> None:
        parameter, state, geometry = member.parameter, member.state, member.geometry
        assert geometry is not None
        assert settings.rank is not None
        self.member, self.parameter, self.device, self.geometry = member, parameter, parameter.device, geometry
        self.rank, self.keeps_rows, self.channels = settings.rank, geometry.keeps_rows, geometry.channels
        self.state_dtype = state["exp_avg"].dtype
        moments = [state[name].data_ptr() for name in ("exp_avg", "exp_avg_sq")]
        self.aligned = all(address % 16 == 0 for address in moments)
        self.channel_blocks = sketch_kernels.blocks(self.rank)
        self.absmaxes = None
        if self.state_dtype == torch.uint8:
            own = self.channel_blocks["BLOCK_CHANNELS"]
            self.channel_blocks["BLOCK_CHANNELS"] = max(own, whole_blocks(self.rank))
            both = [state[f"{name}_absmax"].data_ptr() for name in ("exp_avg", "exp_avg_sq")]
            self.absmaxes = self._on_device(both, torch.int64)
        programs = -(-self.channels // self.channel_blocks["BLOCK_CHANNELS"])
        self.channel_programs = torch.zeros(programs, dtype=torch.int32, device=self.device)
        self.skipped = torch.zeros(1, dtype=torch.int32, device=self.device)
        self.projections = list[Projection]()
        if projection_kind(settings) is sketch_kernels.MATERIALISED:
            self.projections.append(self._projection(shared, settings.distribution, state["seed"]))
        row = [0] * table.FIELDS
        for field, value in (
            (table.EXP_AVG, moments[0]),
            (table.EXP_AVG_SQ, moments[1]),
            (table.UPDATE_NORM, state["update_norm"].data_ptr()),
            (table.PROJECTION, self.projections[0].buffer.data_ptr() if self.projections else 0),
            (table.SEED, state["seed"]),
            (table.ROWS, geometry.rows),
            (table.COLUMNS, geometry.columns),
        ):
            row[field.value] = value
        self.addresses = self._on_device(row, torch.int64)

    def _projection(self, shared: MutableSet[Projection], distribution: str, seed: int) -> Projection:
        """One of the ``shared`` of this weight's kind, or a new one. Each table writes its own epoch before it reads,
        so they may differ."""
        kind = distribution, seed, self.rank, 0, self.geometry.width, self.device
        for each in shared:
            if each.kind == kind:
                return each
        made = Projection.empty(*kind)
        shared.add(made)
        return made

    def point_at(self, projection: Tensor) -> None:
        """Tell the kernels where svd's P is."""
        self.addresses[0, table.PROJECTION.value].copy_(self._on_device([projection.data_ptr()], torch.int64)[0, 0])

    def _on_device(self, values: list[int], dtype: torch.dtype) -> Tensor:
        """A row, copied without waiting."""
        row = torch.tensor([values], dtype=dtype, device="cpu")
        return row if self.device.type == "cpu" else row.pin_memory().to(self.device, non_blocking=True)

    def split(self, operands: Operands) -> tuple[Tensor, Tensor]:
        """The operand whose features are the channels, and the one whose features are summed over."""
        X, dY = operands
        return (dY, X) if self.keeps_rows else (X, dY)
