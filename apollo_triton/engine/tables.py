"""Which members share launches: the tables of a step, and the P that they read."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from torch import Tensor

from ..core.settings import Settings
from ..params.member import Member, has_row_moments
from .caches import Caches
from .fingerprint import identities

if TYPE_CHECKING:
    from ..backends.triton.matrices import Table


def make_tables(
    members: Mapping[int, Member],
    settings: Mapping[int, Settings],
    counts: Sequence[float],
    on_device: bool,
    caches: Caches,
) -> list[Table]:
    """The tables of the members that the kernels update, low-rank ones first.

    ``members`` and ``counts`` (steps so far) are by the index of the member, ``settings`` by that of the group.
    ``on_device``: whether the step count is there.
    """
    if not members:
        return []
    from ..backends.triton.layout import is_aligned, make_moments_contiguous
    from ..backends.triton.matrices import Int8Format, Table

    launch_groups = dict(zip(settings, identities([*settings.values()]), strict=True))
    launches: dict[tuple[Any, ...], dict[int, Member]] = {}
    for index, member in members.items():
        by_rows = has_row_moments(member.parameter, settings[member.param.group])
        make_moments_contiguous(member, by_rows)
        geometry, shard, gradient = member.geometry, member.shard, member.gradient
        key = (
            geometry is None,
            by_rows,
            geometry is not None and geometry.keeps_rows,
            bool(shard.sum_axes),
            bool(shard.width_axes),
            launch_groups[member.param.group],
            counts[index],
            member.parameter.device,
            member.parameter.dtype,
            Int8Format.of(member.parameter),
            None if isinstance(gradient, Tensor) else index,  # each by itself
            gradient.dtype,
            member.moment_dtype,
            is_aligned(member, by_rows),
        )
        launches.setdefault(key, {})[index] = member
    made = [
        Table(members, settings[next(iter(members.values())).param.group], aligned=key[-1])
        for key, members in launches.items()
    ]
    tables = [table for table in made if not table.is_dense] + [table for table in made if table.is_dense]
    _assign_projections(tables, settings, counts, on_device, caches)
    return tables


def _assign_projections(
    tables: list[Table], settings: Mapping[int, Settings], counts: Sequence[float], on_device: bool, caches: Caches
) -> None:
    """Give the tables whose P is in memory theirs: one for each seed and width, shared by all at the same step."""
    from ..backends.triton.projections import (
        MATERIALISED,
        ProjectionBuffer,
        buffer_for,
        projection_dtype,
        projection_kind,
    )

    made: dict[tuple[Any, ...], ProjectionBuffer] = {}
    for table in tables:
        group, count = settings[table.group], counts[table.first]
        if table.is_dense or projection_kind(group, table.is_width_sharded) is not MATERIALISED:
            continue
        epoch = None if on_device else group.epoch(int(count) + 1)
        dtype = projection_dtype(table.gradient_dtype)
        for seed, start, width in sorted(set(table.projection_keys)):
            kind = group.distribution, seed, table.rank, start, width, dtype, table.device
            key = kind, group.update_proj_gap, count
            if key not in made:
                made[key] = buffer_for(kind, epoch, caches.projection_buffers)
            table.projections.append(made[key])
        at = {(P.seed, P.start, P.width): P.buffer for P in table.projections}
        table.set_projections([at[key] for key in table.projection_keys])
