"""Who is updated: a parameter under its name, and the piece of it that is here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import Tensor

from ..core.geometry import Geometry
from ..core.settings import Settings
from .sharding import Piece, local, piece_of


class Label(NamedTuple):
    """How an error names a parameter: its number over all groups, and its name if the optimizer was given names."""

    number: int
    name: str
    parameter: Tensor

    def __str__(self) -> str:
        name = f" ({self.name!r})" if self.name else ""
        return f"parameter {self.number}{name} of shape {tuple(self.parameter.shape)}"


class Member(NamedTuple):
    """A parameter that takes part in a step, its state, its group's number, and which piece of it is here.

    ``weight``, ``gradient`` and ``local_state`` are what is here; ``geometry`` that of the piece, None for dense.
    """

    label: Label
    parameter: Tensor
    state: dict[str, Any]
    group: int
    piece: Piece

    @property
    def geometry(self) -> Geometry | None:
        return self.piece.geometry

    @property
    def weight(self) -> Tensor:
        return local(self.parameter)

    @property
    def gradient(self) -> Tensor:
        assert self.parameter.grad is not None
        return local(self.parameter.grad)

    def local_state(self, name: str) -> Tensor:
        return local(self.state[name])


def labels(groups: list[dict[str, Any]], first_number: int = 0) -> Iterator[tuple[int, Label]]:
    """Every parameter with the number of its group, in order; the first is number ``first_number``."""
    index = first_number
    for number, group in enumerate(groups):
        names = group.get("param_names", [""] * len(group["params"]))
        if len(names) != len(group["params"]):
            raise ValueError(
                f"parameter group {number} has {len(group['params'])} params and {len(names)} param_names; append to "
                "both, or use add_param_group"
            )
        for name, parameter in zip(names, group["params"], strict=True):
            yield number, Label(index, name, parameter)
            index += 1


def geometry_of(parameter: Tensor, settings: Settings) -> Geometry | None:
    """The parameter's low-rank geometry; None for dense AdamW: no rank, fewer than two dimensions, or no elements."""
    if settings.rank is None or parameter.dim() < 2 or parameter.numel() == 0:
        return None
    return Geometry.of(parameter.shape, settings.proj_type)


def find_piece(label: Label, settings: Settings) -> Piece:
    """Which piece of the parameter is here; raises ValueError for a sharding that cannot be updated."""
    try:
        return piece_of(label.parameter, geometry_of(label.parameter, settings))
    except ValueError as error:
        raise ValueError(f"{label} {error}") from None
