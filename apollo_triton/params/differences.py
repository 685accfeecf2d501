"""What a run or a checkpoint brings that its user may not expect: other settings, parameters or moments.

The checkpoint's settings win, as in ``torch.optim``, and state goes by the order of parameters. Both are silent there.
"""

from __future__ import annotations

import operator
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..core.embeddings import FORM_KEYS
from ..core.messages import listed, shown, warn
from ..core.module_names import unwrapped
from ..core.settings import DENSE_DEFAULTS, FIELD_NAMES, LOW_RANK_DEFAULTS, Settings
from .blocks import obstacle_to_8bit
from .member import Param
from .state import is_8bit

# What does not change the algorithm belongs to the run, and stays as it was asked for: where a step is computed, and
# whether it may be captured in a CUDA graph. All else changes numbers, so a resumed run needs the checkpoint's.
OF_THE_RUN = ("backend", "capturable")

# Schedulers change these from step to step, so a difference says nothing. What a scheduler begins with is
# ``initial_lr``, which is compared where both have it.
_SCHEDULED = ("lr", "weight_decay")
# What a parameter has of its group, and loses if that joins another: not how its moments are kept.
_OF_MERGED = tuple(
    name for name in (*FIELD_NAMES, "initial_lr") if name not in (*OF_THE_RUN, *FORM_KEYS, "rank", *LOW_RANK_DEFAULTS)
)
_SHOWN = 6
_NAMED = 3

_MADE_UP = re.compile(r"group \d+, \d+")  # the names that ``add_param_group`` gives where only some were given


def warn_of_settings(saved: Sequence[dict[str, Any]], asked: Sequence[dict[str, Any]]) -> None:
    """Warn once of all settings in which the groups of a checkpoint differ from the optimizer's own."""
    found: dict[str, list[str]] = {}
    for index, groups in enumerate(zip(saved, asked, strict=True)):
        for name, theirs, ours in _differing(*groups):
            found.setdefault(f"{name} {shown(theirs)} (asked for: {shown(ours)})", []).append(str(index))
    if found:
        texts = [
            f"{text} in parameter group{'s' if len(indices) > 1 else ''} {', '.join(indices[:_SHOWN])}"
            for text, indices in [*found.items()][:_SHOWN]
        ]
        listed = "; ".join(texts) + (f", and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")
        warn(
            "load_state_dict takes the checkpoint's settings instead of those that were asked for: "
            f"{listed}. To keep yours, set them in optimizer.param_groups after loading; "
            "another rank, proj, proj_type, state_bits or second_moment needs a fresh optimizer"
        )


def warn_of_names(saved: Sequence[str | None], known: Sequence[str | None]) -> None:
    """Warn if parameters of a checkpoint have other names than the optimizer's, or another order.

    Both have a name for each parameter, or None.
    """
    named = {index: (theirs, ours) for index, (theirs, ours) in enumerate(zip(saved, known, strict=True))}
    bare = {i: (_bare(theirs), _bare(ours)) for i, (theirs, ours) in named.items() if theirs and ours}
    prefixes = {_prefixes(*pair) for pair in bare.values()}
    if len(prefixes) <= 1 and None not in prefixes:
        return  # the same, except for a prefix that all have: the model is now part of another one, or no more
    index = next(index for index, (theirs, ours) in bare.items() if theirs != ours)
    theirs, ours = named[index]
    found = shown(theirs)
    for other, (name, _) in bare.items():
        if name == bare[index][1]:
            found += f" (it has {shown(ours)} as parameter {other})"
    warn(
        f"load_state_dict: parameter {index} is {shown(ours)}, and the checkpoint's parameter {index} is {found}. "
        "State goes by order, so parameters of equal shapes may now have each other's state; build the groups in the "
        "order in which they were saved"
    )


def warn_of_forms(found: Sequence[tuple[Param, Settings, bool]]) -> None:
    """Warn once of moments that were 8-bit where they were saved and are not here, and once of the reverse.

    The booleans say whether they were 8-bit.
    """
    is_here = [(param, settings, was, is_8bit(param.tensor, settings, {})) for param, settings, was in found]
    lost = [(param, settings) for param, settings, was, here in is_here if was and not here]
    gained = [param for param, _, was, here in is_here if here and not was]
    if lost:
        param, settings = lost[0]
        reason = obstacle_to_8bit(param.tensor, settings) or "its group has state_bits 32"
        dtypes = {settings.state_dtype for _, settings in lost}
        kept = "Their values are the same" if dtypes == {torch.float32} else "Those in bfloat16 are rounded to it"
        warn(
            f"load_state_dict: the 8-bit moments of {_listed([param for param, _ in lost])} become "
            f"{' or '.join(sorted(str(dtype).removeprefix('torch.') for dtype in dtypes))} ({param.label}: {reason}). "
            f"{kept}"
        )
    if gained:
        warn(
            f"load_state_dict: the moments of {_listed(gained)} were saved in floats, and are rounded to 8 bits, as "
            "state_bits=8 does at every step"
        )


def warn_of_second_moments(found: Sequence[tuple[Param, Settings, str]]) -> None:
    """Warn once of second moments that were one an element where they were saved and are one a row here, and once of
    the reverse. The strings say how they were saved."""
    changed = [(param, form) for param, settings, form in found if form != settings.second_moment]
    gathered = [param for param, form in changed if form == "element"]
    spread = [param for param, form in changed if form == "row"]
    if gathered:
        warn(
            f"load_state_dict: the second moments of {_listed(gathered)} were saved one an element, and become one a "
            "row, their mean, as second_moment='row' keeps them"
        )
    if spread:
        warn(
            f"load_state_dict: the second moments of {_listed(spread)} were saved one a row, and each element begins "
            "with that of its row, since the group has second_moment='element'"
        )


