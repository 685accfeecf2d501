"""What would save most of an optimizer's state, if most of it belongs to weights that are dense: one sentence."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from ..core.coverage import narrowness
from ..core.coverage_notes import abridged
from ..core.embeddings import CHOICES, is_concerned
from ..core.geometry import Geometry
from ..core.kinds import EMBEDDING, HEAD, MATRIX
from ..core.messages import readable_bytes
from ..core.settings import Settings
from .member import Param, find_shard
from .state import state_without_memory

SMALLEST = "rows-8bit"  # of what ``embeddings=`` takes
LEAST_SHARE = 0.1  # of the state: what saves less is not worth a sentence
MOST_RANK = 256  # the default of APOLLOAdamW.apollo


class Counted(NamedTuple):
    """A weight that is trained, its kind, and the bytes of its state on this rank. ``is_split``: whether its group is
    one that the optimizer has made, for which ``embeddings=`` is an argument."""

    param: Param
    kind: str
    is_low_rank: bool
    state_bytes: int
    is_split: bool


class Saving(NamedTuple):
    bytes: int
    advice: str


def state_bytes(param: Param, settings: Settings) -> int:
    """The bytes of a state of ``param`` that is made under ``settings``, on this rank."""
    values = state_without_memory(param.tensor, settings, find_shard(param, settings)).values()
    return sum(value.nbytes for value in values)


def advice_on_state(weights: Sequence[Counted], settings: Mapping[int, Settings]) -> str:
    """What to do, with the bytes that it saves.

    "" if low-rank weights hold most of the state, or if nothing saves a tenth of it.
    """
    total = sum(weight.state_bytes for weight in weights)
    if 2 * sum(weight.state_bytes for weight in weights if not weight.is_low_rank) < total:
        return ""
    matrices = [weight for weight in weights if weight.kind == MATRIX and not weight.is_low_rank]
    ranked = [settings[weight.param.group] for weight in weights if weight.is_low_rank]
    if ranked:
        savings = [_more_targets(matrices, settings, ranked[0]), _lower_rank(weights, matrices, settings, ranked[0])]
    else:
        savings = [_any_rank(matrices, settings)]
    for saving in (max(savings), max(_half_the_moments(weights, settings), _rows_of_tables(weights, settings))):
        if saving.bytes > LEAST_SHARE * total:
            return saving.advice
    return ""


def _more_targets(matrices: Sequence[Counted], settings: Mapping[int, Settings], ranked: Settings) -> Saving:
    """To make low-rank, at the rank of the others, what can be."""
    possible = [weight for weight in matrices if not _narrowness(weight.param.tensor, ranked)]
    saved = _saved(possible, settings, ranked)
    return Saving(
        saved,
        f"{_names(possible)} can be low-rank at rank {ranked.rank} too, which saves {readable_bytes(saved)}: name them "
        "in target_modules, or put them into the group with that rank",
    )


def _lower_rank(
    weights: Sequence[Counted], matrices: Sequence[Counted], settings: Mapping[int, Settings], ranked: Settings
) -> Saving:
    """To lower the rank to a quarter of the width of the largest matrix for which it is too high."""
    narrow = [weight for weight in matrices if _narrowness(weight.param.tensor, ranked)]
    if not narrow:
        return Saving(0, "")
    largest = max(narrow, key=lambda weight: weight.state_bytes)
    lower = replace(ranked, rank=max(1, _geometry(largest.param.tensor, ranked).width // 4))
    suited = [weight for weight in narrow if not _narrowness(weight.param.tensor, lower)]
    low_rank = [weight for weight in weights if weight.is_low_rank and settings[weight.param.group].rank == ranked.rank]
    saved = _saved([*suited, *low_rank], settings, lower)
    return Saving(
        saved if suited else 0,
        f"rank {ranked.rank} is too high for {_names(suited)}: rank={lower.rank} makes them low-rank and saves "
        f"{readable_bytes(saved)} in all",
    )


def _any_rank(matrices: Sequence[Counted], settings: Mapping[int, Settings]) -> Saving:
    """To make anything low-rank."""
    if not matrices:
        return Saving(0, "")
    given = settings[matrices[0].param.group]
    rank = min(MOST_RANK, max(_geometry(weight.param.tensor, given).width for weight in matrices) // 4)
    ranked = replace(given, rank=max(1, rank))
    possible = [weight for weight in matrices if not _narrowness(weight.param.tensor, ranked)]
    saved = _saved(possible, settings, ranked)
    # Without a name an embedding cannot be told from a matrix.
    most = "" if all(weight.param.name for weight in possible) else "up to "
    return Saving(
        saved,
        f"no weight has a rank, so this is AdamW: APOLLOAdamW.apollo(model, rank={ranked.rank}) or groups with a "
        f"'rank' save {most}{readable_bytes(saved)}",
    )


def _half_the_moments(weights: Sequence[Counted], settings: Mapping[int, Settings]) -> Saving:
    """To keep moments in bfloat16."""
    saved = 0
    for weight in weights:
        group = settings[weight.param.group]
        if group.state_dtype == torch.float32:
            saved += max(0, weight.state_bytes - state_bytes(weight.param, replace(group, state_dtype=torch.bfloat16)))
    return Saving(
        saved,
        f"{_held(weights)}state_dtype=torch.bfloat16 halves float32 moments, which saves {readable_bytes(saved)}",
    )


def _rows_of_tables(weights: Sequence[Counted], settings: Mapping[int, Settings]) -> Saving:
    """To keep the moments of embeddings and heads by row and in 8 bits: by ``embeddings=``, or in a group by hand."""
    saved, tables = 0, []
    for weight in weights:
        if is_concerned(SMALLEST, weight.kind, weight.param.name, weight.param.tensor) and not weight.is_low_rank:
            smaller = replace(settings[weight.param.group], **CHOICES[SMALLEST])
            if (less := weight.state_bytes - state_bytes(weight.param, smaller)) > 0:
                saved += less
                tables.append(weight)
    way = f"embeddings={SMALLEST!r} keeps"
    if not all(weight.is_split for weight in tables):
        whose, keep = ("their", "keep") if len(tables) > 1 else ("its", "keeps")
        way = f"{_names(tables)} in a group of {whose} own with {CHOICES[SMALLEST]} {keep}"
    return Saving(saved, f"{_held(weights)}{way} a byte an element, which saves {readable_bytes(saved)}")


def _held(weights: Sequence[Counted]) -> str:
    """What embeddings and heads hold, if it is most of the state."""
    of_tables = sum(weight.state_bytes for weight in weights if weight.kind in (EMBEDDING, HEAD))
    total = sum(weight.state_bytes for weight in weights)
    return f"embeddings and heads hold {of_tables / max(1, total):.0%} of the state: " if 2 * of_tables > total else ""


def _saved(weights: Sequence[Counted], settings: Mapping[int, Settings], ranked: Settings) -> int:
    """The bytes that the weights save with the rank and the projection of ``ranked``."""
    keys = {name: getattr(ranked, name) for name in ("rank", "proj", "proj_type")}
    return sum(
        weight.state_bytes - state_bytes(weight.param, replace(settings[weight.param.group], **keys))
        for weight in weights
    )


def _geometry(tensor: Tensor, ranked: Settings) -> Geometry:
    return Geometry.of(tensor.shape, ranked.proj_type)


def _narrowness(tensor: Tensor, ranked: Settings) -> str:
    return narrowness(_geometry(tensor, ranked), ranked.rank or 0, ranked.proj)


def _names(weights: Sequence[Counted]) -> str:
    return abridged((weight.param.label for weight in weights), most=2)
