"""What the tests of a step from operands share: a weight with its table, operands, and the reference path given G."""

from __future__ import annotations

from typing import NamedTuple

import torch
from kernel_cases import DEVICE, drawn
from torch import nn

from apollo_triton import APOLLOAdamW
from apollo_triton.backends.interface import StepScalars
from apollo_triton.backends.reference import verbs as reference
from apollo_triton.backends.reference.matrices import Batch
from apollo_triton.backends.triton import implicit
from apollo_triton.backends.triton import verbs as fused
from apollo_triton.backends.triton.matrices import Table
from apollo_triton.core.implicit_gradient import ImplicitGradient
from apollo_triton.core.projection import projection_matrix
from apollo_triton.core.scale import scale_of
from apollo_triton.core.scratch import Scratch
from apollo_triton.core.settings import Settings
from apollo_triton.engine.agreement import Agreement
from apollo_triton.engine.caches import Caches
from apollo_triton.engine.plan import Plan
from apollo_triton.int8.weight import Int8Weight
from apollo_triton.params.member import Member, Param

MINI = {"rank": 1, "scale_type": "tensor", "scale": 128.0}


class Layer(NamedTuple):
    weight: torch.Tensor
    settings: Settings
    state: dict
    member: Member
    table: Table


def layer_of(shape, dtype=torch.float32, group_size=0, constructor=None, seed=7, **group):
    """A weight in a group of its own, with new state and the table of a gradient that is never formed."""
    weight = nn.Parameter(drawn(shape, seed, dtype, 0.02))
    if group_size:
        rounds = (constructor or {}).get("stochastic_rounding", False)
        weight = nn.Parameter(Int8Weight.of(weight.detach(), group_size, rounds))
    optimizer = APOLLOAdamW([{"params": [weight], **group}], lr=1e-2, backend="triton", **(constructor or {}))
    settings = Settings.of(optimizer.param_groups[0])
    given = {weight: operands_of(1, shape, dtype)}
    plan = Plan(optimizer.param_groups, optimizer.state, [settings], given, False, Agreement(), Caches())
    (member,), (table,) = plan.members, plan.tables
    return Layer(weight, settings, member.state, member, table)


def operands_of(tokens, shape, dtype=torch.float32, seed=0, cancelling=False):
    """Normals; ``cancelling``: X has a large part that all tokens share, as activations do, and dY adds up to nearly
    nothing: G is then far smaller than its terms."""
    rows, columns = shape
    X, dY = drawn((tokens, columns), 2 * seed + 31), drawn((tokens, rows), 2 * seed + 32, scale=1e-2)
    if cancelling:
        X, dY = X + 30, dY - dY.mean(0)
    return ImplicitGradient(X.to(dtype), dY.to(dtype))


def gradient_of(operands, dtype=torch.float64):
    """G, formed in float64 and rounded once."""
    return (operands.output_gradient.double().T @ operands.inputs.double()).to(dtype)


def by_channel(layer, matrix):
    return matrix if layer.table.keeps_rows else matrix.T


def projection_of(layer, step=1):
    """P of a step, float64."""
    own, geometry = layer.settings, layer.member.geometry
    P = projection_matrix(
        own.seed, own.epoch(step), own.rank, geometry.width, distribution=own.distribution, device=DEVICE
    )
    return P.double()


def step(layer, operands, number=1, limiter_norm="exact"):
    """A step on the kernels."""
    scalars, gradient = StepScalars(number), operands._replace(limiter_norm=limiter_norm)
    sketch = implicit.sketch(layer.table, layer.settings, scalars, gradient)
    factors = fused.rescale(layer.table, layer.settings, scalars, sketch)
    implicit.apply(layer.table, layer.settings, scalars, factors, gradient)


def reference_step(layer, G, number=1):
    """The same on the reference path, of a gradient that is given; layer's table takes no part."""
    settings, scalars = layer.settings, StepScalars(number)
    batch = Batch(layer.member.geometry, scale_of(settings, layer.member.geometry), settings.seed, Scratch())
    with torch.no_grad():
        batch.add(layer.member._replace(given={layer.weight: G}), projection_of(layer, number).float())
        sketch = reference.sketch(batch, settings, scalars)
        reference.apply(batch, settings, scalars, reference.rescale(batch, settings, scalars, sketch))


def copy_of(layer):
    """Another weight and state with the same values, and no table."""
    weight = nn.Parameter(layer.weight.detach().clone())
    state = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in layer.state.items()}
    member = layer.member._replace(param=Param(0, 0, "", weight), state=state)
    return Layer(weight, layer.settings, state, member, None)
