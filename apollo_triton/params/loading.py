"""A whole ``state_dict``, read before anything changes: its groups and the state of every parameter.

``torch.optim`` checks only how many parameters there are, and trusts the rest. Here everything is looked at first, then
made anew beside what the optimizer has. What is returned can be put in place, and nothing can fail after that.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.messages import shown
from ..core.settings import DENSE_DEFAULTS, FIELD_NAMES, LOW_RANK_DEFAULTS, Settings, complete_group, dtype_of
from .checks import check_parameter
from .differences import (
    OF_THE_RUN,
    given_names,
    warn_of_dtypes,
    warn_of_forms,
    warn_of_groups,
    warn_of_names,
    warn_of_second_moments,
    warn_of_settings,
)
from .member import Param, find_shard, params_of
from .regrouping import regrouped, with_own_form
from .saved_state import check_saved_state, check_values, copied, loaded_state, second_moment_of, was_8bit

_ADVICE = "give what optimizer.state_dict() returned"
_SAME_GROUPS = (
    "build the groups as they were saved: the same model, target_modules, rank, embeddings, and order of the groups"
)
_MIXED = (
    "set_optimizer_state_dict mixes this run's groups with those of a checkpoint that has another embeddings=; give "
    "the dictionary to optimizer.load_state_dict(...), which converts it"
)
# ``torch.optim`` writes its own default into every group that it copies or loads, though our step knows no such thing.
FOREIGN_KEY = "differentiable"
# Keys of torch.optim's optimizers: Adam and its relatives, SGD and RMSprop, Adagrad, Adadelta, Adafactor, Rprop, ASGD;
# RAdam and Adamax have only those that all have.
_OF_TORCH = ("amsgrad", "momentum", "momentum_decay", "lr_decay", "rho", "beta2_decay", "etas", "lambd", "foreach")

Group = dict[str, Any]


class Loaded(NamedTuple):
    """What a ``state_dict`` makes of an optimizer: groups with the optimizer's parameters, and their state.

    ``state`` may have keys that are names: ``torch.optim`` keeps what belongs to no parameter.
    """

    groups: list[Group]
    state: dict[Any, Any]


def read_state_dict(state_dict: Mapping[str, Any], groups: Sequence[Group]) -> Loaded:
    """Groups and state for an optimizer that has ``groups``. Changes nothing, and takes nothing along by reference.

    Raises ValueError, which names the group, the parameter and the key, for what training cannot continue from. Warns
    where the checkpoint's settings or the names of its parameters are not those of ``groups``.
    """
    saved_groups = _saved_groups(state_dict, groups)
    new_groups = [
        _group(saved, own, f"state_dict, parameter group {index}")
        for index, (saved, own) in enumerate(zip(saved_groups, groups, strict=True))
    ]
    _check_names(saved_groups, new_groups, groups)
    settings = [Settings.of(group, f"state_dict, parameter group {index}") for index, group in enumerate(new_groups)]
    limits = {each.max_grad_norm for each in settings}
    if len(limits) > 1:
        raise ValueError(
            f"state_dict: max_grad_norm differs between parameter groups ({', '.join(map(repr, limits))}); it is one "
            "norm over all gradients"
        )
    keys = _keys(state_dict["state"], saved_groups)
    params = list(params_of(new_groups))
    dtypes = _saved_dtypes(state_dict["param_groups"])
    found = []
    for key, param in zip(keys, params, strict=True):
        with _naming(param):
            check_parameter(param, settings[param.group])
            saved = state_dict["state"].get(key, {})
            if isinstance(saved, Mapping) and not saved:
                continue  # it has had no gradient yet
            check_saved_state(param, saved, settings[param.group])
            found.append((param, saved, find_shard(param, settings[param.group]), dtypes[key]))
    state: dict[Any, Any] = {}
    for param, saved, shard, was in found:  # gathers DTensors, on all ranks alike: so values are looked at after it
        with _naming(param):
            state[param.tensor] = loaded_state(param, saved, settings[param.group], shard, was)
    for param, *_ in found:
        with _naming(param):
            check_values(param, state[param.tensor])
    warn_of_forms([(param, settings[param.group], was_8bit(saved)) for param, saved, *_ in found])
    warn_of_dtypes([(param, settings[param.group], saved, was) for param, saved, _, was in found])
    forms = [(param, second_moment_of(saved, param, settings[param.group])) for param, saved, *_ in found]
    warn_of_second_moments([(param, settings[param.group], form) for param, form in forms])
    for key in set(state_dict["state"]) - set(keys):
        state[key] = copied(state_dict["state"][key], f"state_dict: its state {shown(key)}")
    warn_of_groups(state_dict["param_groups"], saved_groups, groups)
    warn_of_settings(new_groups, groups)
    return Loaded(new_groups, state)


def _saved_groups(state_dict: Mapping[str, Any], groups: Sequence[Group]) -> list[Mapping[str, Any]]:
    """The groups of a dictionary that has the outer form of a ``state_dict`` of this optimizer."""
    if missing := {"state", "param_groups"} - set(state_dict):
        raise ValueError(
            f"state_dict: {' and '.join(sorted(missing))} missing, it has {shown(list(state_dict)[:9])}; {_ADVICE}"
        )
    saved_groups = state_dict["param_groups"]
    if not isinstance(state_dict["state"], Mapping):
        raise ValueError(f"state_dict: 'state' is {shown(state_dict['state'])}, not a dictionary; {_ADVICE}")
    if not isinstance(saved_groups, (list, tuple)):
        raise ValueError(f"state_dict: 'param_groups' is {shown(saved_groups)}, not a list; {_ADVICE}")
    for index, saved in enumerate(saved_groups):
        _check_algorithm(saved, f"state_dict, parameter group {index}")
    saved_groups = regrouped(saved_groups, groups)
    if len(saved_groups) != len(groups):
        names = shown([group["name"] for group in groups if "name" in group])
        raise ValueError(
            f"loaded state dict has a different number of parameter groups: {len(saved_groups)}, and the optimizer has "
            f"{len(groups)}{'' if names == '[]' else f', {names}'}; {_SAME_GROUPS}"
        )
    for index, (saved, own) in enumerate(zip(saved_groups, groups, strict=True)):
        where = f"state_dict, parameter group {index}"
        if not isinstance(saved, Mapping):
            raise ValueError(f"{where}: it is {shown(saved)}, not a dictionary; {_ADVICE}")
        if not isinstance(saved.get("params"), (list, tuple)):
            raise ValueError(f"{where}: 'params' is {shown(saved.get('params'))}, not a list; {_ADVICE}")
        if len(saved["params"]) != len(own["params"]):
            raise ValueError(
                f"loaded state dict contains a parameter group that doesn't match the size of optimizer's group: "
                f"group {index} has {len(saved['params'])} parameters, and the optimizer's {len(own['params'])}; "
                f"{_SAME_GROUPS}"
            )
    return list(saved_groups)


def _check_algorithm(saved: object, where: str) -> None:
    """Raise ValueError for a group of torch.optim's own optimizers. They mostly have one group where we have two."""
    keys = saved if isinstance(saved, Mapping) else {}
    foreign = next((name for name in _OF_TORCH if name in keys and "correct_bias" not in keys), None)
    if foreign is not None:
        raise ValueError(
            f"{where}: it is a group of AdamW or another optimizer of torch.optim (it has {foreign!r}), whose state "
            "belongs to another algorithm; load the weights alone, and begin with a fresh optimizer"
        )


