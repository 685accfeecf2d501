"""Names of options and group keys that are not known here: what was meant, and what PyTorch's own options are here."""

from __future__ import annotations

import difflib
import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any, ParamSpec, TypeVar

from .settings import FIELD_NAMES, LOW_RANK_DEFAULTS

_KERNELS = 'not needed: on a GPU a few launches of this package\'s kernels do the whole step (backend="auto")'
# Options of other optimizers, and why they are not here.
_ELSEWHERE = {
    "fused": _KERNELS,
    "foreach": _KERNELS,
    "amsgrad": "not here: APOLLO has no such variant",
    "maximize": "not here: negate the loss instead",
    "differentiable": "not here: autograd cannot go through a step",
    "learning_rate": "did you mean 'lr'?",
    "second_moment": "it is a key of a dense parameter group, and no argument; embeddings='rows' sets it",
}
# Keys that programs put into groups for themselves, and schedulers too, and that are spelled like ours.
_OTHERS_KEYS = frozenset({"params", "param_names", "name", "names", "initial_lr", "max_lr", "min_lr", "base_lr"})
_P = ParamSpec("_P")
_T = TypeVar("_T")
# What decides how parameters are split into groups, and is no key of one.
SPLIT_KEYS = ("target_modules", "dense_lr", "embedding_lr", "decay_vectors", "embeddings")


def unknown_option(name: str, known: Iterable[str]) -> str:
    """The end of a TypeError for the keyword ``name``, where ``known`` are allowed.

    >>> unknown_option("update_proj_gab", ["update_proj_gap", "scale"])
    "unknown option 'update_proj_gab' (did you mean 'update_proj_gap'?)"
    """
    known = list(known)
    help_text = _ELSEWHERE.get(name, "")
    if not help_text and (near := nearest(name, known)):
        help_text = f"did you mean {near!r}?"
    return f"unknown option {name!r} ({help_text or 'allowed: ' + ', '.join(sorted(known))})"


def unread_keys(group: dict[str, Any]) -> list[str]:
    """What to say of a group's keys that do nothing. Other programs put keys of their own there, so that of unknown
    ones only a near miss counts."""
    notes = []
    for key, value in group.items():
        if not isinstance(key, str) or key in FIELD_NAMES or key in _OTHERS_KEYS:
            continue
        near = nearest(key, FIELD_NAMES)
        if (key in ("amsgrad", "maximize", "differentiable") and value) or key == "learning_rate":
            notes.append(f"{key!r} does nothing ({_ELSEWHERE[key]})")
        elif key == "embeddings" and "name" in group:
            pass  # of a group that ``embeddings=`` has made
        elif key in SPLIT_KEYS:
            notes.append(
                f"{key!r} does nothing in a group: it is an argument of APOLLOAdamW(..., rank=...) and "
                "apollo_param_groups(model, ...), which make groups"
            )
        elif near and f"_{near}_" not in f"_{key}_":  # "weight_decay_mult" is a name of its own, no typing error
            notes.append(f"{key!r} does nothing (did you mean {near!r}?)")
    unranked = [key for key in LOW_RANK_DEFAULTS if key in group]
    if unranked and "rank" not in group:
        keys = " and ".join(repr(key) for key in unranked)
        notes.append(f"it has no 'rank', so that it is dense AdamW, and {keys} has no effect")
    return notes


def nearest(name: str, known: Iterable[str]) -> str:
    """The known name that was most likely meant; "" if none is near."""
    near = next(iter(difflib.get_close_matches(name.lower(), list(known), 1, cutoff=0.75)), "")
    return near if len(name) > 4 or abs(len(name) - len(near)) < 2 else ""  # "eta" is not "betas"


def explaining_unknown_options(called: Callable[_P, _T]) -> Callable[_P, _T]:
    """A constructor or function with a TypeError for unknown keywords that says what was meant. Its signature stays as
    it is."""
    known = [*inspect.signature(called).parameters]

    @functools.wraps(called)
    def checked(*args: _P.args, **options: _P.kwargs) -> _T:
        for name in options:
            if name not in known:
                who, allowed = called.__name__, {*known}
                if known[0] == "self":
                    kind = type(args[0])
                    base = next(each for each in kind.__mro__ if vars(each).get("__init__") is checked)
                    who, allowed = kind.__name__, options_of(kind, base)
                raise TypeError(f"{who}: {unknown_option(name, allowed)}")
        return called(*args, **options)

    return checked


def options_of(cls: type, base: type) -> set[str]:
    """The keywords of the constructors of ``cls`` up to ``base``, which pass on what they do not know."""
    names = {
        name
        for kind in cls.__mro__
        if issubclass(kind, base) and "__init__" in vars(kind)
        for name, parameter in inspect.signature(vars(kind)["__init__"]).parameters.items()
        if parameter.kind not in (parameter.VAR_KEYWORD, parameter.VAR_POSITIONAL)
    }
    return names - {"self", "params"}
