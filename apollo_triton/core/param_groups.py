"""``apollo_param_groups``: the two groups of a model that the optimizer takes."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import nn

from .coverage import coverage
from .coverage_notes import no_match, notes
from .messages import warn
from .settings import CHECKS, check_value
from .spelling import unknown_option
from .targets import DEFAULT_TARGETS, Targets


def apollo_param_groups(
    model: nn.Module,
    rank: int = 256,
    target_modules: str | Iterable[str] = DEFAULT_TARGETS,
    **group_keys: Any,
) -> list[dict[str, Any]]:
    """Two parameter groups: the targeted weights of ``model``, with a ``rank``, and everything else, dense.

    Args:
        model: any module.
        rank: the rank of the low-rank group.
        target_modules: which weights are low-rank. "auto": every matrix of the blocks, whatever it is called, as
            ``core/kinds.py`` tells it from embeddings, heads, norms, tables and convolutions. Or, as in the Hugging
            Face Trainer, a list of substrings or regular expressions of module names (a regular expression must match
            the whole name); one regular expression; or "all-linear" for every ``nn.Linear`` and transformers
            ``Conv1D`` except the head. A list may have "auto" or "all-linear" in it.
        group_keys: further keys of the low-rank group, e.g. ``scale_type="tensor"``, ``scale=128``.

    The low-rank weights of a module that is named are its own parameters of two or more dimensions, including expert
    tensors ``[experts, rows, columns]``. Biases (also tables of them), norms, embeddings, 1-D convolutions and
    everything else stay dense. So does a targeted weight that is narrower than ``rank`` or than 8, or whose state would
    be no smaller than AdamW's: a mixture's router, a small key projection, a layer of one output.
    ``rank_above_width=True`` makes it low-rank all the same.

    Warns of a named weight that is too narrow, of an entry of a list that makes nothing low-rank, and if "auto" or
    "all-linear" leaves over a tenth of the matrices dense. Raises TypeError if ``model`` is not a module, or for an
    unknown group key. Raises ValueError for a bad regular expression or value, if no weight matches, and if every
    targeted weight is too narrow.

    >>> model = nn.ModuleDict({"mlp": nn.Linear(32, 64), "norm": nn.LayerNorm(64)})
    >>> low_rank, dense = apollo_param_groups(model, rank=8)
    >>> low_rank["param_names"], dense["param_names"]
    (['mlp.weight'], ['mlp.bias', 'norm.weight', 'norm.bias'])
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"apollo_param_groups needs the model itself, an nn.Module, not {type(model).__name__}")
    for name in group_keys:
        if name not in CHECKS:
            raise TypeError(f"apollo_param_groups: {unknown_option(name, [*CHECKS, 'target_modules'])}")
    if rank is None:
        raise ValueError("Invalid rank: None (allowed: an integer of 1 or more)")
    for name, value in ({"rank": rank} | group_keys).items():
        check_value(name, value)
    targets = Targets(model, target_modules)
    found = coverage(model, targets, rank, group_keys)
    if not found.low_rank:
        raise ValueError(no_match(targets, rank, group_keys, found))
    for note in notes(targets, found):
        warn(note)
    parameters = list(model.named_parameters())
    low_rank = [(name, p) for name, p in parameters if id(p) in found.low_rank]
    dense = [(name, p) for name, p in parameters if id(p) not in found.low_rank]
    groups = [_group(low_rank) | {"rank": rank} | group_keys]
    return [*groups, _group(dense)] if dense else groups


def _group(named: list[tuple[str, nn.Parameter]]) -> dict[str, Any]:
    return {"params": [p for _, p in named], "param_names": [name for name, _ in named]}