def _group(saved: Mapping[str, Any], own: Group, where: str) -> Group:
    """The group that a saved one becomes: with the optimizer's parameters, and what belongs to the run as it was.

    Keys that a checkpoint of an older version leaves out stay as they were asked for.
    """
    group = {
        key: copied(value, f"{where}: {shown(key)}")
        for key, value in saved.items()
        if key not in ("params", "param_names", FOREIGN_KEY)
    }
    group |= {name: own[name] for name in OF_THE_RUN}
    with_own_form(saved, group, own)
    is_low_rank = group.get("rank") is not None
    for name in FIELD_NAMES:
        if name in own and name != "rank" and name not in (DENSE_DEFAULTS if is_low_rank else LOW_RANK_DEFAULTS):
            group.setdefault(name, own[name])
    complete_group(group)
    if saved.get("capturable") is True and not own["capturable"] and not isinstance(own["lr"], Tensor):
        group["lr"] = _plain_lr(group["lr"])
    if isinstance(group["lr"], Tensor):
        Settings.of(group, where)
        Settings.of(group | {"lr": group["lr"].item()}, where)
    return group | {"params": own["params"]}


def _plain_lr(lr: Any) -> Any:
    """The number in a learning rate that was a tensor only because the saved run was ``capturable``."""
    is_plain = isinstance(lr, Tensor) and lr.numel() == 1 and lr.layout == torch.strided and not lr.is_meta
    return lr.item() if is_plain else lr


