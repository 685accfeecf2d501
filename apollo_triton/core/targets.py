"""Which modules of a model ``target_modules`` names, and which modules are heads."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from .messages import shown

# A list of the user's own is a choice, and is taken as it is. These two stand for "the model's matrices".
DEFAULT_TARGETS = ("attn", "mlp")
ALL_LINEAR = "all-linear"

# What an output layer is called. As in the paper, the head is dense, with all that lies in it.
_HEADS = frozenset(
    {"head", "heads", "classifier", "pre_classifier", "score", "cls", "embed_out", "qa_outputs", "logits", "to_logits"}
    | {"output_projection", "unembed"}
)
# A "head" or "score" in a numbered layer or in attention is most likely attention's own. These are heads there too, as
# DeepSeek's `mtp.layers.0.shared_head.head` is.
_HEADS_IN_LAYERS = frozenset({"lm_head", "lm_heads", "shared_head", "embed_out"})
_IN_LAYERS = re.compile("attn|attention|mlp|ffn|feed_forward")
# Modules that wrap another one under its own name: PEFT's, torch.compile's, FSDP1's, activation checkpointing's.
_WRAPPERS = frozenset(
    {"original_module", "base_layer", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module"}
)


class Targets:
    """``target_modules`` for one model: entries that are substrings or regular expressions, or "all-linear".

    Raises ValueError for what is neither a string nor strings, and for a bad regular expression.

    >>> model = nn.ModuleDict({"mlp": nn.Linear(2, 2), "lm_head": nn.Linear(2, 2)})
    >>> [name for name, module in model.named_modules() if Targets(model, "all-linear").match(name, module)]
    ['mlp']
    """

    def __init__(self, model: nn.Module, target_modules: str | Iterable[str]) -> None:
        given: Any = target_modules
        if isinstance(given, Iterable) and not isinstance(given, str):
            given = list(given)
        entries: list[Any] = given if isinstance(given, list) else [given]
        if not all(isinstance(entry, str) for entry in entries):
            raise ValueError(
                f"Invalid target_modules: {shown(given)} (allowed: a list of substrings or regular expressions of "
                f"module names, one regular expression, or {ALL_LINEAR!r})"
            )
        for entry in entries:
            try:
                re.compile(entry)
            except re.error as error:
                raise ValueError(f"target_modules: {entry!r} is no regular expression: {error}") from error
        self.given: str | list[str] = given
        self.entries: list[str] = entries
        self.heads = heads_of(model)

    @property
    def is_lone(self) -> bool:
        """Whether one string was given, which is a regular expression of whole names."""
        return isinstance(self.given, str)

    @property
    def is_choice(self) -> bool:
        """Whether the user has named the modules, and not taken the default or all."""
        return sorted(self.entries) != sorted(DEFAULT_TARGETS) and not all(map(_is_all_linear, self.entries))

    def match(self, name: str, module: nn.Module) -> bool:
        return any(self.entry_matches(entry, name, module) for entry in self.entries)

    def entry_matches(self, entry: str, name: str, module: nn.Module) -> bool:
        if _is_all_linear(entry):
            return is_linear(module) and not self.is_head(name, module)
        return bool(re.fullmatch(entry, name)) or (not self.is_lone and entry in name)

    def is_head(self, name: str, module: nn.Module) -> bool:
        """Whether the module is an output layer or lies in one."""
        return id(module) in self.heads or is_head_name(name)


def is_linear(module: nn.Module) -> bool:
    """Whether "all-linear" may take the module: nn.Linear, and the Conv1D of transformers, which is one as well."""
    return isinstance(module, nn.Linear) or any(
        kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.") for kind in type(module).__mro__
    )


def is_head_name(name: str) -> bool:
    """Whether the name of a module is that of an output layer, or of what lies in one.

    >>> [is_head_name(name) for name in ("lm_head.modules_to_save.default", "classifier.dense", "output")]
    [True, True, True]
    >>> [is_head_name(name) for name in ("layer.0.attention.output.dense", "multi_head_attention.q", "h.1.sa.heads.0")]
    [False, False, False]
    """
    parts = list(_unwrapped(name.split(".")))
    if parts and parts[-1] == "output":  # LLaMA's own code and torchtune; in a layer it is BERT's
        return not _is_in_layer(parts[:-1])
    return any(
        part in _HEADS_IN_LAYERS or (_is_head_part(part) and not _is_in_layer(parts[:index]))
        for index, part in enumerate(parts)
    )


def _is_head_part(part: str) -> bool:
    return part in _HEADS or (part.endswith("_head") and not re.search("multi_head|attn|attention", part))


def _is_in_layer(parts: list[str]) -> bool:
    """Whether the way leads through a numbered layer or a part of one. The first number may be an nn.Sequential's."""
    return any(part.isdigit() for part in parts[1:]) or any(_IN_LAYERS.search(part) for part in parts)


def _unwrapped(parts: list[str]) -> Iterator[str]:
    """The parts of a path without those of wrappers."""
    previous = ""
    for part in parts:
        # after `modules_to_save` comes the name of an adapter
        if part not in _WRAPPERS and part != "modules_to_save" and previous != "modules_to_save":
            yield part
        previous = part


def heads_of(model: nn.Module) -> set[int]:
    """The ids of the modules that a transformers model, or one within ``model``, says are its output layers."""
    heads: set[int] = set()
    for module in model.modules():
        if not callable(getattr(type(module), "get_output_embeddings", None)):
            continue
        try:
            found: Any = module.get_output_embeddings()  # type: ignore[operator]
        except Exception:  # of a model that has none; what it raises is the model's business
            continue
        for head in found if isinstance(found, (list, tuple)) else [found]:
            if isinstance(head, nn.Module) and head is not module:
                heads.update(id(part) for part in head.modules())
    return heads


def _is_all_linear(entry: str) -> bool:
    return entry.replace("_", "-") == ALL_LINEAR
