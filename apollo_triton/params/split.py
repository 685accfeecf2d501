"""What the constructor's ``rank`` makes of the groups that it is given: each is split, by the names and shapes of its
parameters, into a low-rank group and dense ones.

The rules are those of ``apollo_param_groups``, which has the model and so knows more. Without names every matrix that
can be is low-rank, embeddings and head too.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import count
from typing import Any

from torch import Tensor

from ..core.coverage import Coverage, coverage_of
from ..core.coverage_notes import no_match, notes
from ..core.embeddings import FORM_KEYS, MARK, embedding_keys
from ..core.kinds import MATRIX, weights_of
from ..core.messages import shown, warn
from ..core.param_groups import DenseKeys, chosen_scale, dense_reasons, split_by_kind
from ..core.settings import DENSE_DEFAULTS, LOW_RANK_DEFAULTS, check_value
from ..core.targets import DEFAULT_TARGETS, Targets
from .checks import lost_shape

Group = dict[str, Any]
Named = list[tuple[str, Tensor]]


@dataclass(frozen=True)
class Split:
    """The constructor's arguments about low-rank and dense groups. It splits nothing where ``rank`` is None.

    ``keys`` are the keys of low-rank groups that differ from their defaults, and ``scale`` if it was given. Groups with
    a ``rank`` of their own take them too.
    """

    rank: int | None = None
    target_modules: str | list[str] = DEFAULT_TARGETS
    dense: DenseKeys = field(default_factory=DenseKeys)
    keys: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, rank: Any, target_modules: Any, dense: DenseKeys, **keys: Any) -> Split:
        """From the constructor's arguments. Raises ValueError for a value that is not allowed."""
        if keys["scale"] is None:  # not given: it depends on who makes the groups
            del keys["scale"]
        for name, value in {"rank": rank, **keys}.items():
            check_value(name, value)
        # A scale of 1 counts too: without it the groups that are made have "auto".
        changed = {name: value for name, value in keys.items() if name == "scale" or value != LOW_RANK_DEFAULTS[name]}
        return cls(rank, Targets(None, target_modules).given, dense, changed)

    def checked(self, params: Iterable[Any]) -> list[Any]:
        """What the constructor was given, as a list. Nothing is written to it.

        Raises ValueError for arguments without effect, and if nothing becomes low-rank. Warns of what is most likely
        not meant, and of what cannot be known.
        """
        given = list(params)
        if self.rank is not None and given and not isinstance(given[0], dict):
            given = [{"params": given}]
        given = [_with_list(group) for group in given]
        if self.rank is None:
            self._check_effect(any(isinstance(group, dict) and group.get("rank") is not None for group in given))
            return given
        if given and all(isinstance(group, dict) and "rank" in group for group in given):
            warn(f"rank={self.rank} has no effect: every parameter group has a 'rank' of its own")
        split = [(group, self._coverage(group, named)) for group in given if (named := self._named(group))]
        if self.dense.embeddings is not None and not all(_is_named(group) for group, _ in split):
            self._refuse_nameless(MARK, self.dense.embeddings)
        found = Coverage([weight for _, each in split for weight in each.of_modules])
        for _, each in split:
            found.weights |= each.weights
            found.reasons |= each.reasons
            found.narrow |= each.narrow
            found.missed += each.missed
        nameless = sum(len(each.low_rank) for group, each in split if not _is_named(group))
        if found.low_rank:
            self._advise([group for group, _ in split], found, nameless)
        elif split:
            self._refuse(found)
        return given

    def parts(self, group: Group, taken: Collection[str]) -> tuple[list[Group], dict[Tensor, str]]:
        """The groups that a given one becomes, and why its dense weights are dense. ``taken``: names of other groups.

        A group keeps its own keys, except that those of low-rank groups are left out of dense ones, and the reverse,
        and that ``embeddings=``, which is said of fewer weights, wins over them. A group that it made elsewhere keeps
        its mark, since it keeps the form. Without names nothing is known to be an embedding.
        """
        group = _with_list(group)
        named = self._named(group)
        if not named:
            return [{**self.keys, **group} if group.get("rank") is not None else group], {}
        found = self._coverage(group, named)
        if self.dense.embeddings is not None and not _is_named(group) and any(each.dim() > 1 for _, each in named):
            warn(
                f"embeddings={shown(self.dense.embeddings)} goes by names, and a group is added without names: its "
                "matrices are taken as if the argument was not given; give (name, parameter) pairs"
            )
        shared = {key: value for key, value in group.items() if key not in ("params", "param_names", "name", MARK)}
        made, names = [], {*taken}
        for part in split_by_kind(named, found, self._low_rank_keys(group), self.dense):
            name = f"{group['name']}, {part['name']}" if "name" in group else part["name"]
            foreign = DENSE_DEFAULTS if "rank" in part else LOW_RANK_DEFAULTS
            is_marked = MARK in group and "rank" not in part
            replaced = FORM_KEYS if is_marked and MARK in part else ()
            own = embedding_keys(self.dense.embeddings) if MARK in part else {MARK: group[MARK]} if is_marked else {}
            kept = {key: value for key, value in shared.items() if key not in foreign and key not in replaced}
            part |= {"name": _unlike(name, names)} | kept | own
            names.add(part["name"])
            if not _is_named(group):
                del part["param_names"]
            made.append(part)
        return made, dense_reasons(found)

    def _low_rank_keys(self, group: Group) -> dict[str, Any]:
        """The keys of a given group's low-rank weights: its own, before the constructor's."""
        keys = self.keys | {key: group[key] for key in LOW_RANK_DEFAULTS if key in group}
        return {"rank": self.rank, "scale": chosen_scale(keys.get("proj", LOW_RANK_DEFAULTS["proj"])), **keys}

    def _named(self, group: Any) -> Named:
        """The parameters of a group that is to be split, with their names or numbers. Empty for another group, and for
        one that ``torch.optim`` does not take."""
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
        are_parameters = all(isinstance(each[0], str) and isinstance(each[-1], Tensor) for each in named)
        return named if are_parameters else []

    def _coverage(self, group: Group, named: Named) -> Coverage:
        keys = self._low_rank_keys(group)
        for name, value in keys.items():
            check_value(name, value)
        if _is_named(group):
            weights = weights_of(named)
        elif self.target_modules != DEFAULT_TARGETS:
            self._refuse_nameless("target_modules", self.target_modules)
        else:  # as if each were the weight of a module that is called by its number
            weights = weights_of([(f"{name}.weight", tensor) for name, tensor in named])
            weights = [weight._replace(name=weight.module_name, module_name="") for weight in weights]
        return coverage_of(weights, Targets(None, self.target_modules), keys.pop("rank"), keys)

    @staticmethod
    def _refuse_nameless(name: str, value: Any) -> None:
        """Raise ValueError for an argument that needs names to mean anything."""
        raise ValueError(
            f"{name}={shown(value)} goes by names, and there are parameters without names; give (name, parameter) "
            "pairs, as model.named_parameters() does, or a group with 'rank': None, which is dense"
        )

    def _check_effect(self, has_rank: bool) -> None:
        """Raise ValueError for arguments that have no effect without ``rank``; ``has_rank``: a group has its own."""
        needless: dict[str, Any] = {} if has_rank else {**self.keys}
        if self.target_modules != DEFAULT_TARGETS:
            needless["target_modules"] = self.target_modules
        needless |= {name: each for name, each in vars(self.dense).items() if each is not getattr(DenseKeys(), name)}
        for name, value in needless.items():
            raise ValueError(
                f"{name}={shown(value)} has no effect on groups of your own: leave it out, and set 'lr' and "
                "'weight_decay' in the groups, or let apollo_param_groups(model, ...) make them"
                if has_rank
                else f"{name}={shown(value)} has no effect without a rank; pass rank=... too, or let "
                "apollo_param_groups(model, ...) make the groups"
            )

    def _advise(self, groups: Sequence[Group], found: Coverage, nameless: int) -> None:
        for note in (*notes(Targets(None, self.target_modules), found), *self.dense.notes(found, of_names=True)):
            warn(note)
        if nameless:
            warn(
                f"rank={self.rank} without names: all matrices that can be are low-rank ({nameless}), embeddings and "
                "head too, which APOLLO keeps dense; pass model.named_parameters(), or use "
                "APOLLOAdamW.apollo(model, ...)"
            )
        for name in ("dense_lr", "embedding_lr"):
            if (lr := getattr(self.dense, name)) is not None and all("lr" in group for group in groups):
                warn(f"{name}={lr!r} has no effect: every parameter group has an 'lr' of its own")

    def _refuse(self, found: Coverage) -> None:
        """Raise ValueError since nothing is low-rank; warn in an optimizer of one weight, or if there is no matrix."""
        for weight in found.weights.values():
            if lost := lost_shape(weight.tensor):
                raise ValueError(f"rank={self.rank}: nothing can be low-rank; {weight.name} {lost}")
        targets = Targets(None, self.target_modules)
        if len(found.weights) == 1 and found.narrow:  # some programs make an optimizer for each parameter
            for note in notes(targets, found):
                warn(note)
            return
        if targets.is_choice or _has(found, MATRIX):
            raise ValueError(no_match(targets, self.rank or 1, self.keys, found))
        warn(f"rank={self.rank} has no effect: there is no matrix that could be low-rank, so all is dense AdamW")


def _with_list(group: Any) -> Any:
    """The group with a list of its parameters, since a generator can be read once."""
    if not isinstance(group, dict) or isinstance(group.get("params"), (Tensor, set, type(None))):
        return group
    return group | {"params": list(group["params"])}


def _is_named(group: Group) -> bool:
    items = group["params"]
    return "param_names" in group or (isinstance(items, list) and any(isinstance(each, tuple) for each in items))


def _has(found: Coverage, kind: str) -> bool:
    return any(weight.kind == kind for weight in found.weights.values())


def _unlike(name: str, taken: Collection[str]) -> str:
    """The name, or with a number if another group has it: tools that log by name refuse equal ones."""
    names = (f"{name} {number}" if number > 1 else name for number in count(1))
    return next(each for each in names if each not in taken)
