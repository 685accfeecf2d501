"""Runs a case of ``apollo-triton validate``: every stage of both backends is compared with float64.

Every step is compared with a float64 step from the same run's weights and state, so that errors neither hide in earlier
ones nor grow from them. Float32 trajectories are also compared as a whole, with a float64 run that is left to itself.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...backends.interface import StepScalars
from ...backends.reference import verbs as reference
from ...backends.reference.matrices import Batch
from ...backends.triton import projections
from ...backends.triton import verbs as triton_verbs
from ...backends.triton.matrices import Table
from ...backends.triton.projections import projection_kind
from ...core.philox import Stream
from ...core.projection import TENSOR_CORE_RANK
from ...core.scale import scale_of
from ...core.scratch import Scratch
from ...engine.agreement import Agreement
from ...engine.caches import Caches
from ...engine.plan import Plan
from ...kernels.projected import GAUSSIAN
from . import implicit
from .backend_run import BACKENDS, BackendRun, Errors
from .cases import GAP, Case
from .float64 import (
    CUT_OFF,
    ELEMENTWISE,
    EXACTLY,
    FACTOR,
    NORM,
    NORMAL,
    ORTHONORMAL,
    SCALED,
    SQUARES,
    UPDATE,
    UPDATE_GIVEN_S,
    Matrix,
    Step,
    U,
    apply,
    dense_step,
    low_rank_step,
    projected,
    rescale,
    size_of,
)


def measured(case: Case, device: torch.device, seed: int) -> Errors:
    """The errors of a case, run by both backends."""
    errors = Errors()
    kinds = {"projection": _projection, "verbs": _verbs, "steps": _steps, "implicit": implicit.measure}
    for name in BACKENDS:
        with torch.no_grad():
            kinds[case.kind](BackendRun(case, name, device, seed), errors)
    return errors


def _largest(error: Tensor, scale: Tensor) -> Tensor:
    """The largest |error| / scale, with 0 / 0 = 0."""
    return _ratio(error.abs(), scale).amax()


def _ratio(values: Tensor, by: Tensor) -> Tensor:
    return torch.where(values == 0, 0.0, values / by)


def _steps(run: BackendRun, errors: Errors) -> None:
    """Measure whole steps of the optimizer."""
    weight_dtype, state_dtype = run.parameters[0].dtype, run.settings.state_dtype
    # 16-bit trajectories drift apart by units in the last place, so only float32 ones are compared as a whole.
    free = run.snapshot() if weight_dtype == state_dtype == torch.float32 else None
    budgets = [[0.0] * len(run.matrices(i, parameter)) for i, parameter in enumerate(run.parameters)]
    skipped = 0
    for _ in range(run.case.steps):
        run.new_gradients()
        before = run.snapshot()
        run.optimizer.step()
        after, clip = run.snapshot(), _clip(run)
        for index, parameter in enumerate(run.parameters):
            assert parameter.grad is not None
            low_rank = run.is_low_rank(index)
            projections = run.projections(index) if low_rank else [None]
            gradients = run.matrices(index, parameter.grad.double() * clip)
            for position, (G, P) in enumerate(zip(gradients, projections, strict=True)):
                skipped += not G.isfinite().all()

                def exact_step(start: Matrix, G: Tensor = G, P: Tensor | None = P) -> Step:
                    if P is None:
                        return dense_step(start, G, run.t, run.settings)
                    return low_rank_step(start, G, P.double(), run.t, run.settings)

                known, got = before[index][position], after[index][position]
                exact = exact_step(known)
                budget = _weight_errors(run, errors, index, position, known, got, exact)
                _moment_errors(run, errors, index, position, G, P, got, exact)
                if P is not None and run.settings.proj == "svd" and run.t % GAP == 1 and bool(G.isfinite().all()):
                    _svd_errors(run, errors, G, P.double())
                if free is not None:
                    free[index][position] = undisturbed = exact_step(free[index][position]).after
                    budgets[index][position] += budget
                    if run.t == run.case.steps:
                        error = (got.W - undisturbed.W).norm() * UPDATE / budgets[index][position]
                        errors.add(run.name, "W at end", error, _update_limit(run, index))
    errors.add(run.name, "skipped", abs(int(run.optimizer.skipped_updates) - skipped), EXACTLY)


def _clip(run: BackendRun) -> float:
    """The factor by which all gradients are clipped, as in ``torch.nn.utils.clip_grad_norm_``."""
    limit = run.settings.max_grad_norm
    if limit is None:
        return 1.0
    norms = [parameter.grad.double().norm() for parameter in run.parameters if parameter.grad is not None]
    return min(1.0, limit / (float(torch.stack([norm for norm in norms if norm.isfinite()]).norm()) + 1e-6))


def _update_limit(run: BackendRun, index: int) -> float:
    """Limit of an update. u has half the error of a sum of squares."""
    return UPDATE + _clip_error(run) + _cut_off(run, index) / 2


def _clip_error(run: BackendRun) -> float:
    """What clipping adds to an error. It multiplies G twice, in s and in the update, by a factor that has half the
    error of a sum of squares: that of any matrix's sketch."""
    if run.settings.max_grad_norm is None:
        return 0.0
    return SQUARES + max(_cut_off(run, index) for index in range(len(run.parameters)))


