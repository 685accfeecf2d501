"""Which of a model's matrices APOLLO leaves dense, for a sentence below the table of ``apollo-triton memory``."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from ...core.param_groups import apollo_param_groups

MOST_NAMES = 6


@dataclass(frozen=True)
class Coverage:
    """What of a model is dense. ``share`` counts the weights of matrices that are neither embeddings nor the head, and
    ``names`` has those matrices that stay dense, with ``*`` for the layers' indices."""

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
    embeddings, head = _embeddings(model), _head(model)
    parts = {"embeddings": False, "head": False, "norms and biases": False}
    total = left = dense_size = 0
    names: dict[str, None] = {}
    for name, parameter in model.named_parameters():
        size = parameter.numel() if parameter.requires_grad else 0
        dense_size += size if name in dense else 0
        if id(parameter) in embeddings:
            parts["embeddings"] = True
        elif id(parameter) in head:
            parts["head"] = True
        elif parameter.dim() > 1:
            total += size
            if name in dense:
                left += size
                names[re.sub(r"(^|\.)\d+(?=\.)", r"\1*", name)] = None
        else:
            parts["norms and biases"] = True
    kinds = [kind for kind, found in parts.items() if found and kind != "norms and biases"]
    kinds += ["other matrices"] if left else []
    return Coverage(dense_size, left / total if total else 0.0, tuple(names), ", ".join(kinds or ["norms and biases"]))


def _embeddings(model: nn.Module) -> set[int]:
    return {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}


def _head(model: Any) -> set[int]:
    output: Iterable[nn.Parameter] = ()
    if hasattr(model, "get_output_embeddings") and (found := model.get_output_embeddings()) is not None:
        output = found.parameters()
    return {id(parameter) for parameter in output}
