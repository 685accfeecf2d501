"""Which weights of a model ``target_modules`` names."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from typing import Any

from torch import nn

from .kinds import EMBEDDING, HEAD, MATRIX, Roles, Weight, is_linear, module_weights
from .messages import shown
from .module_names import is_head_name

# These two stand for "the model's matrices". A list of the user's own is a choice, and is taken as it is.
AUTO = "auto"
ALL_LINEAR = "all-linear"
DEFAULT_TARGETS = AUTO


class Targets:
    """``target_modules``: "auto", "all-linear", and substrings or regular expressions of names of modules.

    Of a ``source`` that is no model, which named parameters are not, names alone tell what is a head.

    Raises ValueError for what is neither a string nor strings, for no strings, and for a bad regular expression.

    >>> model = nn.ModuleDict({"mlp": nn.Linear(2, 2), "lm_head": nn.Linear(2, 2)})
    >>> [name for name, module in model.named_modules() if Targets(model, "auto").match(name, module)]
    ['mlp']
    """

    def __init__(self, source: object, target_modules: str | Iterable[str]) -> None:
        self.given, self.entries = _checked(target_modules)
        self.roles = Roles.of(source)

    def with_entries(self, target_modules: str | Iterable[str]) -> Targets:
        """Other targets of the same model."""
        other = Targets(None, target_modules)
        other.roles = self.roles
        return other

    @property
    def is_lone(self) -> bool:
        """Whether one string was given, which is a regular expression of whole names."""
        return isinstance(self.given, str)

    @property
    def own_entries(self) -> list[str]:
        """The entries by which the user names modules, and does not take all."""
        return [entry for entry in self.entries if not stands_for_all(entry)]

    @property
    def is_choice(self) -> bool:
        """Whether the user has named modules, and not taken the default or all."""
        return bool(self.own_entries)

    def takes(self, weight: Weight) -> bool:
        """Whether an entry names the module of the weight, or stands for weights such as this one."""
        return any(self.entry_takes(entry, weight) for entry in self.entries)

    def entry_takes(self, entry: str, weight: Weight) -> bool:
        if entry == AUTO:
            return weight.kind == MATRIX
        if stands_for_all(entry):
            if weight.module is None:
                return weight.kind == MATRIX and weight.tensor.dim() == 2
            is_shared = id(weight.tensor) in self.roles.tables | self.roles.heads
            return weight.kind in (MATRIX, EMBEDDING) and is_linear(weight.module) and not is_shared
        return self.entry_names(entry, weight.module_name)

    def entry_names(self, entry: str, module_name: str) -> bool:
        """Whether an entry of one's own is the name of the module, or a part of it."""
        return bool(re.fullmatch(entry, module_name)) or (not self.is_lone and entry in module_name)

    def match(self, name: str, module: nn.Module) -> bool:
        """Whether the module, or a weight of its own, is targeted."""
        if any(self.entry_names(entry, name) for entry in self.own_entries):
            return True
        weights = list(module_weights(name, module, self.roles))
        # A linear layer is one also where something computes its weight, or keeps it elsewhere.
        is_inner = is_linear(module) and {EMBEDDING, HEAD}.isdisjoint(weight.kind for weight in weights)
        return (is_inner and any(map(stands_for_all, self.entries))) or any(map(self.takes, weights))

    def is_head(self, name: str, module: nn.Module) -> bool:
        """Whether the module is an output layer or lies in one."""
        parameters = list(module.parameters())
        is_known = bool(parameters) and all(id(parameter) in self.roles.heads for parameter in parameters)
        return is_known or is_head_name(name)


def _checked(target_modules: Any) -> tuple[str | list[str], list[str]]:
    """``target_modules`` as it was given, and its entries."""
    given = target_modules
    if isinstance(given, Iterable) and not isinstance(given, str):
        given = list(given)
    entries = given if isinstance(given, list) else [given]
    if not entries or not all(isinstance(entry, str) for entry in entries):
        raise ValueError(
            f"Invalid target_modules: {shown(given)} (allowed: {AUTO!r}, {ALL_LINEAR!r}, one regular expression, or a "
            "list of substrings and regular expressions of module names, which may have these two in it)"
        )
    for entry in entries:
        try:
            re.compile(entry)
        except re.error as error:
            raise ValueError(f"target_modules: {entry!r} is no regular expression: {error}") from error
    return given, entries


def stands_for_all(entry: str) -> bool:
    """Whether an entry is "auto" or "all-linear", which Hugging Face's tools spell with either line."""
    return entry == AUTO or entry.replace("_", "-") == ALL_LINEAR


def meant_for_all(entry: str) -> str:
    """The word for all matrices that an entry was most likely meant to be; "" if it is not nearly one."""
    if stands_for_all(entry):
        return ""
    near = difflib.get_close_matches(entry.lower().replace("_", "-").replace(" ", "-"), [AUTO, ALL_LINEAR], 1, 0.75)
    return near[0] if near else ""
