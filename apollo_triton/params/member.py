"""Who is updated: a parameter under its name, and what of it is on this rank."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from ..core.geometry import Geometry
from ..core.implicit_gradient import ImplicitGradient
from ..core.settings import Settings
from .sharding import LocalShard, local, local_shard

Gradient = Tensor | ImplicitGradient


@dataclass(frozen=True, eq=False)
class Param:
    """A parameter, the index of its group, its own index over all groups, and its name if the optimizer was given
    names.

    As a string it is what an error calls the parameter.
    """

    group: int
    index: int
    name: str
    tensor: Tensor

    def __str__(self) -> str:
        name = f" ({self.name!r})" if self.name else ""
        return f"parameter {self.index}{name} of shape {tuple(self.tensor.shape)}"


class Member(NamedTuple):
    """A parameter that takes part in a step: its state, its shard on this rank, and the backend that updates it.

    ``backend`` is "reference", "triton", or "none" for a parameter without elements. ``given`` has the gradients of the
    current step that are not in ``.grad``, by parameter; the engine fills it. ``weight``, ``gradient`` and
    ``local_state`` are what is on this rank. ``geometry`` is that of the shard, None for dense AdamW.
    """

    param: Param
    state: dict[str, Any]
    shard: LocalShard
    backend: str
    given: Mapping[Tensor, ImplicitGradient] = {}

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
        """The gradient of a member that has one as a tensor."""
        gradient = self.gradient
        assert isinstance(gradient, Tensor)
        return gradient

    def local_state(self, name: str) -> Tensor:
        return local(self.state[name])


def gradient_of(parameter: Tensor, given: Mapping[Tensor, ImplicitGradient]) -> Gradient | None:
    """The gradient of a step: the given one, else ``.grad``."""
    return given.get(parameter, parameter.grad) if given else parameter.grad


def params_of(groups: list[dict[str, Any]], first_group: int = 0, first_index: int = 0) -> Iterator[Param]:
    """Every parameter in order. ``first_group`` and ``first_index`` are the indices of the first one.

    Raises ValueError for a group with more or fewer names than parameters.
    """
    index = first_index
    for group_index, group in enumerate(groups, first_group):
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


def find_shard(param: Param, settings: Settings) -> LocalShard:
    """What of the parameter is on this rank; raises ValueError for a sharding that cannot be updated."""
    try:
        return local_shard(param.tensor, geometry_of(param.tensor, settings))
    except ValueError as error:
        raise ValueError(f"{param} {error}") from None
