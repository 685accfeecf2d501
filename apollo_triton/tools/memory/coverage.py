"""Which of a model's matrices APOLLO leaves dense, for a sentence below the table of ``apollo-triton memory``."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...core.kinds import embedding_weights
from ...core.param_groups import apollo_param_groups
from ...core.targets import DEFAULT_TARGETS, Targets

MOST_NAMES = 6
SMALLEST = 0.005  # a share below is a router or the like, which is not worth a sentence


@dataclass(frozen=True)
class Coverage:
    """What of a model is dense, in weights. ``share`` is of the matrices that are neither embeddings nor the head, and
    ``names`` has those of them that stay dense, the largest first and with ``*`` for the layers' indices. It is empty
    where the share is negligible."""

    dense: int
    share: float
    names: tuple[str, ...]
    kinds: str

    @property
    def examples(self) -> str:
        """The first names, and how many more there are."""
        more = len(self.names) - MOST_NAMES
        return ", ".join(self.names[:MOST_NAMES]) + (f" and {more} more" if more > 0 else "")


def dense_coverage(model: nn.Module, rank: int, targets: Any = None) -> Coverage:
    """The coverage of ``apollo_param_groups(model, rank, targets)``."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the count of the memory has warned already
        groups = apollo_param_groups(model, rank, **({} if targets is None else {"target_modules": targets}))
    dense = {name for group in groups if group.get("rank") is None for name in group["param_names"]}
    embeddings, is_head = embedding_weights(model), Targets(model, DEFAULT_TARGETS).is_head
    modules = model.named_modules()
    head = {id(weight) for name, module in modules if is_head(name, module) for weight in module.parameters()}
    kinds: dict[str, None] = {}
    sizes: dict[str, int] = {}  # of the matrices that stay dense, the same matrix of all layers together
    total = dense_size = 0
    for name, parameter in model.named_parameters():
        size = parameter.numel() if parameter.requires_grad else 0
        dense_size += size if name in dense else 0
        is_embedding = id(parameter) in embeddings or "embed" in name  # as the note on dense matrices has it
        if is_embedding or id(parameter) in head:
            kinds["embeddings" if is_embedding else "head"] = None
        elif parameter.dim() > 1:
            total += size
            if name in dense:
                of_layers = re.sub(r"(^|\.)\d+(?=\.)", r"\1*", name)
                sizes[of_layers] = sizes.get(of_layers, 0) + size
    share = sum(sizes.values()) / total if total else 0.0
    names = sorted(sizes, key=lambda name: -sizes[name]) if share >= SMALLEST else []
    if names:
        kinds["other matrices"] = None
    return Coverage(dense_size, share, tuple(names), ", ".join(kinds) or "norms and biases")
