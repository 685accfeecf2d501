"""What to say of the weights that stay dense: warnings, and the error where no weight is low-rank."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any

from .coverage import Coverage, coverage_of, is_never_low_rank, narrowness
from .geometry import FLATTENED, Geometry, is_flattened
from .kinds import EMBEDDING, MATRIX, OTHER
from .messages import listed
from .module_names import without_indices
from .targets import AUTO, Targets, meant_for_all

# LLaMA, Qwen, Gemma, GPT-2 and Mixtral leave nothing, ViT 0.7 % and Whisper's convolutions 3 %; a U-Net leaves most.
LARGE_SHARE = 0.1


def notes(targets: Targets, found: Coverage) -> list[str]:
    """What to warn of: targeted weights that stay dense, entries that make nothing low-rank, and large shares.

    "auto" and "all-linear" stand for what suits low rank, so that gates and routers are left out without a word, if
    they are few. What the user has named is not.
    """
    named = [key for key in found.narrow if _is_named(targets, found.weights[key].module_name)]
    others = [key for key in found.narrow if key not in named]
    texts = _narrow_notes(found, [*named, *(others if found.share(others) >= LARGE_SHARE else [])])
    if not targets.is_lone:
        for reason in filter(None, (_unused(targets, entry, found) for entry in targets.own_entries)):
            texts.append(f"target_modules={targets.given!r}: {reason}; the other entries are used")
    if not targets.is_choice and (share := found.share(found.missed)) >= LARGE_SHARE:
        missed = _large_missed(found)
        wider = _wider_targets(found, missed)
        advice = f"target_modules={wider!r} makes them low-rank" if wider else "groups of your own make them low-rank"
        texts.append(
            f"target_modules={targets.given!r} leaves {share:.0%} of the elements of this model's matrices dense, with "
            f"AdamW's state (embeddings and head not counted): {abridged(found.weights[key].name for key in missed)}; "
            f"{advice}, and a list of your own is taken as it is"
        )
    return texts


def no_match(targets: Targets, rank: int, group_keys: dict[str, Any], found: Coverage) -> str:
    """Why no weight becomes low-rank, and what would help with this model."""
    start = f"target_modules={targets.given!r}: "
    if found.narrow:
        return start + _all_too_narrow(targets, group_keys, found)
    for weight in found.of_modules:
        if is_flattened(weight.tensor) and weight.tensor.dim() < 2:
            return f"{start}no weight matches: {weight.name} {FLATTENED}"
    parts = [_unused(targets, entry, found) for entry in targets.own_entries]
    parts += _meant_as_list(targets, group_keys, found)
    if not targets.is_choice and any(found.weights[key].kind == OTHER for key in found.missed):
        parts.append("tables and convolutions stay dense unless they are named")
    parts.append(_other_names(targets, rank, group_keys, found))
    return f"{start}no weight matches; {'; '.join(dict.fromkeys(filter(None, parts)))}"


def _is_named(targets: Targets, module_name: str) -> bool:
    return any(targets.entry_names(entry, module_name) for entry in targets.own_entries)


def _narrow_notes(found: Coverage, keys: Sequence[int]) -> list[str]:
    by_reason: dict[str, list[str]] = {}
    for key in keys:
        by_reason.setdefault(found.reasons[key], []).append(f"{found.weights[key].name} (width {found.narrow[key]})")
    return [
        f"{len(names)} targeted weights are {reason} and stay dense: {abridged(names)}"
        if len(names) > 1
        else f"1 targeted weight is {reason} and stays dense: {names[0]}"
        for reason, names in by_reason.items()
    ]


def _unused(targets: Targets, entry: str, found: Coverage) -> str:
    """Why an entry of one's own makes nothing low-rank by itself; "" if it matches a weight that could be."""
    held = [weight for weight in found.of_modules if targets.entry_names(entry, weight.module_name)]
    if any(not is_never_low_rank(weight, targets) for weight in held):
        return ""
    if tables := [weight.name for weight in held if weight.kind == EMBEDDING]:
        return f"{entry!r} matches {tables[0]!r}, an embedding or tied to one, and embeddings stay dense"
    paths = [weight.module_name.split(".") for weight in found.of_modules]
    names = [".".join(path[:end]) for path in paths for end in range(1, len(path) + 1)]
    if name := next((name for name in names if targets.entry_names(entry, name)), ""):
        return f"{entry!r} matches {name!r}, which has no matrix of its own"
    if meant := meant_for_all(entry):
        return f"{entry!r} matches no module that has parameters (did you mean {meant!r}?)"
    parameters = [weight.name for weight in found.of_modules if entry in weight.name]
    if parameters and not targets.is_lone:
        return f"{entry!r} is in the names of parameters alone, such as {parameters[0]!r}; give the module's name"
    return f"{entry!r} matches no module that has parameters"


