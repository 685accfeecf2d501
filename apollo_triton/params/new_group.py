"""A parameter group that is to be added: its defaults filled in and everything checked, before anything changes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.settings import Settings, complete_group
from .aliasing import check_separate
from .checks import check_parameter
from .member import Param, params_of

Groups = list[dict[str, Any]]


class NewGroup(NamedTuple):
    """``group`` is for ``torch.optim``; ``where`` is what errors call it; ``lr`` is the learning rate as a number."""

    group: dict[str, Any]
    params: list[Param]
    settings: Settings
    lr: float
    where: str
    is_named: bool

    @classmethod
    def of_each(cls, given: Sequence[dict[str, Any]], groups: Groups, defaults: dict[str, Any]) -> list[NewGroup]:
        """The groups ``given``, to be added one after the other to an optimizer that has ``groups``."""
        known, added = [*groups], []
        for each in given:
            added.append(cls.of(each, known, defaults))
            known.append(added[-1].group)
        return added

    @classmethod
    def of(cls, given: dict[str, Any], groups: Groups, defaults: dict[str, Any]) -> NewGroup:
        """The group ``given`` to an optimizer that has ``groups``. Nothing is written to what is given.

        Raises ValueError for what cannot be trained so.
        """
        index = len(groups)
        where = f"parameter group {index}"
        if "params" not in given:
            raise ValueError(f"{where} has no 'params', only {list(given)[:9]}")
        group = dict(given)
        params = group["params"]
        if not isinstance(params, (Tensor, set)):
            group["params"] = params = list(params)
        limit = (groups[0] if groups else defaults)["max_grad_norm"]
        for name, default in (defaults | {"max_grad_norm": limit}).items():
            group.setdefault(name, default)
        complete_group(group)
        settings = Settings.of(group, where)
        if settings.max_grad_norm != limit:
            raise ValueError(
                f"{where}: max_grad_norm {settings.max_grad_norm!r} differs from the optimizer's {limit!r}; one norm "
                "is taken over all gradients: pass it to the constructor"
            )
        lr = group["lr"]
        if isinstance(lr, Tensor):
            lr = lr.item()
            Settings.of(group | {"lr": lr}, where)
        items = [params] if isinstance(params, Tensor) else params
        names = group.get("param_names", [""] * len(items))
        if len(names) != len(items):
            raise ValueError(f"{where}: {len(names)} param_names for {len(items)} params")
        first = sum(len(known["params"]) for known in groups)
        added: dict[int, Param] = {}
        for offset, (name, item) in enumerate(zip(names, items, strict=True)):
            name, parameter = item if isinstance(item, tuple) else (name, item)
            if isinstance(parameter, Tensor):  # torch.optim complains of anything else
                param = Param(index, first + offset, name, parameter)
                if id(parameter) in added:  # torch.optim warns; kernels would update it twice at once
                    raise ValueError(f"{param} is in {where} twice; leave one out")
                added[id(parameter)] = param
                check_parameter(param, settings)
        check_separate(param for param in (*params_of(groups), *added.values()) if param.tensor.requires_grad)
        is_named = "param_names" in group or any(isinstance(item, tuple) for item in items)
        return cls(group, list(added.values()), settings, lr, where, is_named)

    def name_all(self, groups: Groups) -> Groups:
        """Make up names where some groups have names and others none, since torch.optim wants all or none named.

        Returns those of ``groups`` that got some.
        """
        unnamed = [known for known in groups if "param_names" not in known]
        if self.is_named:
            for index, known in enumerate(groups):
                known.setdefault("param_names", _made_up(index, len(known["params"])))
            return unnamed
        if len(unnamed) < len(groups):
            self.group["param_names"] = _made_up(len(groups), len(self.params))
        return []


def place_learning_rate(group: dict[str, Any]) -> None:
    """Give the group a learning rate of its own, if it is a tensor: schedulers and ``group["lr"] *= x`` change it in
    place. Under ``capturable`` it is a tensor where the parameters are."""
    lr = group["lr"]
    if isinstance(lr, Tensor):
        group["lr"] = lr = lr.detach().clone()
    if group["capturable"] and group["params"]:
        group["lr"] = torch.as_tensor(lr, dtype=torch.float32, device=group["params"][0].device)


def _made_up(group: int, size: int) -> list[str]:
    return [f"group {group}, {offset}" for offset in range(size)]
