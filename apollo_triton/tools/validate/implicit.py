"""``apollo-triton validate`` for steps from X and dY, the two factors of a gradient that is never formed.

The reference backend gets G instead, formed in float64 and rounded to float32 once. The error of a sum is given as a
share of the sum of its terms' magnitudes, because tokens may cancel.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ...backends.interface import StepScalars
from ...backends.reference import verbs as reference
from ...backends.reference.matrices import Batch
from ...backends.triton import implicit
from ...backends.triton import verbs as triton_verbs
from ...core.implicit_gradient import ImplicitGradient
from ...core.philox import Stream
from ...core.scale import scale_of
from ...core.scratch import Scratch
from ...engine.agreement import Agreement
from ...engine.caches import Caches
from ...engine.plan import Plan
from .backend_run import GRADIENT_SCALE, BackendRun, Errors
from .float64 import ELEMENTWISE, NORM, UPDATE_GIVEN_S, Matrix, U, apply

TOKENS = 150  # more than a tile has, and no multiple of its 16, 32 or 64
# The limit of a sum of float32 products over tokens or width. Each product and each partial sum is rounded. In most
# orders that is 1 to 3 U of the terms' magnitudes. S is two such sums, and a norm by the Gram matrix three. Tensor
# cores cut off a unit for every 16 terms: 14 U of a norm at width 4096 (H100).
SUM = 24 * U
# Two bfloat16 parts hold 16 bits of S. Rounding loses 2**-17 of it; Triton's interpreter cuts off 2**-16.
TWO_PARTS = 2.0**-16


def measure(run: BackendRun, errors: Errors) -> None:
    """Measure three steps of a case's weight, each from the run's own state."""
    settings, parameter, keeps_rows = run.settings, run.parameters[0], run.keeps_rows[0]
    for run.t in (1, 2, 3):
        before, gradient = run.snapshot()[0][0], _drawn(run)
        X, dY = gradient.inputs.double(), gradient.output_gradient.double()
        kept, contracted = (dY, X) if keeps_rows else (X, dY)
        G, P = kept.T @ contracted, run.projections(0)[0].double()
        scalars = StepScalars(run.t)
        implicit_gradients: dict[Tensor, ImplicitGradient] = {}
        if run.name == "kernels":
            implicit_gradients[parameter] = gradient
        else:
            run.set_gradient(parameter, (G if keeps_rows else G.T).float().contiguous())
        plan = Plan(
            run.optimizer.param_groups,
            run.optimizer.state,
            [settings],
            implicit_gradients,
            False,
            Agreement(),
            Caches(),
        )
        if not implicit_gradients:
            geometry = run.geometry(parameter)
            batch = Batch(geometry, scale_of(settings, geometry), settings.seed, Scratch())
            batch.add(plan.members[0], P.float())
            sketch = reference.sketch(batch, settings, scalars)
            R, norms = sketch.projected[0], sketch.squared_norms.flatten()
            factors = reference.rescale(batch, settings, scalars, sketch)
            reference.apply(batch, settings, scalars, factors)
            if settings.scale_type == "channel":
                _add_norms(run, errors, "|G_c|^2", norms, kept, contracted)
        else:
            (table,) = plan.tables
            sketch = implicit.sketch(table, settings, scalars, gradient)
            R = sketch.projected
            for name, norms_of in (("|G_c|^2", implicit.tile_norms), ("by K", implicit.gram_norms)):
                _add_norms(run, errors, name, norms_of(table, gradient), kept, contracted)
            factors = triton_verbs.rescale(table, settings, scalars, sketch)
            implicit.apply(table, settings, scalars, factors, gradient)
        s, sums = factors.channel, factors.sums
        terms = kept.abs().T @ (contracted @ P.T).abs()
        limit = TWO_PARTS if gradient.dtype == torch.bfloat16 else SUM
        errors.add(run.name, "R", ((R - G @ P.T).abs() / terms).amax(), limit)
        totals = sums.double().sum(0)
        if s is None:
            factor = (totals[0].sqrt() / (totals[1].sqrt() + 1e-8)).reshape(1, 1)
            u = factor[0, 0] * totals[2].sqrt()
        else:
            factor, u = s.double().reshape(-1, 1), totals[0].sqrt()
        _add_weight(run, errors, before, G, kept.abs().T @ contracted.abs(), factor, u)


def _drawn(run: BackendRun) -> ImplicitGradient:
    """X and dY of a step, the same for both backends."""
    rows, columns = run.parameters[0].shape
    X, dY = run.drawn((TOKENS, columns), 1.0), run.drawn((TOKENS, rows), GRADIENT_SCALE)
    return ImplicitGradient(X.to(run.device, run.gradient_dtype), dY.to(run.device, run.gradient_dtype))


def _add_norms(run: BackendRun, errors: Errors, name: str, found: Tensor, kept: Tensor, contracted: Tensor) -> None:
    terms = (kept.abs() * ((contracted @ contracted.T).abs() @ kept.abs())).sum(0)
    exact = (kept.T @ contracted).square().sum(1)
    errors.add(run.name, name, ((found - exact).abs() / terms).amax(), SUM)


def _add_weight(
    run: BackendRun, errors: Errors, before: Matrix, G: Tensor, terms: Tensor, factor: Tensor, u: Tensor
) -> None:
    """Note the errors of W and u_prev, given the run's own s. ``terms`` are the summed magnitudes of G's terms."""
    settings, parameter, got = run.settings, run.parameters[0], run.snapshot()[0][0]
    W, previous, step = apply(before.W, G, factor, u, before.previous, run.t, settings)
    errors.add(run.name, "u_prev", (got.previous - previous).abs() / previous, NORM)
    decay = float(settings.lr) * settings.weight_decay
    scale = UPDATE_GIVEN_S * step.abs() + (1 + 3 * decay) * (before.W - step).abs() + W.abs()
    scale += SUM / U * terms * step.norm(dim=1, keepdim=True) / G.norm(dim=1, keepdim=True)
    if parameter.dtype == torch.float32:
        errors.add(run.name, "W", ((got.W - W).abs() / scale).amax(), ELEMENTWISE)
    else:
        stored = run.matrices(0, parameter.detach())[0]
        expected = run.rounded(W, parameter.dtype, Stream.WEIGHT, 0, not run.keeps_rows[0])
        errors.add_rounded(run.name, "W", stored, expected, ELEMENTWISE * scale)
