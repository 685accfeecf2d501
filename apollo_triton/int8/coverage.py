"""Which matrices of a model stay float, and what ``quantize_model`` says of that."""

from __future__ import annotations

from torch import nn
from torch.nn.parameter import is_lazy

from ..core.coverage_notes import LARGE_SHARE, abridged
from ..core.kinds import MATRIX, OTHER, weights_of
from ..core.targets import AUTO, Targets, meant_for_all
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
        advice = f"give substrings or regular expressions of names such as {quoted}, or {AUTO!r}"
    if are_int8:
        more = f"; for the others {advice}" if linears else ""
        return f"{start}: the {len(are_int8)} layers that it names are int8 already, such as {are_int8[0]!r}{more}"
    if others:
        name, module = next(iter(others.items()))
        start += f" names no nn.Linear, and nothing else becomes int8, such as {name!r} ({_class(module)})"
    else:
        start += ": no nn.Linear of the model matches"
        if targets.is_lone and any(targets.entries[0] in name for name in linears):
            start += (
                "; a lone string is a regular expression that has to match a module's whole name: "
                f"target_modules={targets.entries!r}, a list, takes substrings"
            )
    return f"{start}; {advice}"


def idle_notes(model: nn.Module, targets: Targets) -> list[str]:
    """What to say of entries of the user's own list that make nothing int8, after the conversion."""
    notes = []
    for entry in targets.own_entries:
        named = model.named_modules(remove_duplicate=False)
        modules = {name: module for name, module in named if targets.entry_names(entry, name)}
        if any(map(_is_int8, modules.values())):
            continue
        meant = meant_for_all(entry)
        what = f"no module matches {entry!r}" + (f" (did you mean {meant!r}?)" if meant else "")
        if modules:
            name, module = next(iter(modules.items()))
            what = f"{entry!r} names no nn.Linear, and nothing else becomes int8, such as {name!r} ({_class(module)})"
        notes.append(f"target_modules={targets.given!r}: {what}; the other entries are used")
    return notes


def float_note(model: nn.Module, targets: Targets) -> str:
    """What to say if a large share of the matrices stays float although the targets stand for all of them or name
    them; else ""."""
    floats: dict[str, int] = {}
    int8 = 0
    is_expected, more_linears = not targets.is_choice, False
    for weight in weights_of(model):
        if isinstance(weight.tensor, Int8Weight):
            int8 += weight.tensor.numel()
        elif weight.kind in (MATRIX, OTHER) and not is_lazy(weight.tensor) and weight.tensor.is_floating_point():
            floats[weight.name] = weight.tensor.numel()
            is_expected = is_expected or targets.takes(weight)
            more_linears = more_linears or type(weight.module) is nn.Linear
    left = sum(floats.values())
    share = left / max(1, left + int8)
    if not is_expected or share < LARGE_SHARE:
        return ""
    advice = "only nn.Linear layers become int8, not experts in one tensor, convolutions or the Conv1D of transformers"
    if more_linears and targets.is_choice:
        advice += f", and target_modules={AUTO!r} takes all of them except the head"
    return (
        f"target_modules={targets.given!r} leaves {share:.0%} of the elements of this model's matrices in floats "
        f"(embeddings and head not counted): {abridged(floats)}; {advice}"
    )


def _class(module: nn.Module) -> str:
    return type(module).__name__


def _is_int8(module: nn.Module) -> bool:
    return any(isinstance(parameter, Int8Weight) for parameter in module.parameters(recurse=False))