def _check_names(saved_groups: Sequence[Mapping[str, Any]], new_groups: list[Group], groups: Sequence[Group]) -> None:
    """Compare the names of parameters, and put names into the new groups: the optimizer's own, else the saved ones."""
    for index, saved in enumerate(saved_groups):
        names = saved.get("param_names", [])
        is_list = isinstance(names, (list, tuple)) and all(isinstance(name, str) for name in names)
        if "param_names" in saved and not (is_list and len(names) == len(saved["params"])):
            raise ValueError(
                f"state_dict, parameter group {index}: 'param_names' is {shown(names)} (allowed: a name for each of "
                f"its {len(saved['params'])} params, or no such key). {_MIXED}"
            )
    saved_names = [given_names(dict(saved)) for saved in saved_groups]
    own_names = [given_names(group) for group in groups]
    warn_of_names(*(_by_index(names, saved_groups) for names in (saved_names, own_names)))
    all_saved = all("param_names" in saved for saved in saved_groups)
    for saved, own, new, given in zip(saved_groups, groups, new_groups, own_names, strict=True):
        if all_saved and given is None:
            new["param_names"] = list(saved["param_names"])
        elif "param_names" in own:
            new["param_names"] = list(own["param_names"])


def _by_index(names: Sequence[list[str] | None], groups: Sequence[Mapping[str, Any]]) -> list[str | None]:
    """A name for each parameter of all groups, None for those of groups without names."""
    found: list[str | None] = []
    for given, group in zip(names, groups, strict=True):
        found += given or [None] * len(group["params"])
    return found


def _keys(state: Mapping[Any, Any], saved_groups: Sequence[Mapping[str, Any]]) -> list[Any]:
    """The key of each parameter's state. Raises ValueError unless each has one of its own, and none is left over."""
    keys: dict[Any, None] = {}
    for index, saved in enumerate(saved_groups):
        for key in saved["params"]:
            where = f"state_dict, parameter group {index}: 'params' has {shown(key)}"
            if isinstance(key, bool) or not isinstance(key, (int, str)):
                raise ValueError(f"{where} (allowed: integers or names); {_ADVICE}")
            if key in keys:
                raise ValueError(f"{where}, which another parameter has already; {_ADVICE}")
            keys[key] = None
    foreign = [key for key in set(state) - set(keys) if not isinstance(key, str)]
    if foreign:
        raise ValueError(
            f"state_dict: 'state' has {shown(foreign[0])}, which is in no parameter group's 'params'; remove it, or "
            "load it with the groups that it was saved with"
        )
    return list(keys)


def _saved_dtypes(saved_groups: Sequence[Mapping[str, Any]]) -> dict[Any, torch.dtype | None]:
    """The ``state_dtype`` that each key's group had in the checkpoint. None if it is unknown."""
    return {key: dtype_of(saved.get("state_dtype")) for saved in saved_groups for key in saved["params"]}


@contextmanager
def _naming(param: Param) -> Iterator[None]:
    """Errors begin with the parameter's group in the dictionary."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"state_dict, parameter group {param.group}, {error}") from None


def with_indices(groups: list[Group]) -> Iterator[Group]:
    """The groups with indices instead of parameters, as in a ``state_dict``."""
    first = 0
    for group in groups:
        count = len(group["params"])
        yield {**group, "params": list(range(first, first + count))}
        first += count