def _cut_off(run: BackendRun, index: int) -> float:
    """The share of |G_c|^2 that tensor cores may cut off. They are used for half precision, from rank 2 on."""
    rank = run.settings.rank or 0
    if run.name != "kernels" or run.gradient_dtype == torch.float32 or rank < TENSOR_CORE_RANK:
        return 0.0
    return run.geometry(run.parameters[index]).width * CUT_OFF


def _weight_errors(
    run: BackendRun, errors: Errors, index: int, position: int, before: Matrix, got: Matrix, exact: Step
) -> float:
    """Note the errors of W and u_prev. Returns the error that W may have: UPDATE of the update and W's own
    roundings."""
    spread = exact.spread.norm()
    allowed = UPDATE * exact.update.norm() + spread
    limit, dtype, low_rank = _update_limit(run, index), run.parameters[index].dtype, run.is_low_rank(index)
    moves = bool((exact.update != 0).any())
    budget = allowed + 2 * U * before.W.norm() if moves else 0 * allowed  # W is rounded twice, once for the decay
    if dtype == torch.float32:
        errors.add(run.name, "W", _largest((got.W - exact.after.W).norm() * UPDATE, budget), limit)
    else:
        stored = run.matrices(index, run.parameters[index].detach())[position]
        transposed = low_rank and not run.keeps_rows[index]
        expected = run.rounded(exact.after.W, dtype, Stream.WEIGHT, position, transposed)
        relative = (
            _ratio(exact.spread, exact.update.norm(dim=1))[:, None] if low_rank else torch.zeros_like(exact.update)
        )
        # Errors are usually a tenth of the spread. Up to a spread of 1e-5, STRADDLING has room for them.
        excused = exact.update.abs() * (relative / 5 - UPDATE).clamp(min=0)
        # In the worst channel, where W and its update cancel, the error is six times that of most channels.
        slack = exact.update.abs() * (limit + 6 * relative) + 2 * U * before.W.abs() * moves
        errors.add_rounded(run.name, "W", stored, expected, slack, excused)
    if low_rank and not run.settings.disable_nl:
        scale = exact.after.previous * (allowed / exact.update.norm() if moves else 0.0)
        errors.add(run.name, "u_prev", _largest((got.previous - exact.after.previous) * UPDATE, scale), limit)
    return float(budget)


def _moment_errors(
    run: BackendRun, errors: Errors, index: int, position: int, G: Tensor, P: Tensor | None, got: Matrix, exact: Step
) -> None:
    """Note the errors of M and V: from R's rounding, as far as it enters them, and from their own roundings."""
    state = run.optimizer.state[run.parameters[index]]
    keep1, keep2 = (1 - beta for beta in run.settings.betas)
    G = torch.nan_to_num(G, nan=0.0, posinf=0.0, neginf=0.0)
    if P is None:  # three roundings of each operand
        R, dR, limit = G, G.abs(), 3 * U
    else:
        R, dR, limit = (
            G @ P.double().T,
            G.norm(dim=1, keepdim=True) * size_of(P.double(), run.settings),
            projected(G.shape[1]),
        )
    limit += _clip_error(run)
    squares, limit_of_V = keep2 * (2 * R.abs() + limit * dR) * dR, limit
    if P is None and exact.after.V.shape != G.shape:  # a mean of each row's
        squares, limit_of_V = squares.flatten(1).mean(1).reshape(exact.after.V.shape), limit + SQUARES
    scales = keep1 * dR + exact.after.M.abs(), squares + exact.after.V
    for name, key, found, true, scale, limit_of_it, stream in (
        ("M", "exp_avg", got.M, exact.after.M, scales[0], limit, Stream.EXP_AVG),
        ("V", "exp_avg_sq", got.V, exact.after.V, scales[1], limit_of_V, Stream.EXP_AVG_SQ),
    ):
        if state[key].dtype == torch.float32:
            errors.add(run.name, name, _largest(found - true, scale), limit_of_it)
        else:
            expected = run.rounded(true, torch.bfloat16, stream, position, transposed=False)
            errors.add_rounded(run.name, name, found.to(torch.bfloat16), expected, limit_of_it * scale)


