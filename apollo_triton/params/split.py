"""What the constructor's ``rank`` makes of the groups that it is given: each is split by the names and shapes of its
parameters into a low-rank group and dense ones.

The rules are those of ``apollo_param_groups``, which has the model and so knows more. Without names every matrix that
can be is low-rank, embeddings and head too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from torch import Tensor, nn

from ..core.coverage import Coverage, abridged, coverage, narrowness
from ..core.geometry import Geometry
from ..core.kinds import EMBEDDING, MATRIX
from ..core.messages import shown, warn
from ..core.param_groups import FACTORY_SCALE, DenseKeys, dense_reasons, split_by_kind, warn_of_narrow
from ..core.settings import LOW_RANK_DEFAULTS, check_value
from ..core.targets import DEFAULT_TARGETS, Targets
from .checks import lost_shape

Group = dict[str, Any]
Named = list[tuple[str, Tensor]]


@dataclass(frozen=True)
class Split:
    """The constructor's arguments about low-rank and dense groups. It splits nothing where ``rank`` is None.

    ``keys`` are the keys of low-rank groups that differ from their defaults. Groups with a ``rank`` of their own take
    them too. Raises ValueError for a value that is not allowed.
    """

    rank: int | None = None
    target_modules: str | list[str] = field(default_factory=lambda: _as_given(DEFAULT_TARGETS))
    dense: DenseKeys = field(default_factory=DenseKeys)
    keys: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, rank: Any, target_modules: Any, dense: DenseKeys, **keys: Any) -> Split:
        """From the constructor's arguments; a low-rank key that is None was not given."""
        for name, value in {"rank": rank, **keys}.items():
            if value is not None:
                check_value(name, value)
        changed = {name: each for name, each in keys.items() if each not in (None, LOW_RANK_DEFAULTS[name])}
        split = cls(rank, _as_given(target_modules), dense, changed)
        split.targets(is_named=True)  # raises for what is none
        return split

    def targets(self, is_named: bool) -> Targets:
        return Targets(nn.Module(), self.target_modules if is_named else [""])

    def checked(self, params: Iterable[Any]) -> list[Any]:
        """What the constructor was given, as a list. Nothing is written to it.

        Raises ValueError for arguments without effect, and if nothing becomes low-rank. Warns of what cannot be known.
        """
        given = list(params)
        if not given or not isinstance(given[0], dict):
            given = [{"params": given}] if given and self.rank is not None else given
        given = [_with_list(group) for group in given]
        if self.rank is None:
            self._check_unused(any(isinstance(group, dict) and group.get("rank") is not None for group in given))
            return given
        parts = [(index, group, named) for index, group in enumerate(given) if (named := self._named(group))]
        if not parts:
            if given:
                warn(f"rank={self.rank} has no effect: every parameter group has a 'rank' of its own")
            return given
        for index, group, _ in parts:
            if not _is_named(group) and self.target_modules != _as_given(DEFAULT_TARGETS):
                raise ValueError(
                    f"target_modules={shown(self.target_modules)} goes by names, and the parameters of group {index} "
                    "have none; pass model.named_parameters(), or use APOLLOAdamW.apollo(model, ...)"
                )
        found = [self._coverage(group, named) for _, group, named in parts]
        if any(each.low_rank for each in found):
            self._advise([(group, each) for (_, group, _), each in zip(parts, found, strict=True)])
        else:
            self._refuse(found)
        return given

    def parts(self, group: Group, taken: Collection[str]) -> tuple[list[Group], dict[Tensor, str]]:
        """The groups that a given one becomes, and why its dense weights are dense. ``taken``: names of other groups.

        A group keeps its own keys, except that those of low-rank groups are left out of dense ones.
        """
        group = _with_list(group)
        named = self._named(group)
        if not named:
            return [{**self.keys, **group} if group.get("rank") is not None else group], {}
        found = self._coverage(group, named)
        shared = {key: value for key, value in group.items() if key not in ("params", "param_names", "name")}
        dense_keys = {key: value for key, value in shared.items() if key not in LOW_RANK_DEFAULTS}
        made, names = [], {*taken}
        for part in split_by_kind(named, found, self._low_rank_keys(), self.dense):
            name = f"{group['name']}, {part['name']}" if "name" in group else part["name"]
            part |= {"name": _unlike(name, names)} | (shared if "rank" in part else dense_keys)
            names.add(part["name"])
            if not _is_named(group):
                del part["param_names"]
            made.append(part)
        return made, dense_reasons(found)

    def _low_rank_keys(self) -> dict[str, Any]:
        return {"rank": self.rank, "scale": FACTORY_SCALE, **self.keys}

    def _named(self, group: Any) -> Named:
        """The parameters of a group that is to be split, with their names or made-up ones. Empty for another group, and
        for one that ``torch.optim`` does not take."""
        if self.rank is None or not isinstance(group, dict) or "rank" in group:
            return []
        items = group.get("params")
        items = [items] if isinstance(items, Tensor) else items
        if not isinstance(items, list):
            return []
        names = group.get("param_names", [f"parameter {index}" for index in range(len(items))])
        if len(names) != len(items):
            return []
        named = [item if isinstance(item, tuple) else (name, item) for name, item in zip(names, items, strict=True)]
        if not all(len(each) == 2 and isinstance(each[0], str) and isinstance(each[1], Tensor) for each in named):
            return []
        return named

    def _coverage(self, group: Group, named: Named) -> Coverage:
        keys = self._low_rank_keys() | {key: group[key] for key in LOW_RANK_DEFAULTS if key in group}
        rank = keys.pop("rank")
        for name, value in keys.items():
            check_value(name, value)
        return coverage(named, self.targets(_is_named(group)), rank, keys)

    def _check_unused(self, has_rank: bool) -> None:
        """Raise ValueError for arguments that have no effect without ``rank``."""
        needless: dict[str, Any] = {} if has_rank else {**self.keys}
        if self.target_modules != _as_given(DEFAULT_TARGETS):
            needless["target_modules"] = self.target_modules
        default = DenseKeys()
        needless |= {name: each for name, each in vars(self.dense).items() if each is not getattr(default, name)}
        for name, value in needless.items():
            raise ValueError(
                f"{name}={shown(value)} has no effect without a rank; pass rank=... too, or let "
                "apollo_param_groups(model, ...) make the groups"
            )

    def _advise(self, parts: Sequence[tuple[Group, Coverage]]) -> None:
        """Warn of what stays dense and of what could not be known."""
        for _, found in parts:
            warn_of_narrow(found)
        nameless = [found for group, found in parts if not _is_named(group)]
        if matrices := sum(len(found.low_rank) for found in nameless):
            warn(
                f"rank={self.rank} without names: all matrices that can be are low-rank ({matrices}), embeddings and "
                "head too, which APOLLO keeps dense; pass model.named_parameters(), or use "
                "APOLLOAdamW.apollo(model, ...)"
            )
        targets = self.targets(is_named=True)
        modules = {weight.module_name for _, found in parts for weight in found.weights.values()}
        if len(nameless) < len(parts) and targets.is_choice and not targets.is_lone:
            for entry in targets.entries:
                if not any(targets.entry_matches(entry, name, None) for name in modules):
                    warn(f"target_modules={shown(targets.given)}: {entry!r} matches no module; the others are used")
        kinds = {weight.kind for _, found in parts for weight in found.weights.values()}
        if self.dense.embedding_lr is not None and EMBEDDING not in kinds:
            warn(f"embedding_lr={self.dense.embedding_lr!r} has no effect: no parameter has an embedding's name")
        if all("lr" in group for group, _ in parts):
            for name in ("dense_lr", "embedding_lr"):
                if (lr := getattr(self.dense, name)) is not None:
                    warn(f"{name}={lr!r} has no effect: every parameter group has an 'lr' of its own")

    def _refuse(self, found: Sequence[Coverage]) -> None:
        """Raise ValueError since nothing is low-rank, or warn if there is no matrix, as in one layer's norm."""
        weights = [weight for each in found for weight in each.weights.values()]
        for weight in weights:
            if lost := lost_shape(weight.tensor):
                raise ValueError(f"rank={self.rank}: nothing can be low-rank; {weight.name} {lost}")
        matrices = [weight for weight in weights if weight.kind == MATRIX]
        narrow = [(reason, name) for each in found for reason, names in each.too_narrow.items() for name in names]
        if narrow:
            highest = max(_highest_rank(weight.tensor, self.keys) for weight in matrices)
            advice = (
                f"give a rank of at most {highest}, or a quarter of the hidden size"
                if highest
                else "use torch.optim.AdamW"
            )
            raise ValueError(
                f"rank={self.rank}: all {len(narrow)} matrices that could be low-rank are "
                f"{' or '.join(dict.fromkeys(reason for reason, _ in narrow))}; {advice}"
            )
        if matrices:
            names = abridged(weight.module_name for weight in matrices)
            raise ValueError(
                f"target_modules={shown(self.target_modules)}: no weight matches; give substrings or regular "
                f"expressions of names such as {names}"
            )
        warn(f"rank={self.rank} has no effect: no parameter is a matrix of the model's blocks, so all is dense AdamW")


