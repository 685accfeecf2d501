"""Which weights of a model are low-rank: ``apollo_param_groups`` makes the two groups that the optimizer takes."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from typing import Any

from torch import nn

from .geometry import Geometry
from .settings import CHECKS, check_value

# The last part of an output layer's name in common models: as in the paper, the head is dense.
_HEADS = frozenset({"lm_head", "embed_out", "output", "head", "score", "classifier"})


def apollo_param_groups(
    model: nn.Module,
    rank: int = 256,
    target_modules: str | Iterable[str] = ("attn", "mlp"),
    **group_keys: Any,
) -> list[dict[str, Any]]:
    """Two parameter groups: the targeted weights of ``model``, with a ``rank``, and everything else, dense.

    Args:
        model: any module. The default targets fit LLaMA, Qwen, Gemma and similar models.
        rank: the rank of the low-rank group.
        target_modules: which modules are low-rank, as in the Hugging Face Trainer. A list of substrings or regular
            expressions of module names (a regular expression must match the whole name); one regular expression; or
            "all-linear" for every ``nn.Linear`` except the head.
        group_keys: further keys of the low-rank group, e.g. ``scale_type="tensor"``, ``scale=128``.

    The low-rank weights of a targeted module are its own parameters of two or more dimensions, including expert tensors
    ``[experts, rows, columns]``. Biases, norms, embeddings, 1-D convolutions and everything else stay dense. A weight
    narrower than ``rank`` (a mixture's router, a small key projection) stays dense too, with a warning, because its
    low-rank state would be larger than AdamW's. ``rank_above_width=True`` makes it low-rank all the same.

    Raises TypeError if ``model`` is not a module. Raises ValueError for a bad regular expression or group key, if no
    weight matches, and if every targeted weight is narrower than ``rank``.

    >>> model = nn.ModuleDict({"mlp": nn.Linear(32, 64), "norm": nn.LayerNorm(64)})
    >>> low_rank, dense = apollo_param_groups(model, rank=8)
    >>> low_rank["param_names"], dense["param_names"]
    (['mlp.weight'], ['mlp.bias', 'norm.weight', 'norm.bias'])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"apollo_param_groups needs the model itself, an nn.Module, not {type(model).__name__}")
    if rank is None:
        raise ValueError("Invalid rank: None (allowed: an integer of 1 or more)")
    for name, value in ({"rank": rank} | group_keys).items():
        if name in CHECKS:
            check_value(name, value)
    many = isinstance(target_modules, Iterable) and not isinstance(target_modules, str)
    targets = list(target_modules) if many else target_modules
    if not isinstance(targets, (str, list)) or not all(isinstance(target, str) for target in targets):
        raise ValueError(
            f"Invalid target_modules: {target_modules!r} (allowed: a list of substrings or regular expressions of "
            "module names, one regular expression, or 'all-linear')"
        )
    for target in [targets] if isinstance(targets, str) else targets:
        try:
            re.compile(target)
        except re.error as error:
            raise ValueError(f"target_modules: {target!r} is no regular expression: {error}") from error
    chosen, narrow = {}, []
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for module_name, module in model.named_modules():
        # A 1-D convolution's [out, in, kernel] would be taken for experts.
        if not is_target(targets, module_name, module) or isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):
            continue
        for name, parameter in module.named_parameters(recurse=False):
            if parameter.dim() < 2 or id(parameter) in embeddings:
                continue
            full_name = f"{module_name}.{name}" if module_name else name
            width = Geometry.of(parameter.shape, group_keys.get("proj_type", "std")).width
            if width < rank and not group_keys.get("rank_above_width"):
                narrow.append(f"{full_name} (width {width})")
            else:
                chosen[id(parameter)] = full_name
    if not chosen:
        found = f"all {len(narrow)} targeted weights are narrower than rank {rank}" if narrow else "no weight matches"
        raise ValueError(
            f"target_modules={targets!r}: {found}; give substrings or regular expressions of names such as "
            f"{_example_names(model)}, or 'all-linear', and a rank of at most the weights' smaller side"
        )
    if narrow:
        warnings.warn(
            f"{len(narrow)} targeted weights are narrower than rank {rank} and stay dense: {', '.join(narrow)}",
            stacklevel=2,
        )
    parameters = list(model.named_parameters())
    low_rank = [(name, p) for name, p in parameters if id(p) in chosen]
    dense = [(name, p) for name, p in parameters if id(p) not in chosen]
    groups = [_group(low_rank) | {"rank": rank} | group_keys]
    return [*groups, _group(dense)] if dense else groups


def _group(named: list[tuple[str, nn.Parameter]]) -> dict[str, Any]:
    return {"params": [p for _, p in named], "param_names": [name for name, _ in named]}


def is_target(targets: str | list[str], name: str, module: nn.Module) -> bool:
    if isinstance(targets, str):
        if targets.replace("_", "-") == "all-linear":
            return isinstance(module, nn.Linear) and name.rpartition(".")[2] not in _HEADS
        return bool(re.fullmatch(targets, name))
    return any(target in name or re.fullmatch(target, name) for target in targets)


def _example_names(model: nn.Module) -> str:
    names = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return ", ".join(repr(name) for name in names[:3]) or "(the model has no nn.Linear)"