def _svd_errors(run: BackendRun, errors: Errors, G: Tensor, P: Tensor) -> None:
    """Note how far P's rows are from orthonormal, and their energy from the most that so many directions can have."""
    away = (P @ P.T - torch.eye(len(P), dtype=P.dtype, device=P.device)).abs().amax()
    most = torch.linalg.svdvals(G)[: len(P)].square().sum()
    errors.add(run.name, "P", torch.maximum(away, ((G @ P.T).square().sum() / most - 1).abs()), ORTHONORMAL)


def _verbs(run: BackendRun, errors: Errors) -> None:
    """Measure the last of a few steps verb by verb. Each verb is compared with float64's, given the result of the verb
    before it, so that only its own errors show."""
    for _ in range(run.case.steps - 1):
        run.new_gradients()
        run.optimizer.step()
    run.new_gradients()
    gradient, before = run.parameters[0].grad, run.snapshot()[0]
    assert gradient is not None
    gradients, projections = run.matrices(0, gradient.double()), run.projections(0)
    stages = _kernel_stages(run) if run.name == "kernels" else _reference_stages(run)
    made = zip(*(stage.double().chunk(len(before)) for stage in stages), strict=True)
    for position, (known, got, G, P, (R, squared_G, s, sums)) in enumerate(
        zip(before, run.snapshot()[0], gradients, projections, made, strict=True)
    ):
        _sketch_errors(run, errors, G, P.double(), R, squared_G)
        s, u = _rescale_errors(run, errors, position, known, got, R, squared_G, s, sums.flatten())
        _apply_errors(run, errors, position, known, got, G, s, u)


def _sketch_errors(run: BackendRun, errors: Errors, G: Tensor, P: Tensor, R: Tensor, squared_G: Tensor) -> None:
    norms = G.norm(dim=1)
    errors.add(
        run.name, "R", _largest((R - G @ P.T).norm(dim=1), norms * size_of(P, run.settings)), projected(G.shape[1])
    )
    true, limit = norms.square(), SQUARES + _cut_off(run, 0)
    errors.add(run.name, "|G|^2", _largest(squared_G.sum() - true.sum(), true.sum()), limit)
    if run.settings.scale_type == "channel":
        errors.add(run.name, "|G_c|^2", _largest(squared_G - true, true), limit)


def _rescale_errors(
    run: BackendRun,
    errors: Errors,
    position: int,
    before: Matrix,
    got: Matrix,
    R: Tensor,
    squared_G: Tensor,
    s: Tensor,
    sums: Tensor,
) -> tuple[Tensor, Tensor]:
    """Note errors of the moments, s and the sums, given R. Returns the run's s ``[channels or 1, 1]`` and u."""
    settings, M, V, R2 = run.settings, before.M, before.V, R.square()
    keep1, keep2 = (1 - beta for beta in settings.betas)
    exact = rescale(R, M, V, settings)
    scales = 3 * keep1 * (R - M).abs() + exact.M.abs(), 3 * keep2 * (R2 - V).abs() + keep2 * R2 + exact.V
    for name, found, true, scale, stream in (
        ("M", got.M, exact.M, scales[0], Stream.EXP_AVG),
        ("V", got.V, exact.V, scales[1], Stream.EXP_AVG_SQ),
    ):
        if settings.state_dtype == torch.float32:
            errors.add(run.name, name, _largest(found - true, scale), ELEMENTWISE)
        else:
            expected = run.rounded(true, settings.state_dtype, stream, position, transposed=False)
            errors.add_rounded(run.name, name, found.to(settings.state_dtype), expected, ELEMENTWISE * scale)
    # |N|^2 if nothing cancelled in M.
    most = ((settings.betas[0] * M.abs() + keep1 * R.abs()) / (exact.V.sqrt() + settings.eps)).square()
    if settings.scale_type == "tensor":
        true = torch.stack([exact.N.square().sum(), R2.sum(), squared_G.sum()])
        errors.add(run.name, "sums", _largest(sums - true, torch.stack([most.sum(), true[1], true[2]])), SQUARES)
        s = (sums[0].sqrt() / (sums[1].sqrt() + 1e-8)).reshape(1, 1)
        return s, s[0, 0] * sums[2].sqrt()
    scale = most.sum(1).sqrt() / (R2.sum(1).sqrt() + 1e-8)
    errors.add(run.name, "s_c", _largest(s - exact.s[:, 0], scale), FACTOR)
    true = (s.square() * squared_G).sum()
    errors.add(run.name, "sums", _largest(sums[0] - true, true), SQUARES)
    return s[:, None], sums[0].sqrt()


