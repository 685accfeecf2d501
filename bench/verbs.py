"""One matrix and the verbs of a step over it, on the engine that its device gets, each with the bytes it moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from apollo_triton import APOLLOAdamW
from apollo_triton.backends.interface import Moment
from apollo_triton.core.settings import Settings

from .contenders import MINI
from .parameter_sets import Shapes, make_weights

VERBS = ("sketch", "rescale", "sketch + rescale", "apply")


class Verb(NamedTuple):
    """``run`` may be called again and again; ``bytes`` are those a run must load and store, each address once."""

    run: Callable[[], object]
    bytes: int


def verbs(shape: tuple[int, int], rank: int, dtype: torch.dtype, device: str, backend: str = "auto") -> dict[str, Verb]:
    """The verbs of APOLLO at ``rank`` (of Mini at rank 1) for a weight of ``shape`` with a gradient, both of ``dtype``.

    >>> sorted(verbs((64, 32), 4, torch.float32, "cpu"))
    ['apply', 'rescale', 'sketch', 'sketch + rescale']
    """
    weight = make_weights(Shapes([shape], []), dtype, device).matrices[0]
    group: dict[str, Any] = MINI if rank == 1 else {"rank": rank}
    optimizer = APOLLOAdamW([{"params": [weight], **group}], lr=1e-5, backend=backend)
    optimizer.step()
    settings = Settings.of(optimizer.param_groups[0])
    if optimizer.backend_for(weight).name == "triton":
        runs, projection = _fused(optimizer, settings)
    else:
        runs, projection = _reference(optimizer, settings)
    assert weight.grad is not None
    channels = max(shape)
    gradient, moments = weight.grad.nbytes, 2 * 4 * channels * rank
    sketched = 4 * channels * (rank + 1)
    factors = 0 if rank == 1 else 4 * channels
    moved = {
        "sketch": gradient + projection + sketched,
        "rescale": sketched + 2 * moments + factors,
        "sketch + rescale": gradient + projection + 2 * moments + factors,
        "apply": gradient + 2 * weight.nbytes + factors,
    }
    return {name: Verb(runs[name], moved[name]) for name in VERBS}


def _fused(optimizer: APOLLOAdamW, settings: Settings) -> tuple[dict[str, Callable[[], object]], int]:
    """The launches, and the bytes of P that a sketch reads."""
    from apollo_triton.backends.triton import verbs as fused

    plan = optimizer._engine._plan
    assert plan is not None
    (table,) = plan.low_rank
    moment = Moment(2, None, None)
    sketch = fused.sketch(table, settings, moment)
    factors = fused.factors(table, settings, moment)
    runs: dict[str, Callable[[], object]] = {
        "sketch": lambda: fused.sketch(table, settings, moment),
        "rescale": lambda: fused.rescale(table, settings, moment, sketch),
        "sketch + rescale": lambda: fused.factors(table, settings, moment),
        "apply": lambda: fused.apply(table, settings, moment, factors),
    }
    return runs, sum(projection.buffer.nbytes for projection in table.projections)


def _reference(optimizer: APOLLOAdamW, settings: Settings) -> tuple[dict[str, Callable[[], object]], int]:
    """The same in plain PyTorch, which reads P in float32."""
    from apollo_triton.backends.reference import verbs as reference
    from apollo_triton.backends.reference.batch import Batch

    plan = optimizer._engine._plan
    assert plan is not None
    (member,) = plan.members
    assert member.geometry is not None
    assert member.parameter.grad is not None
    projection = optimizer._engine._projection(member, settings, 2)
    batch = Batch(member.geometry, settings, 2, member.state["seed"], optimizer._engine._scratch)
    batch.add(member.parameter.detach(), member.parameter.grad, member.state, projection, member.piece)
    sketch = reference.sketch(batch)
    factors = reference.rescale(batch, sketch)
    runs: dict[str, Callable[[], object]] = {
        "sketch": lambda: reference.sketch(batch),
        "rescale": lambda: reference.rescale(batch, sketch),
        "sketch + rescale": lambda: reference.rescale(batch, reference.sketch(batch)),
        "apply": lambda: reference.apply(batch, factors),
    }
    return runs, projection.nbytes