def _all_too_narrow(targets: Targets, group_keys: dict[str, Any], found: Coverage) -> str:
    reasons = " or ".join(dict.fromkeys(found.reasons[key] for key in found.narrow))
    highest = _highest_rank(targets, group_keys, found)
    they, them = ("it cannot", "it") if len(found.narrow) == 1 else ("none of them can", "them")
    advice = (
        f"give a rank of at most {highest}, or a quarter of the hidden size"
        if highest
        else f"{they} be low-rank; train {them} with torch.optim.AdamW, or name other modules"
    )
    if not targets.is_choice and (wider := _wider_targets(found, _large_missed(found))):
        advice = f"target_modules={wider!r} takes others; or {advice}"
    are = "the only targeted weight is" if len(found.narrow) == 1 else f"all {len(found.narrow)} targeted weights are"
    return f"{are} {reasons}; {advice}"


def _wider_targets(found: Coverage, missed: Iterable[int]) -> str | list[str]:
    """The ``target_modules`` that take what was missed as well; "" if they are of the model itself, which has no
    name."""
    weights = [found.weights[key] for key in missed]
    names = dict.fromkeys(_last_name(each.name) for each in weights if each.kind != MATRIX and each.module_name)
    if names:
        return [AUTO, *names]
    return AUTO if any(each.kind == MATRIX for each in weights) else ""


def _large_missed(found: Coverage) -> list[int]:
    """What was missed, the largest kinds first, without those that are no reason for an entry: routers and the like."""
    shares: dict[str, float] = {}
    missed = [key for key in found.missed if found.weights[key].tensor.requires_grad]
    for key in missed:
        name = _last_name(found.weights[key].name)
        shares[name] = shares.get(name, 0) + found.share([key])
    missed.sort(key=lambda key: -shares[_last_name(found.weights[key].name)])
    return [key for key in missed if shares[_last_name(found.weights[key].name)] >= 0.01] or missed


def _highest_rank(targets: Targets, group_keys: dict[str, Any], found: Coverage) -> int:
    """The highest rank that one of the targeted weights can have; 0 if there is none."""
    possible = coverage_of(found.of_modules, targets, 1, group_keys)
    proj, proj_type = group_keys.get("proj", "random"), group_keys.get("proj_type", "std")
    shapes = {possible.weights[key].tensor.shape for key in possible.low_rank}
    geometries = [Geometry.of(shape, proj_type) for shape in shapes]
    ranks = [rank for g in geometries for rank in range(1, g.width + 1) if not narrowness(g, rank, proj)]
    return max(ranks, default=0)


def _meant_as_list(targets: Targets, group_keys: dict[str, Any], found: Coverage) -> list[str]:
    """What to say of a lone string that would match as a substring, or as several."""
    if not targets.is_lone or not targets.is_choice:
        return []
    entries = [entry for entry in re.split(r"[,\s]+", targets.entries[0]) if entry]
    try:
        possible = coverage_of(found.of_modules, targets.with_entries(entries), 1, group_keys)
    except ValueError:  # what is between two commas may be no regular expression
        return []
    return [
        f"a lone string is a regular expression that has to match a module's whole name: target_modules={entries!r}, a "
        f"list, takes substrings and matches {possible.weights[key].module_name!r}"
        for key in [*possible.low_rank][:1]
    ]


def _other_names(targets: Targets, rank: int, group_keys: dict[str, Any], found: Coverage) -> str:
    """What to target in this model."""
    for entries, also in ((AUTO, f", or {AUTO!r}"), ([""], "")):
        others = targets.with_entries(entries)
        if highest := _highest_rank(others, group_keys, found):
            possible = coverage_of(found.of_modules, others, min(rank, highest), group_keys)
            modules = [possible.weights[key].module_name for key in [*possible.low_rank][:3]]
            limit = f", and a rank of at most {highest}" if rank > highest else ""
            if not all(modules):  # the model is one layer, which has no name
                return f"give target_modules={AUTO if entries == AUTO else '.*'!r}{limit}"
            names = ", ".join(map(repr, modules))
            return f"give substrings or regular expressions of names such as {names}{also}{limit}"
    if not found.of_modules:
        return "there are no parameters"
    return "there is no matrix that could be low-rank, so that nothing is gained; use torch.optim.AdamW"


def _last_name(name: str) -> str:
    """The last part of the name of a weight's module that is no number: "experts" of "layers.3.experts.gate_up"."""
    return next((part for part in reversed(name.split(".")[:-1]) if not part.isdigit()), name)


def abridged(names: Iterable[str], most: int = 4) -> str:
    """Names with layers' numbers as "*", and how often each occurs."""
    counts: dict[str, int] = {}
    for name in names:
        short = without_indices(name)
        counts[short] = counts.get(short, 0) + 1
    shown = [f"{name}" + (f" ({count})" if count > 1 else "") for name, count in counts.items()]
    return listed(shown, most)