def _apply_errors(
    run: BackendRun, errors: Errors, position: int, before: Matrix, got: Matrix, G: Tensor, s: Tensor, u: Tensor
) -> None:
    settings, parameter = run.settings, run.parameters[0]
    W, previous, update = apply(before.W, G, s, u, before.previous, run.t, settings)
    if not settings.disable_nl:
        errors.add(run.name, "u_prev", _largest(got.previous - previous, previous), NORM)
    # W is rounded when the update is subtracted, and in the product and the difference of the decay.
    decay = float(settings.lr) * settings.weight_decay
    scale = UPDATE_GIVEN_S * update.abs() + (1 + 3 * decay) * (before.W - update).abs() + (W.abs() if decay else 0)
    if parameter.dtype == torch.float32:
        errors.add(run.name, "W", _largest(got.W - W, scale), ELEMENTWISE)
    else:
        stored = run.matrices(0, parameter.detach())[position]
        expected = run.rounded(W, parameter.dtype, Stream.WEIGHT, position, not run.keeps_rows[0])
        errors.add_rounded(run.name, "W", stored, expected, ELEMENTWISE * scale)


def _plan(run: BackendRun) -> Plan:
    """The engine's plan for a step of the case. Making it makes the state if there is none."""
    groups, states = run.optimizer.param_groups, run.optimizer.state
    return Plan(groups, states, [run.settings], {}, False, Agreement(), Caches())


def _table(run: BackendRun) -> Table:
    """The kernels' table for all of a case's matrices."""
    table = _plan(run).tables[0]
    if run.settings.proj == "svd":
        table.set_projections(run.projections(0))
    return table


def _kernel_stages(run: BackendRun) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """R, |G_c|^2, s_c and the sums of all matrices, one after another, from the kernels. Updates W."""
    table, settings, scalars = _table(run), run.settings, StepScalars(run.t)
    projections.refresh(table, settings, scalars)
    sketch = triton_verbs.sketch(table, settings, scalars)
    factors = triton_verbs.rescale(table, settings, scalars, sketch)
    sums = torch.zeros(table.matrices, factors.sums.shape[1], dtype=torch.float64, device=run.device)
    sums.index_add_(0, table.channel_programs, factors.sums.double())
    triton_verbs.apply(table, settings, scalars, factors)
    return sketch.projected, sketch.squared_norms, sums if factors.channel is None else factors.channel, sums


def _batch(run: BackendRun) -> Batch:
    """The reference backend's batch of all of a case's matrices."""
    parameter = run.parameters[0]
    geometry = run.geometry(parameter)
    batch = Batch(geometry, scale_of(run.settings, geometry), run.settings.seed, Scratch())
    projections = run.projections(0)
    batch.add(_plan(run).members[0], torch.stack(projections) if len(projections) > 1 else projections[0])
    return batch


def _reference_stages(run: BackendRun) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same from the reference backend. Updates W."""
    batch, settings, scalars = _batch(run), run.settings, StepScalars(run.t)
    sketch = reference.sketch(batch, settings, scalars)
    factors = reference.rescale(batch, settings, scalars, sketch)
    reference.apply(batch, settings, scalars, factors)
    s = factors.sums if factors.channel is None else factors.channel
    return sketch.projected.flatten(0, 1), sketch.squared_norms.flatten(), s.flatten(), factors.sums


def _projection(run: BackendRun, errors: Errors) -> None:
    """Measure P at the first two epochs: as ``sketch`` uses it, whose R of an identity matrix is P, and in memory."""
    settings, parameter = run.settings, run.parameters[0]
    assert settings.rank is not None
    parameter.grad = torch.eye(len(parameter), device=run.device, dtype=parameter.dtype)
    run.optimizer.step()  # makes the state
    for run.t in (1, GAP + 1):
        P = run.projections(0)[0]
        if run.name == "kernels":
            table, scalars = _table(run), StepScalars(run.t)
            projections.refresh(table, settings, scalars)
            R = triton_verbs.sketch(table, settings, scalars).projected
            for projection in table.projections:
                expected = torch.zeros_like(projection.buffer, dtype=torch.float32)
                expected[:, : P.shape[1]] = P
                stored = (projection.buffer.double() / math.sqrt(settings.rank)).float()
                errors.add(run.name, "P", (stored - expected).abs().amax(), EXACTLY)
        else:
            R = reference.sketch(_batch(run), settings, StepScalars(run.t)).projected[0]
        normals = P.double() * math.sqrt(settings.rank)
        error = R.T.double() * math.sqrt(settings.rank) - normals
        limit = NORMAL if projection_kind(settings) is GAUSSIAN else SCALED
        errors.add(run.name, "R", _largest(error, normals.abs().clamp(min=1)), limit)
