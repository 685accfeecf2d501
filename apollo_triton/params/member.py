"""What is updated: a parameter with its name and indices, and the part of it that is on this rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..core.dtensors import local
from ..core.geometry import Geometry
from ..core.implicit_gradient import ImplicitGradient
from ..core.settings import Settings
from .sharding import LocalShard, local_shard

Gradient = Tensor | ImplicitGradient
# 8-bit moments' names in the state, by those of float ones.
CODES = {"exp_avg": "exp_avg_q", "exp_avg_sq": "exp_avg_sq_q"}


@dataclass(frozen=True, eq=False)
class Param:
    """A parameter, the index of its group, its index among the parameters of all groups, and its name.

    The name is "" if the optimizer was not given names. ``str(param)`` is what an error calls the parameter:
    "parameter 3 ('mlp.weight') of shape (64, 32)".
    """

    group: int
    index: int
    name: str
    tensor: Tensor

    @property
    def label(self) -> str:
        """The name, or without one the shape: "64 x 32"."""
        return self.name or " x ".join(map(str, self.tensor.shape))

    def __str__(self) -> str:
        name = f" ({self.name!r})" if self.name else ""
        return f"parameter {self.index}{name} of shape {tuple(self.tensor.shape)}"


class Member(NamedTuple):
    """A parameter that takes part in a step: its state, its shard on this rank, and the backend that updates it.

    ``backend`` is "reference", "triton", or "none" for a parameter without elements. ``given`` maps parameters to
    gradients of the current step that are not in ``.grad``; the engine fills it. ``weight``, ``gradient``,
    ``local_state`` and ``moment`` are this rank's shards. ``geometry`` is the shard's geometry, None for dense AdamW.
    """

    param: Param
    state: dict[str, Any]
    shard: LocalShard
    backend: str
    given: Mapping[Tensor, Gradient] = {}

    @property
    def parameter(self) -> Tensor:
        return self.param.tensor

    @property
    def geometry(self) -> Geometry | None:
        return self.shard.geometry

    @property
    def weight(self) -> Tensor:
        return local(self.param.tensor)

    @property
    def gradient(self) -> Gradient:
        gradient = gradient_of(self.param.tensor, self.given)
        assert gradient is not None
        return local(gradient) if isinstance(gradient, Tensor) else gradient

    @property
    def formed_gradient(self) -> Tensor:
        """The gradient of a member whose gradient is a tensor, not an ``ImplicitGradient``."""
        gradient = self.gradient
        assert isinstance(gradient, Tensor)
        return gradient

    @property
    def is_8bit(self) -> bool:
        """Whether its moments are 8-bit."""
        return "exp_avg_q" in self.state

    @property
    def moment_dtype(self) -> torch.dtype:
        return self.moment("exp_avg").dtype

    def local_state(self, name: str) -> Tensor:
        return local(self.state[name])

    def moment(self, name: str) -> Tensor:
        """``exp_avg`` or ``exp_avg_sq``: floats, or the codes of 8-bit ones."""
        return self.local_state(CODES[name] if CODES[name] in self.state else name)


def gradient_of(parameter: Tensor, given: Mapping[Tensor, Gradient]) -> Gradient | None:
    """The gradient for this step: the one in ``given`` if there is one, else ``.grad``."""
    return given.get(parameter, parameter.grad) if given else parameter.grad


class Part(list[dict[str, Any]]):
    """The groups of an optimizer, cut down to ``params``, which come in its order and keep their indices in it.

    A group of which none is among them is left out. ``whole``: all groups, if they were given as a list.
    """

    def __init__(
        self, groups: Sequence[dict[str, Any]] | Mapping[int, dict[str, Any]], params: Sequence[Param]
    ) -> None:
        self.params = params
        self.whole: list[dict[str, Any]] = groups if isinstance(groups, list) else self
        by_group: dict[int, list[Param]] = {}
        for param in params:
            by_group.setdefault(param.group, []).append(param)
        self.group_indices = [*by_group]
        super().__init__(
            {**groups[index], "params": [param.tensor for param in own], "param_names": [param.name for param in own]}
            for index, own in by_group.items()
        )


def group_indices(groups: list[dict[str, Any]]) -> Sequence[int]:
    """The indices of the groups in their optimizer."""
    return groups.group_indices if isinstance(groups, Part) else range(len(groups))


def params_of(groups: list[dict[str, Any]]) -> Iterator[Param]:
    """Every parameter of ``groups`` in order, with its indices in the optimizer.

    Raises ValueError for a group with more or fewer names than parameters.
    """
    if isinstance(groups, Part):
        yield from groups.params
        return
    index = 0
    for group_index, group in enumerate(groups):
        names = group.get("param_names", [""] * len(group["params"]))
        if len(names) != len(group["params"]):
            raise ValueError(
                f"parameter group {group_index} has {len(group['params'])} params and {len(names)} param_names; append "
                "to both, or use add_param_group"
            )
        for name, parameter in zip(names, group["params"], strict=True):
            yield Param(group_index, index, name, parameter)
            index += 1


def geometry_of(parameter: Tensor, settings: Settings) -> Geometry | None:
    """The parameter's low-rank geometry; None for dense AdamW: no rank, fewer than two dimensions, or no elements."""
    if settings.rank is None or parameter.dim() < 2 or parameter.numel() == 0:
        return None
    return Geometry.of(parameter.shape, settings.proj_type)


def has_row_moments(parameter: Tensor, settings: Settings) -> bool:
    """Whether a parameter has one second moment a row: dense, of two dimensions or more, of two rows or more, and with
    elements. A table of positions ``[1, positions, width]`` would have one in all."""
    is_dense = settings.rank is None and parameter.dim() > 1 and parameter.numel() > 0
    return is_dense and settings.second_moment == "row" and parameter.shape[0] > 1


def find_shard(param: Param, settings: Settings) -> LocalShard:
    """The parameter's shard on this rank. Raises ValueError for a sharding that cannot be updated."""
    try:
        return local_shard(param.tensor, geometry_of(param.tensor, settings))
    except ValueError as error:
        raise ValueError(f"{param} {error}") from None
