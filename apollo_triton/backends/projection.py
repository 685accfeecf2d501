"""P of one parameter in one step, as a matrix in memory. Both backends ask here.

The reference path reads every P from memory. The kernels read svd's P from here, and the slices of P of weights that
are sharded along the projected dimension; ``triton/projections.py`` has all others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..core import streams
from ..core.geometry import as_matrices
from ..core.projection import ProjectionCache, top_singular_vectors
from ..core.settings import Settings
from ..params.member import Member
from ..params.sharding import as_sharded
from ..params.state import state_shapes


def projection_of(member: Member, settings: Settings, step: int, cache: ProjectionCache) -> Tensor:
    """P of step ``step``, float32: ``[rank, width]``, or ``[experts, rank, width]`` for svd."""
    geometry = member.geometry
    assert geometry is not None
    assert settings.rank is not None
    if settings.proj == "svd":
        return _singular_vectors(member, settings, step)
    first = member.shard.first_width
    return cache.get(
        member.state["seed"],
        settings.epoch(step),
        settings.rank,
        first,
        first + geometry.width,
        settings.distribution,
        member.parameter.device,
    )


def _singular_vectors(member: Member, settings: Settings, step: int) -> Tensor:
    """svd's P, made from the gradient once a period and kept in the state."""
    state, geometry = member.state, member.geometry
    assert geometry is not None
    assert settings.rank is not None
    if "projection" not in state or (step - 1) % settings.update_proj_gap == 0:
        vectors = [
            top_singular_vectors(matrix, settings.rank, geometry.keeps_rows)
            for matrix in as_matrices(member.formed_gradient, geometry)
        ]
        P = torch.stack(vectors) if member.moment("exp_avg").dim() == 3 else vectors[0]
        shape = state_shapes(member.parameter, settings)["projection"]
        state["projection"] = as_sharded("projection", P, member.parameter, member.shard, shape)
    P = member.local_state("projection")
    streams.hold_here(P)  # the next period frees it, on whatever stream it was made
    return P