def warn_of_dtypes(found: Sequence[tuple[Param, Settings, Mapping[str, Any], torch.dtype | None]]) -> None:
    """Warn of float moments whose group had another ``state_dtype`` in the checkpoint, as another ``embeddings=`` has
    it. With each come its saved state, and that dtype."""
    changed: dict[tuple[str, str], list[Param]] = {}
    for param, settings, saved, was in found:
        is_float = not is_8bit(param.tensor, settings, saved) and not is_8bit(param.tensor, settings, {})
        if is_float and was not in (None, settings.state_dtype) and saved["exp_avg"].dtype != settings.state_dtype:
            names = [str(dtype).removeprefix("torch.") for dtype in (saved["exp_avg"].dtype, settings.state_dtype)]
            changed.setdefault((names[0], names[1]), []).append(param)
    for (theirs, ours), params in changed.items():
        kept = "Their values are the same" if ours == "float32" else "They are rounded to it"
        warn(
            f"load_state_dict: the moments of {_listed(params)} were saved in {theirs}, and become {ours}, as "
            f"state_dtype={ours!r} keeps them. {kept}"
        )


def warn_of_groups(
    saved: Sequence[Mapping[str, Any]], regrouped: Sequence[Mapping[str, Any]], groups: Sequence[Mapping[str, Any]]
) -> None:
    """Warn if a checkpoint had other groups, once of what another number does to a scheduler, and once of settings that
    parameters lose because they share a group with others now."""
    if len(saved) == len(regrouped) and all(map(operator.is_, saved, regrouped)):
        return
    if len(saved) != len(groups):
        warn(
            f"load_state_dict: the checkpoint has {len(saved)} parameter groups and the optimizer {len(groups)}, since "
            "embeddings= is not the same. The state of a scheduler has a rate for each group, and does not fit: make "
            "the scheduler, load the optimizer, then scheduler.load_state_dict(saved | "
            '{"base_lrs": [group["initial_lr"] for group in optimizer.param_groups]})'
        )
    new = {key: (group, own) for group, own in zip(regrouped, groups, strict=True) for key in group["params"]}
    lost: dict[tuple[str, str], list[str]] = {}
    for group in saved:
        for key, name in zip(group["params"], group["param_names"], strict=True):
            kept, own = new[key]
            texts = [(each, _text(group, each), _text(kept, each)) for each in _OF_MERGED]
            changed = [f"{each} {theirs} (now {ours})" for each, theirs, ours in texts if theirs != ours]
            if changed:
                lost.setdefault((shown(own.get("name")), ", ".join(changed)), []).append(name)
    for (name, text), names in lost.items():
        warn(
            f"load_state_dict: the group {name} takes {listed(names, _NAMED)}, saved with other settings: {text}. To "
            "keep those, give this run embeddings= too, which makes a group apart: {'second_moment': 'element'} "
            "changes nothing else"
        )


def warn_of_blocks(found: Sequence[Param]) -> None:
    """Warn of sharded weights whose new moments stay floats because blocks of 8-bit ones would span ranks."""
    warn(
        f"state_bits=8: the moments of {_listed(found)} stay in state_dtype, since their blocks of 256 elements would "
        "span ranks. Nothing needs to be done. They are 8-bit on a number of ranks whose shards are multiples of 256 "
        "elements, and a larger min_8bit_size keeps them in state_dtype on any"
    )


def _listed(params: Sequence[Param]) -> str:
    return listed([param.label for param in params], _NAMED)


def _text(group: Mapping[str, Any], name: str) -> str:
    """A setting as a message has it, alike for alike numbers. It was saved in a group that may hold anything."""
    value = group.get(name)
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta:
        value = value.item()
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        value = float(value)
    return shown(tuple(value) if isinstance(value, list) else value)


def given_names(group: dict[str, Any]) -> list[str] | None:
    """The names of a group's parameters, None if it has none or they were made up."""
    names = group.get("param_names")
    return None if names is None or any(not name or _MADE_UP.fullmatch(name) for name in names) else list(names)


def _differing(saved: dict[str, Any], asked: dict[str, Any]) -> Iterator[tuple[str, Any, Any]]:
    """The name and both values of each setting that differs and is not scheduled."""
    low_rank = [group.get("rank") is not None for group in (saved, asked)]
    ignored = {*OF_THE_RUN, *_SCHEDULED, *(() if all(low_rank) else LOW_RANK_DEFAULTS)}
    if "base_momentum" in saved:  # OneCycleLR and CyclicLR move betas
        ignored.add("betas")
    for name in FIELD_NAMES:
        theirs, ours = (group.get(name, DENSE_DEFAULTS.get(name)) for group in (saved, asked))
        if name == "betas":
            theirs, ours = tuple(theirs or ()), tuple(ours or ())
        if name not in ignored and theirs != ours:
            yield name, theirs, ours
    rates = [group.get("initial_lr") for group in (saved, asked)]
    if all(isinstance(rate, (int, float)) for rate in rates) and rates[0] != rates[1]:
        yield "initial_lr", rates[0], rates[1]


def _bare(name: str) -> str:
    return ".".join(unwrapped(name))


def _prefixes(theirs: str, ours: str) -> tuple[str, str] | None:
    """What the one name has before the other: ("", "") for equal names, None for names with other ends."""
    if f".{theirs}".endswith(f".{ours}"):
        return theirs.removesuffix(ours), ""
    return ("", ours.removesuffix(theirs)) if f".{ours}".endswith(f".{theirs}") else None