def _as_given(target_modules: Any) -> Any:
    is_list = isinstance(target_modules, Iterable) and not isinstance(target_modules, str)
    return list(target_modules) if is_list else target_modules


def _with_list(group: Any) -> Any:
    """The group with a list of parameters, which may be a generator, to be read once."""
    if not isinstance(group, dict) or isinstance(group.get("params"), (Tensor, set, type(None))):
        return group
    return group | {"params": list(group["params"])}


def _is_named(group: Group) -> bool:
    items = group["params"]
    return "param_names" in group or (isinstance(items, list) and any(isinstance(each, tuple) for each in items))


def _unlike(name: str, taken: Collection[str]) -> str:
    """The name, or with a number if another group has it: tools that log by name refuse equal ones."""
    names = (f"{name} {number}" if number > 1 else name for number in count(1))
    return next(each for each in names if each not in taken)


def _highest_rank(tensor: Tensor, keys: dict[str, Any]) -> int:
    """The highest rank that a matrix can have; 0 if there is none."""
    proj, proj_type = (keys.get(name, LOW_RANK_DEFAULTS[name]) for name in ("proj", "proj_type"))
    geometry = Geometry.of(tensor.shape, proj_type)
    ranks = range(1, geometry.width + 1)
    return max((rank for rank in ranks if not narrowness(geometry, rank, proj)), default=0)
