"""The verbs of a step on one matrix, on the backend of its device, each with the bytes that it moves."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from apollo_triton import APOLLOAdamW
from apollo_triton.backends.interface import StepScalars
from apollo_triton.core.scale import scale_of
from apollo_triton.core.settings import Settings

from .contenders import MINI
from .parameter_sets import Shapes, make_weights

VERBS = ("sketch", "rescale", "sketch + rescale", "apply")


class Verb(NamedTuple):
    """``run`` may be called again and again. ``bytes``: what a run must load and store, each address once."""

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
        runs, projection = _triton(optimizer, settings)
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


def _triton(optimizer: APOLLOAdamW, settings: Settings) -> tuple[dict[str, Callable[[], object]], int]:
    """The verbs as launches, and the bytes of P that a sketch reads."""
    from apollo_triton.backends.triton import verbs as kernels

    plan = optimizer._engine._plan
    assert plan is not None
    (table,), scalars = plan.tables, StepScalars(2)
    sketch = kernels.sketch(table, settings, scalars)
    factors = kernels.sketch_and_rescale(table, settings, scalars)
    runs: dict[str, Callable[[], object]] = {
        "sketch": lambda: kernels.sketch(table, settings, scalars),
        "rescale": lambda: kernels.rescale(table, settings, scalars, sketch),
        "sketch + rescale": lambda: kernels.sketch_and_rescale(table, settings, scalars),
        "apply": lambda: kernels.apply(table, settings, scalars, factors),
    }
    return runs, sum(projection.buffer.nbytes for projection in table.projections)


def _reference(optimizer: APOLLOAdamW, settings: Settings) -> tuple[dict[str, Callable[[], object]], int]:
    """The verbs in plain PyTorch, and the bytes of P, which they read in float32."""
    from apollo_triton.backends.projection import projection_of
    from apollo_triton.backends.reference import verbs as reference
    from apollo_triton.backends.reference.matrices import Batch

    plan = optimizer._engine._plan
    assert plan is not None
    (member,), scalars = plan.members, StepScalars(2)
    assert member.geometry is not None
    projection = projection_of(member, settings, 2, optimizer._caches.projections)
    batch = Batch(member.geometry, scale_of(settings, member.geometry), member.state["seed"], optimizer._caches.scratch)
    with torch.no_grad():
        batch.add(member, projection)
    sketch = reference.sketch(batch, settings, scalars)
    factors = reference.rescale(batch, settings, scalars, sketch)
    runs: dict[str, Callable[[], object]] = {
        "sketch": lambda: reference.sketch(batch, settings, scalars),
        "rescale": lambda: reference.rescale(batch, settings, scalars, sketch),
        "sketch + rescale": lambda: reference.sketch_and_rescale(batch, settings, scalars),
        "apply": torch.no_grad()(lambda: reference.apply(batch, settings, scalars, factors)),
    }
    return runs, projection.nbytes
