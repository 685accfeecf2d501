"""Which weights of a model become low-rank, which stay dense, and why: ``apollo_param_groups`` decides by it."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from .geometry import FLATTENED, Geometry, is_flattened
from .kinds import EMBEDDING, HEAD, VECTOR, Weight, embedding_weights, weights_of
from .targets import ALL_LINEAR, DEFAULT_TARGETS, Targets, is_linear

# The narrowest width that is projected. Mini's P of a matrix [64, width] has one row, and with a scale of 128 its first
# update is sqrt(128) / |P's part along G| of AdamW's. Of 4,000 seeds each, the share whose first update was over 50
# times AdamW's (random gradients of full rank, and of rank width - 1, as a softmax head's are):
#     width        1        2        3       4      6 and more
#     full rank    18.3 %   2.9 %    0.5 %   0.1 %  none
#     width - 1             13.2 %   2.9 %   0.8 %  none
# At 6 it was over 10 times AdamW's in 10.8 %, at 8 in 3.2 %, at 16 in none. A gradient of rank one has a heavy tail at
# every width, 6.9 % at 8 and 2.2 % at 64; of two classes it always is one, and that head has a width of 2. With a
# factor for each channel it is the rank that decides: at rank 1 4.1 % at 8 and 1.5 % at 64, at rank 2 none from 8 on.
NARROWEST = 8
# LLaMA, Qwen, Gemma, GPT-2 and Mixtral leave nothing, CLIP 0.5 % and Whisper's convolutions 3 %; Falcon leaves 20 %.
LARGE_SHARE = 0.1


NOT_TARGETED = "not in target_modules"


@dataclass
class Coverage:
    """What becomes of the weights of a model, each parameter once.

    ``reasons`` maps the id of a parameter to why it stays dense, "" if it is low-rank. ``low_rank``: names by the id of
    a parameter. ``too_narrow``: targeted weights that stay dense, by the reason. ``missed``: weights that could be
    low-rank and are not targeted, with their numbers of elements; without embeddings, heads and frozen weights.
    """

    weights: dict[int, Weight] = field(default_factory=dict)
    reasons: dict[int, str] = field(default_factory=dict)
    elements: int = 0
    too_narrow: dict[str, list[str]] = field(default_factory=dict)
    missed: dict[str, int] = field(default_factory=dict)

    @property
    def low_rank(self) -> dict[int, str]:
        return {key: self.weights[key].name for key, reason in self.reasons.items() if not reason}

    @property
    def missed_share(self) -> float:
        missed = sum(self.missed.values())
        return missed / max(1, missed + self.elements)


def narrowness(geometry: Geometry, rank: int, proj: str = "random") -> str:
    """Why low rank suits a matrix of this geometry badly, as the end of "it is ..."; "" if it suits it."""
    width, channels = geometry.width, geometry.channels
    if width < rank:
        return f"narrower than rank {rank}"
    stored = rank * width if proj == "svd" else 0  # P
    if 2 * channels * rank + stored >= 2 * channels * width:
        return f"so narrow that rank {rank} saves no state"
    if width < NARROWEST:
        return f"narrower than {NARROWEST}, where a random projection may lose nearly all of a gradient"
    return ""


def coverage(
    source: nn.Module | Iterable[tuple[str, Tensor]], targets: Targets, rank: int, group_keys: dict[str, Any]
) -> Coverage:
    """What becomes of the weights of a model, or of named parameters, at ``rank``."""
    result = Coverage()
    proj, proj_type = group_keys.get("proj", "random"), group_keys.get("proj_type", "std")
    weights = weights_of(source)
    tables = embedding_weights(source) if isinstance(source, nn.Module) else set()
    result.weights = {id(weight.tensor): weight for weight in reversed(weights)}
    # A weight that two modules share is low-rank if one of them is targeted.
    targeted = {id(weight.tensor): weight for weight in weights if targets.match(weight.module_name, weight.module)}
    for key, first in reversed(result.weights.items()):
        weight = targeted.get(key, first)
        name, parameter = weight.name, weight.tensor
        result.weights[key] = weight
        # The targets of a user may name a head, or a matrix that is an embedding only by its name. A table is none.
        if weight.kind == VECTOR or key in tables or (weight.kind in (EMBEDDING, HEAD) and key not in targeted):
            result.reasons[key] = weight.kind
            continue
        geometry = Geometry.of(parameter.shape, proj_type)
        reason = narrowness(geometry, rank, proj)
        # AdamW does not train int8 weights, so these are low-rank wherever the rank fits.
        is_int8 = getattr(parameter, "needs_low_rank", False) and not reason.startswith("narrower than rank")
        if reason and (is_int8 or group_keys.get("rank_above_width")):
            reason = ""
        if key in targeted:
            if reason:
                result.too_narrow.setdefault(reason, []).append(f"{name} (width {geometry.width})")
            else:
                result.elements += parameter.numel()
        else:
            if not reason and parameter.requires_grad:
                result.missed[name] = parameter.numel()
            reason = reason or NOT_TARGETED
        result.reasons[key] = reason
    return result


def coverage_note(
    model: nn.Module, rank: int, target_modules: str | Iterable[str] = DEFAULT_TARGETS, **group_keys: Any
) -> str:
    """What to say if the default targets, or "all-linear", leave a large share of the matrices dense; else ""."""
    targets = Targets(model, target_modules)
    found = coverage(model, targets, rank, group_keys)
    if targets.is_choice or found.missed_share < LARGE_SHARE:
        return ""
    return (
        f"target_modules={targets.given!r} leaves {found.missed_share:.0%} of the elements of this model's matrices "
        f"dense, with AdamW's state (embeddings and head not counted): {abridged(_large_missed(found))}; "
        f"target_modules={_wider_targets(model, found)!r} makes them low-rank, and a list of your own is taken as it is"
    )


def no_match(model: nn.Module, targets: Targets, rank: int, group_keys: dict[str, Any], found: Coverage) -> str:
    """Why no weight becomes low-rank, and what would help with this model."""
    start = f"target_modules={targets.given!r}: "
    if found.too_narrow:
        return start + _all_too_narrow(model, targets, group_keys, found)
    for name, parameter in model.named_parameters():
        if is_flattened(parameter) and parameter.dim() < 2:
            return f"{start}no weight matches: {name} {FLATTENED}"
    parts = [unused(model, targets, entry) for entry in targets.entries]
    parts += _meant_as_list(model, targets, group_keys)
    parts.append(_other_names(model, rank, group_keys))
    return f"{start}no weight matches; {'; '.join(dict.fromkeys(filter(None, parts)))}"


def unused(model: nn.Module, targets: Targets, entry: str) -> str:
    """Why an entry of ``target_modules`` makes nothing low-rank by itself; "" if it matches a weight that could be."""
    modules = {name: module for name, module in model.named_modules() if targets.entry_matches(entry, name, module)}
    if not modules:
        parameters = [name for name, _ in model.named_parameters() if entry in name]
        if parameters and entry != ALL_LINEAR and not targets.is_lone:
            return f"{entry!r} is in the names of parameters alone, such as {parameters[0]!r}; give the module's name"
        return f"{entry!r} matches no module"
    embeddings = embedding_weights(model)
    if any(
        weight.module_name in modules and weight.kind != VECTOR and id(weight.tensor) not in embeddings
        for weight in weights_of(model)
    ):
        return ""
    held = {f"{at}.{name}": p for at in modules for name, p in modules[at].named_parameters(recurse=False)}
    if dense := [name for name, parameter in held.items() if id(parameter) in embeddings]:
        return f"{entry!r} matches {dense[0]!r}, an embedding or tied to one, and embeddings stay dense"
    return f"{entry!r} matches {next(iter(modules))!r}, which has no matrix of its own"


def _all_too_narrow(model: nn.Module, targets: Targets, group_keys: dict[str, Any], found: Coverage) -> str:
    count = sum(map(len, found.too_narrow.values()))
    highest = _highest_rank(model, targets, group_keys)
    advice = (
        f"give a rank of at most {highest}, or a quarter of the hidden size"
        if highest
        else "none of them can be low-rank; train them with torch.optim.AdamW, or name other modules"
    )
    if found.missed and not targets.is_choice:
        advice = f"target_modules={_wider_targets(model, found)!r} takes others; or {advice}"
    return f"all {count} targeted weights are {' or '.join(found.too_narrow)}; {advice}"


def _wider_targets(model: nn.Module, found: Coverage) -> str | list[str]:
    """The ``target_modules`` that take what was missed as well."""
    modules = dict(model.named_modules())
    wanted = [*found.low_rank.values(), *_large_missed(found)]
    unlike = [name for name in wanted if not is_linear(modules[name.rpartition(".")[0]])]
    names = dict.fromkeys(_last_name(name) for name in unlike)
    return [ALL_LINEAR, *names] if names else ALL_LINEAR


def _large_missed(found: Coverage) -> list[str]:
    """What was missed, the largest kinds first, without those that are no reason for an entry: routers and the like."""
    kinds: dict[str, int] = {}
    for name, elements in found.missed.items():
        kinds[_last_name(name)] = kinds.get(_last_name(name), 0) + elements
    least = 0.01 * (found.elements + sum(found.missed.values()))
    large = [name for name in found.missed if kinds[_last_name(name)] >= least]
    return sorted(large or found.missed, key=lambda name: -kinds[_last_name(name)])


def _highest_rank(model: nn.Module, targets: Targets, group_keys: dict[str, Any]) -> int:
    """The highest rank that one of the targeted weights can have; 0 if there is none."""
    possible = coverage(model, targets, 1, group_keys).low_rank
    proj, proj_type = group_keys.get("proj", "random"), group_keys.get("proj_type", "std")
    shapes = {parameter.shape for parameter in model.parameters() if id(parameter) in possible}
    geometries = [Geometry.of(shape, proj_type) for shape in shapes]
    ranks = [rank for g in geometries for rank in range(1, g.width + 1) if not narrowness(g, rank, proj)]
    return max(ranks, default=0)


def _meant_as_list(model: nn.Module, targets: Targets, group_keys: dict[str, Any]) -> list[str]:
    """What to say of a lone string that would match as a substring, or as several."""
    if not targets.is_lone:
        return []
    entries = [entry for entry in re.split(r"[,\s]+", targets.entries[0]) if entry]
    try:
        found = coverage(model, Targets(model, entries), 1, group_keys)
    except ValueError:  # what is between two commas may be no regular expression
        return []
    return [
        f"a lone string is a regular expression that has to match a module's whole name: target_modules={entries!r}, a "
        f"list, takes substrings and matches {name.rpartition('.')[0]!r}"
        for name in [*found.low_rank.values()][:1]
    ]


def _other_names(model: nn.Module, rank: int, group_keys: dict[str, Any]) -> str:
    """What to target in this model."""
    for entries, also in ((ALL_LINEAR, f", or {ALL_LINEAR!r}"), ([""], "")):
        targets = Targets(model, entries)
        if highest := _highest_rank(model, targets, group_keys):
            possible = coverage(model, targets, min(rank, highest), group_keys).low_rank.values()
            modules = [name.rpartition(".")[0] for name in [*possible][:3]]
            limit = f", and a rank of at most {highest}" if rank > highest else ""
            if not all(modules):  # the model is one layer, which has no name
                return f"give target_modules={ALL_LINEAR if entries == ALL_LINEAR else '.*'!r}{limit}"
            names = ", ".join(map(repr, modules))
            return f"give substrings or regular expressions of names such as {names}{also}{limit}"
    if next(model.parameters(), None) is None:
        return f"the model ({type(model).__name__}) has no parameters"
    return "this model has no matrix that could be low-rank, so that nothing is gained; use torch.optim.AdamW"


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
    return ", ".join(shown[:most]) + (f" and {len(shown) - most} more" if len(shown) > most else "")


def without_indices(name: str) -> str:
    """A name with the numbers of layers as "*": one for the same weight of all layers.

    >>> without_indices("layers.3.mlp.up.weight"), without_indices("0.weight")
    ('layers.*.mlp.up.weight', '*.weight')
    """
    return re.sub(r"(?<![^.])\d+(?=\.)", "*", name)
