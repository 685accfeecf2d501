"""A model of many layers that are alike, followed with few: what each further layer adds is the same.

With layers that are alike, what is alive at a moment of a step grows by the same bytes with each layer, and from a layer
to the next one. So the peak is near the first or the last layers of a phase. It is found there in models of 6 and of 7
layers, moment by moment, and extended. A model of 8 layers checks that all of it holds, byte by byte. If it does not,
there is no short cut.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import nn

from .live_step import LiveStep, Result

FEW = 6, 7, 8  # a sharded layer prefetches its neighbour, so the outermost two of either end are special


def like_layers(model: Any) -> nn.ModuleList | None:
    """The list of the model's decoder layers if they are alike, else None."""
    kinds = {*(model._no_split_modules or ())}
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and module and {type(layer).__name__ for layer in module} <= kinds:
            # Of models whose layers differ by their configuration, as in attention, it says how.
            differs = len({*(getattr(model.config, "layer_types", None) or ())}) > 1
            shapes = {tuple((name, p.shape, type(p)) for name, p in layer.named_parameters()) for layer in module}
            others = [layer for layer in model.modules() if type(layer).__name__ in kinds]
            return module if len(shapes) == 1 and not differs and len(others) == len(module) else None
    return None


def extended(few: Sequence[LiveStep], layers: int) -> Result | None:
    """What a model of ``layers`` layers holds, by those of ``FEW``; None if it cannot be said."""
    first, second, third = few
    counts = [_extended(*(dict(getattr(live, name)) for live in few), layers) for name in ("exchanges", "received")]
    candidates: list[dict[str, int]] = []
    checked = 0
    for name in first.phases:
        a, b, c = (live.phases[name] for live in few)
        if len(b) - len(a) != len(c) - len(b) or len(b) < len(a):
            return None
        half = len(a) // 2
        places = [*range(half), *range(half - len(a), 0)]
        for at in places:
            parts = _extended(a[at], b[at], c[at], layers)
            if parts is None:
                return None
            candidates.append(parts)
            checked = max(checked, sum(c[at].values()))
    if any(each is None for each in counts) or checked != sum(third.result().parts.values()):
        return None
    exchanges, received = counts
    return Result(max(candidates, key=lambda parts: sum(parts.values())), exchanges or {}, received or {})


def _extended(first: dict[str, int], second: dict[str, int], third: dict[str, int], layers: int) -> dict[str, int] | None:
    """Numbers of ``FEW`` layers for ``layers``; None if each layer does not add the same."""
    result = {}
    for name in {*first, *second, *third}:
        a, b, c = (each.get(name, 0) for each in (first, second, third))
        if c - b != b - a:
            return None
        result[name] = a + (b - a) * (layers - FEW[0])
    return result
