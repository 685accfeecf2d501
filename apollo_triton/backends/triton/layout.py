"""How the tensors of a parameter lie in memory, as the kernels address it: addresses, strides and alignment."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from ...core.geometry import Geometry
from ...int8.weight import Int8Weight
from ...params.member import Member
from ...params.state import MOMENTS

_ALIGNMENT = 16  # bytes: the widest load


class MatrixStrides(NamedTuple):
    """A weight or gradient as ``matrices`` of rows x columns: address of the first, and strides in elements."""

    address: int
    matrix_stride: int
    row_stride: int
    column_stride: int

    def aligned(self, columns: int, rows: int, itemsize: int) -> bool:
        """Whether rows are contiguous, start at multiples of 16 bytes, and hold multiples of 8 elements."""
        return (
            self.column_stride == 1
            and (self.address | self.matrix_stride * itemsize | self.row_stride * itemsize) % _ALIGNMENT == 0
            and columns % 8 == 0
            and (self.row_stride % 8 == 0 or rows == 1)
        )


NO_STRIDES = MatrixStrides(0, 0, 0, 0)  # of a gradient that is never formed


def matrix_strides(tensor: Tensor, geometry: Geometry) -> MatrixStrides | None:
    """How a tensor's matrices lie in its memory; None where rows and columns have no strides (``channels_last``)."""
    try:
        matrices = tensor.view(geometry.matrices, geometry.rows, geometry.columns)
    except RuntimeError:
        return None
    return MatrixStrides(tensor.data_ptr(), *matrices.stride())


def weight_strides(weight: Tensor, geometry: Geometry) -> MatrixStrides | None:
    """The same of a weight; of an int8 one, where scales and zero points are instead of strides."""
    if isinstance(weight, Int8Weight):
        return MatrixStrides(weight.q.data_ptr(), 0, weight.scale.data_ptr(), weight.zero.data_ptr())
    return matrix_strides(weight, geometry)


def flat_geometry(member: Member, by_rows: bool) -> Geometry:
    """A dense parameter as one matrix: its rows if it is ``by_rows``, for one second moment each; else one row if it
    and its gradient are contiguous, and rows of its last dimension if not."""
    parameter, gradient = member.weight, member.formed_gradient
    if by_rows:
        return Geometry(1, len(parameter), parameter.numel() // len(parameter), keeps_rows=True)
    if parameter.dim() < 2 or (parameter.is_contiguous() and gradient.is_contiguous()):
        return Geometry(1, 1, parameter.numel(), keeps_rows=True)
    return Geometry(1, parameter.numel() // parameter.shape[-1], parameter.shape[-1], keeps_rows=True)


def make_moments_contiguous(member: Member, by_rows: bool) -> None:
    """Lay a dense parameter's moments out as the kernels read them, where a checkpoint has brought them in another
    layout. Those of low rank are contiguous, and so are those of rows and codes."""
    if member.geometry is not None or member.is_8bit:
        return
    of_elements = MOMENTS[:1] if by_rows else MOMENTS
    moments = [member.local_state(name) for name in of_elements]
    strides = [matrix_strides(moment, flat_geometry(member, by_rows)) for moment in moments]
    if None in strides or moments[0].stride() != moments[-1].stride():
        member.state.update({name: member.state[name].contiguous() for name in of_elements})


def rounds_by_eights(member: Member) -> bool:
    """Whether the bits for rounding of a low-rank weight begin at a multiple of 8, so that eight neighbours share a
    call for them. A shard beside uneven ones may begin elsewhere, whatever its own size."""
    assert member.shard.geometry is not None
    width = member.shard.geometry.width
    return all(offset * width % 8 == 0 for offset in member.shard.rounding_offsets)


def is_aligned(member: Member, by_rows: bool) -> bool:
    """Whether weight, gradient and moments of a parameter suit 16-byte loads and stores."""
    parameter, gradient = member.weight, member.gradient
    exp_avg, exp_avg_sq = (member.moment(name) for name in MOMENTS)
    if (exp_avg.data_ptr() | (0 if by_rows else exp_avg_sq.data_ptr())) % _ALIGNMENT:
        return False
    if not isinstance(gradient, Tensor):  # its kernels look at W, X and dY themselves
        return True
    if member.geometry is None:
        tensors = parameter, gradient, exp_avg, exp_avg_sq
        addresses = parameter.data_ptr() | gradient.data_ptr()
        return (
            all(tensor.is_contiguous() for tensor in tensors)
            and addresses % _ALIGNMENT == 0
            and flat_geometry(member, by_rows).columns % 8 == 0
        )
    geometry = member.geometry
    if geometry.matrices > 1 and exp_avg[0].numel() * exp_avg.element_size() % _ALIGNMENT:
        return False
    if not rounds_by_eights(member):
        return False
    if isinstance(parameter, Int8Weight):
        group = parameter.group_size  # a power of two that divides a row
        if group % 8 or group & (group - 1) or geometry.columns % group or parameter.q.data_ptr() % _ALIGNMENT:
            return False
    strided = [tensor for tensor in (parameter, gradient) if not isinstance(tensor, Int8Weight)]
    found = [(matrix_strides(tensor, geometry), tensor.element_size()) for tensor in strided]
    return all(strides and strides.aligned(geometry.columns, geometry.rows, size) for strides, size in found)
