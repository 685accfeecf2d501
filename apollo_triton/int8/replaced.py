"""Parameters that a conversion took out of a model. An optimizer that was made before it still holds them."""

from __future__ import annotations

from torch import Tensor

REPLACED_BY = "_apollo_replaced_by"  # an attribute of the old parameter, so that nothing here keeps it alive
_count = 0


def mark_replaced(parameter: Tensor, conversion: str) -> None:
    """Remember that ``conversion`` ("quantize_model") has put another parameter in the place of this one."""
    global _count
    _count += 1
    setattr(parameter, REPLACED_BY, conversion)


def count_replaced() -> int:
    """How many parameters were ever replaced. While it stays the same nobody has to look for them."""
    return _count


def replaced_by(parameter: object) -> str | None:
    """What has replaced ``parameter`` in its model; None if nothing has."""
    return getattr(parameter, REPLACED_BY, None)
