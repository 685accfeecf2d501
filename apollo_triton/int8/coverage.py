"""Which matrices of a model stay float, and what ``quantize_model`` says of that."""

from __future__ import annotations

import re
from collections.abc import Iterable

from torch import nn
from torch.nn.parameter import is_lazy

from ..core.param_groups import is_target
from .weight import Int8Weight

DEFAULT_TARGETS = ("attn", "mlp")
# As in ``apollo_param_groups``. LLaMA, Qwen and Gemma leave nothing.
_LARGE_SHARE = 0.1


def targeted(model: nn.Module, targets: str | list[str]) -> dict[str, nn.Module]:
    """The modules that ``target_modules`` names, whatever they are, under each of their names."""
    named = dict(model.named_modules(remove_duplicate=False))
    return {name: module for name, module in named.items() if is_target(targets, name, module)}


def no_match(model: nn.Module, targets: str | list[str]) -> str:
    """Why ``target_modules`` gives nothing to convert, and what would."""
    start = f"target_modules={targets!r}"
    heads = _heads(model)
    linears = [
        name for name, module in model.named_modules() if type(module) is nn.Linear and name and id(module) not in heads
    ]
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
    if are_int8:
        more = f"; for the others {advice}" if linears else ""
        return f"{start}: the {len(are_int8)} layers that it names are int8 already, such as {are_int8[0]!r}{more}"
    if others:
        name, module = next(iter(others.items()))
        start += f" names no nn.Linear, and nothing else becomes int8, such as {name!r} ({type(module).__name__})"
    else:
        start += ": no nn.Linear of the model matches"
    return f"{start}; {advice}"


def float_note(model: nn.Module, targets: str | list[str]) -> str:
    """What to say if a large share of the matrices stays float although the targets stand for all of them or name
    them; else ""."""
    named = {id(module) for module in targeted(model, targets).values()}
    embeddings = {
        id(module.weight) for module in model.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
    }
    heads = _heads(model)
    floats: dict[str, int] = {}
    int8 = 0
    is_expected, more_linears = _is_general(targets), False
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            if is_lazy(parameter) or parameter.dim() < 2 or id(parameter) in embeddings or id(module) in heads:
                continue
            if isinstance(parameter, Int8Weight):
                int8 += parameter.numel()
            elif parameter.is_floating_point() and "bias" not in name and "embed" not in f"{module_name}.{name}":
                floats[f"{module_name}.{name}" if module_name else name] = parameter.numel()
                is_expected = is_expected or id(module) in named
                more_linears = more_linears or type(module) is nn.Linear
    left = sum(floats.values())
    share = left / max(1, left + int8)
    if not is_expected or share < _LARGE_SHARE:
        return ""
    advice = "only nn.Linear layers become int8"
    if more_linears:
        advice += ", and target_modules='all-linear' takes all of them except the head"
    return (
        f"target_modules={targets!r} leaves {share:.0%} of the elements of this model's matrices in floats (embeddings "
        f"and head not counted): {_abridged(floats)}; {advice}"
    )


def _is_general(targets: str | list[str]) -> bool:
    """Whether the targets stand for all matrices: the default, and "all-linear"."""
    return targets == list(DEFAULT_TARGETS) or (isinstance(targets, str) and targets.replace("_", "-") == "all-linear")


def _is_int8(module: nn.Module) -> bool:
    return any(isinstance(parameter, Int8Weight) for parameter in module.parameters(recurse=False))


def _heads(model: nn.Module) -> set[int]:
    """The ids of output layers: linear layers that "all-linear" leaves out."""
    return {
        id(module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and not is_target("all-linear", name, module)
    }


def _abridged(names: Iterable[str], most: int = 4) -> str:
    """Names with layers' indices as "*", and how often each occurs."""
    counts: dict[str, int] = {}
    for name in names:
        short = re.sub(r"(?<=\.)\d+(?=\.)", "*", name)
        counts[short] = counts.get(short, 0) + 1
    texts = [name + (f" ({count})" if count > 1 else "") for name, count in counts.items()]
    return ", ".join(texts[:most]) + (f" and {len(texts) - most} more" if len(texts) > most else "")
