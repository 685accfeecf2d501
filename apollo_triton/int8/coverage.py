"""Which matrices of a model stay float, and what ``quantize_model`` says of that."""

from __future__ import annotations

from torch import nn
from torch.nn.parameter import is_lazy

from ..core.coverage import LARGE_SHARE, abridged
from ..core.kinds import embedding_weights
from ..core.targets import Targets
from .weight import Int8Weight


def targeted(model: nn.Module, targets: Targets) -> dict[str, nn.Module]:
    """The modules that ``target_modules`` names, whatever they are, under each of their names."""
    named = dict(model.named_modules(remove_duplicate=False))
    return {name: module for name, module in named.items() if targets.match(name, module)}


def no_match(model: nn.Module, targets: Targets) -> str:
    """Why ``target_modules`` gives nothing to convert, and what would."""
    start = f"target_modules={targets.given!r}"
    every = {name: module for name, module in model.named_modules() if type(module) is nn.Linear and name}
    heads = [name for name, module in every.items() if targets.is_head(name, module)]
    linears = [name for name in every if name not in heads]
    are_int8 = [name for name, module in targeted(model, targets).items() if _is_int8(module)]
    others = {
        name: module
        for name, module in targeted(model, targets).items()
        if not _is_int8(module) and any(p.dim() > 1 for p in module.parameters(recurse=False) if not is_lazy(p))
    }
    advice = f"the model ({type(model).__name__}) has no nn.Linear{' other than its head' if heads else ''}"
    if linears:
        quoted = ", ".join(repr(name) for name in linears[:3])
        advice = f"give substrings or regular expressions of names such as {quoted}, or 'all-linear'"
    if targets.is_lone and any(targets.entries[0] in name for name in linears):
        advice += (
            f"; a lone string is a regular expression that has to match a module's whole name: "
            f"target_modules={targets.entries!r}, a list, takes substrings"
        )
    if are_int8:
        more = f"; for the others {advice}" if linears else ""
        return f"{start}: the {len(are_int8)} layers that it names are int8 already, such as {are_int8[0]!r}{more}"
    if others:
        name, module = next(iter(others.items()))
        start += f" names no nn.Linear, and nothing else becomes int8, such as {name!r} ({type(module).__name__})"
    else:
        start += ": no nn.Linear of the model matches"
        if targets.is_lone and any(targets.entries[0] in name for name in linears):
            start += (
                "; a lone string is a regular expression that has to match a module's whole name: "
                f"target_modules={targets.entries!r}, a list, takes substrings"
            )
    return f"{start}; {advice}"


def idle_note(model: nn.Module, targets: Targets) -> str:
    """What to say of entries of the user's own list that match no module; "" if there are none."""
    if not targets.is_choice:
        return ""
    named = dict(model.named_modules(remove_duplicate=False)).items()
    idle = [each for each in targets.entries if not any(targets.entry_matches(each, *found) for found in named)]
    entries = " and ".join(map(repr, idle))
    return f"target_modules={targets.given!r}: no module matches {entries}; the other entries are used" if idle else ""


def float_note(model: nn.Module, targets: Targets) -> str:
    """What to say if a large share of the matrices stays float although the targets stand for all of them or name
    them; else ""."""
    named = {id(module) for module in targeted(model, targets).values()}
    embeddings = embedding_weights(model)
    floats: dict[str, int] = {}
    int8 = 0
    is_expected, more_linears = not targets.is_choice, False
    for module_name, module in model.named_modules():
        if targets.is_head(module_name, module):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if is_lazy(parameter) or parameter.dim() < 2 or id(parameter) in embeddings:
                continue
            if isinstance(parameter, Int8Weight):
                int8 += parameter.numel()
            elif parameter.is_floating_point() and "bias" not in name and "embed" not in f"{module_name}.{name}":
                floats[f"{module_name}.{name}" if module_name else name] = parameter.numel()
                is_expected = is_expected or id(module) in named
                more_linears = more_linears or type(module) is nn.Linear
    left = sum(floats.values())
    share = left / max(1, left + int8)
    if not is_expected or share < LARGE_SHARE:
        return ""
    advice = "only nn.Linear layers become int8"
    if more_linears:
        advice += ", and target_modules='all-linear' takes all of them except the head"
    return (
        f"target_modules={targets.given!r} leaves {share:.0%} of the elements of this model's matrices in floats "
        f"(embeddings and head not counted): {abridged(floats)}; {advice}"
    )


def _is_int8(module: nn.Module) -> bool:
    return any(isinstance(parameter, Int8Weight) for parameter in module.parameters(recurse=False))
