"""Which moments can be 8-bit: those of matrices whose shards are whole blocks of 256 elements on every rank.

A block's elements share one absmax, so a block that spanned ranks would have to be exchanged at every step. Every rank
decides from the whole shape and the mesh, and so all decide alike, whatever their own shards are.
"""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

from torch import Tensor

from ..core.dtensors import is_dtensor
from ..core.moments_8bit import BLOCK, absmax_count
from ..core.settings import Settings
from .member import geometry_of, has_row_moments
from .sharding import local_shard, moment_cuts

# Moments of lower ranks stay in ``state_dtype``: 8 bits would save little of them (9.5 MB of 7B's 54 GB with AdamW) and
# cost a launch. Their blocks would be 17 to 256 channels, which do not divide the shards of real models.
LEAST_RANK = 16
SPANS_RANKS = "blocks of 256 elements would span ranks"


def absmax_shape(parameter: Tensor, settings: Settings) -> tuple[int, ...]:
    """The shape of the absmaxes of a parameter's 8-bit moments.

    Low-rank: a number for each block of the row-major ``[channels, rank]``, with the experts in front. Dense: blocks
    take the place of as many last dimensions as they fill, ``[rows, columns / 256]`` where 256 divides the columns, so
    that a cut of the weight along either dimension cuts them too.
    """
    geometry = geometry_of(parameter, settings)
    if geometry is not None:
        blocks = absmax_count(geometry.channels * (settings.rank or 0))
        return (geometry.matrices, blocks) if geometry.matrices > 1 else (blocks,)
    return dense_absmax_shape(parameter.shape)


def dense_absmax_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of the absmaxes of dense 8-bit moments of ``shape``."""
    kept = _kept_dimensions(shape)
    return (*shape[:kept], absmax_count(prod(shape[kept:])))


def obstacle_to_8bit(parameter: Tensor, settings: Settings) -> str:
    """Why a parameter's moments cannot be 8-bit here, whatever ``state_bits`` says; "" if they can."""
    obstacle = obstacle_anywhere(parameter, settings)
    return obstacle or ("" if shards_are_whole_blocks(parameter, settings) else SPANS_RANKS)


def obstacle_anywhere(parameter: Tensor, settings: Settings) -> str:
    """Why a parameter's moments cannot be 8-bit however it is sharded; "" if they may be."""
    geometry = geometry_of(parameter, settings)
    if parameter.dim() < 2:
        return "it has one dimension"
    if settings.second_moment == "row" and not has_row_moments(parameter, settings):
        return "it is one row, and its group has second_moment='row'"  # which needs no bitsandbytes
    if geometry is not None and (settings.rank or 0) < LEAST_RANK:
        return f"its rank is below {LEAST_RANK}"
    elements = parameter.numel()
    if geometry is not None:
        elements = geometry.matrices * geometry.channels * (settings.rank or 0)
    if elements < max(1, settings.min_8bit_size):
        return f"its moments have fewer elements than min_8bit_size ({settings.min_8bit_size})"
    return ""


def shards_are_whole_blocks(parameter: Tensor, settings: Settings) -> bool:
    """Whether each rank's moments begin and end where blocks do, or with the whole moments, and absmaxes are cut at the
    same places."""
    if not is_dtensor(parameter):
        return True
    geometry = geometry_of(parameter, settings)
    cuts = moment_cuts(parameter, local_shard(parameter, geometry))
    if geometry is None:
        shape = tuple(parameter.shape)
        blocked = _kept_dimensions(shape)
    else:
        experts = (geometry.matrices,) if geometry.matrices > 1 else ()
        shape = (*experts, geometry.channels, settings.rank or 0)
        blocked = len(experts)
    if any(dim > blocked and axis.size > 1 for dim, axis, _ in cuts):
        return False
    pieces = [axis.size for dim, axis, _ in cuts if dim == blocked]
    return _cut_between_blocks(
        shape[blocked], absmax_shape(parameter, settings)[-1], prod(shape[blocked + 1 :]), pieces
    )


def _kept_dimensions(shape: Sequence[int]) -> int:
    """How many leading dimensions the absmaxes of dense moments keep. Blocks do not span them."""
    return next((kept for kept in range(len(shape) - 1, 0, -1) if prod(shape[kept:]) % BLOCK == 0), 0)


def _cut_between_blocks(length: int, blocks: int, elements: int, pieces: Sequence[int]) -> bool:
    """Whether ``torch.chunk``, in turn into each number of ``pieces``, cuts ``length`` indices of ``elements`` elements
    each where it cuts their ``blocks``."""
    if not pieces or not length:
        return True
    size, block_size = -(-length // pieces[0]), -(-blocks // pieces[0])
    if size == length:  # all in the first piece
        return block_size == blocks and _cut_between_blocks(length, blocks, elements, pieces[1:])
    if size * elements != block_size * BLOCK:
        return False
    last, last_blocks = length % size, blocks - length // size * block_size
    return _cut_between_blocks(size, block_size, elements, pieces[1:]) and _cut_between_blocks(
        last, last_blocks, elements, pieces[1:]
    )
