"""A checkpoint whose ``embeddings=`` is not this run's: its parameters go by name to the groups that are here.

How moments are kept is no part of the algorithm, and one form is converted into another (saved_state.py). So here the
optimizer's own argument wins, and a run that is short of memory can be resumed with less state.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ..core.embeddings import FORM_KEYS, MARK
from ..core.module_names import unwrapped
from .differences import given_names

Group = dict[str, Any]


class _Place(NamedTuple):
    """A group, and which of its parameters."""

    group: Mapping[str, Any]
    offset: int


def keeps_otherwise(saved: Mapping[str, Any], own: Mapping[str, Any]) -> bool:
    """Whether the groups, both dense, were made with another ``embeddings=``."""
    marks = [group.get(MARK) for group in (saved, own)]
    theirs, ours = (mark if isinstance(mark, str) else None for mark in marks)  # a file may hold anything
    return theirs != ours and not _is_low_rank(saved) and not _is_low_rank(own)


def regrouped(saved_groups: Sequence[Mapping[str, Any]], groups: Sequence[Group]) -> list[Mapping[str, Any]]:
    """The groups of a checkpoint with their parameters and names as ``groups`` has them. Each keeps the settings of one
    group of the checkpoint, in which most of its parameters were. What comes to it from a group of embeddings does not
    count.

    They are returned as they are, if they hold the same, if ``embeddings=`` is the same, if a parameter is low-rank in
    one of the two alone, and where names are missing or are others.
    """
    saved_names, own_names = _names(saved_groups), _names(groups)
    if not saved_names or {*saved_names} != {*own_names}:
        return list(saved_groups)
    if [{*_names([group])} for group in saved_groups] == [{*_names([group])} for group in groups]:
        return list(saved_groups)
    pairs = [(saved_names[name].group, place.group) for name, place in own_names.items()]
    if any(_is_low_rank(saved) != _is_low_rank(own) for saved, own in pairs):
        return list(saved_groups)
    if not any(keeps_otherwise(saved, own) for saved, own in pairs):
        return list(saved_groups)
    made: list[Mapping[str, Any]] = []
    for own in groups:
        places = [saved_names[name] for name in _names([own])]
        made.append(
            {
                **_settings_of(places, own),
                **({"name": own["name"]} if "name" in own else {}),
                "params": [place.group["params"][place.offset] for place in places],
                "param_names": [place.group["param_names"][place.offset] for place in places],
            }
        )
    return made


def with_own_form(saved: Mapping[str, Any], group: Group, own: Group) -> None:
    """Give ``group``, which is made of ``saved``, what says how its moments are kept, if ``embeddings=`` differs."""
    if not keeps_otherwise(saved, own):
        return
    for name in ("name", MARK, *FORM_KEYS):
        group.pop(name, None)
        if name in own:
            group[name] = own[name]


def _settings_of(places: Sequence[_Place], own: Group) -> Mapping[str, Any]:
    """The saved group whose settings parameters from several have together, as a head that comes back to "dense"."""
    groups = [place.group for place in places]
    candidates = [group for group in groups if not keeps_otherwise(group, own)] or groups
    counts = Counter(map(id, candidates))
    return max(candidates, key=lambda group: counts[id(group)])


def _is_low_rank(group: Mapping[str, Any]) -> bool:
    return group.get("rank") is not None


def _names(groups: Sequence[Any]) -> dict[str, _Place]:
    """Where each name is. Empty if something is no group, or is empty, or a parameter has no name of its own."""
    found: dict[str, _Place] = {}
    count = 0
    for group in groups:
        keys = group if isinstance(group, Mapping) else {}
        names, params = keys.get("param_names"), keys.get("params")
        if not isinstance(params, (list, tuple)) or not isinstance(names, (list, tuple)) or len(names) != len(params):
            return {}
        if not names or not all(isinstance(name, str) for name in names) or given_names({**keys}) is None:
            return {}
        count += len(names)
        found |= {".".join(unwrapped(name)): _Place(keys, offset) for offset, name in enumerate(names)}
    return found if len(found) == count else {}
