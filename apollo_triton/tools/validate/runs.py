"""The runs behind ``apollo-triton validate``: every stage of both paths measured against float64.

Every step is compared with a float64 one from that path's own weights and state, so that errors neither hide in earlier
ones nor grow from them; float32 trajectories are compared as a whole besides, with a float64 run left to itself.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from ...backends.interface import Moment
from ...backends.reference import verbs as reference
from ...backends.reference.batch import Batch
from ...backends.triton import projections
from ...backends.triton import verbs as fused
from ...backends.triton.projections import projection_kind
from ...backends.triton.table import Table
from ...core.philox import Stream
from ...core.projection import TENSOR_CORE_RANK
from ...core.scratch import Scratch
from ...engine.agreement import Agreement
from ...engine.plan import Plan
from ...kernels.sketch import GAUSSIAN
from ...params.sharding import piece_of
from . import operands as validate_operands
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
from .paths import PATHS, Errors, Path


def measured(case: Case, device: torch.device, seed: int) -> Errors:
    """Run a case on both paths."""
    errors = Errors()
    kinds = {"projection": _projection, "verbs": _verbs, "steps": _steps, "operands": validate_operands.run}
    for name in PATHS:
        with torch.no_grad():
            kinds[case.kind](Path(case, name, device, seed), errors)
    return errors


def _largest(error: Tensor, scale: Tensor) -> Tensor:
    """The largest |error| / scale, where 0 / 0 is 0."""
    return _ratio(error.abs(), scale).amax()


def _ratio(values: Tensor, by: Tensor) -> Tensor:
    return torch.where(values == 0, 0.0, values / by)


def _steps(path: Path, errors: Errors) -> None:
    """Whole steps by the optimizer itself."""
    weight_dtype, state_dtype = path.parameters[0].dtype, path.settings.state_dtype
    # 16-bit numbers go apart by their units in the last place, so only float32 trajectories can be left to themselves.
    free = path.snapshot() if weight_dtype == state_dtype == torch.float32 else None
    budgets = [[0.0] * len(path.matrices(i, parameter)) for i, parameter in enumerate(path.parameters)]
    skipped = 0
    for _ in range(path.case.steps):
        path.new_gradients()
        before = path.snapshot()
        path.optimizer.step()
        after, clip = path.snapshot(), _clip(path)
        for index, parameter in enumerate(path.parameters):
            assert parameter.grad is not None
            low_rank = path.is_low_rank(index)
            projections = path.projections(index) if low_rank else [None]
            gradients = path.matrices(index, parameter.grad.double() * clip)
            for position, (G, P) in enumerate(zip(gradients, projections, strict=True)):
                skipped += not G.isfinite().all()

                def run(start: Matrix, G: Tensor = G, P: Tensor | None = P) -> Step:
                    if P is None:
                        return dense_step(start, G, path.t, path.settings)
                    return low_rank_step(start, G, P.double(), path.t, path.settings)

                known, got = before[index][position], after[index][position]
                exact = run(known)
                budget = _weight_errors(path, errors, index, position, known, got, exact)
                _moment_errors(path, errors, index, position, G, P, got, exact)
                if P is not None and path.settings.proj == "svd" and path.t % GAP == 1 and bool(G.isfinite().all()):
                    _svd_errors(path, errors, G, P.double())
                if free is not None:
                    free[index][position] = mine = run(free[index][position]).after
                    budgets[index][position] += budget
                    if path.t == path.case.steps:
                        error = (got.W - mine.W).norm() * UPDATE / budgets[index][position]
                        errors.add(path.name, "W at end", error, _update_limit(path, index))
    errors.add(path.name, "skipped", abs(int(path.optimizer.skipped_updates) - skipped), EXACTLY)


def _clip(path: Path) -> float:
    """What all gradients are multiplied by: as ``torch.nn.utils.clip_grad_norm_``."""
    limit = path.settings.max_grad_norm
    if limit is None:
        return 1.0
    norms = [parameter.grad.double().norm() for parameter in path.parameters if parameter.grad is not None]
    return min(1.0, limit / (float(torch.stack([norm for norm in norms if norm.isfinite()]).norm()) + 1e-6))


def _update_limit(path: Path, index: int) -> float:
    """Clipping multiplies G twice, in s and in the update, by what has half the error of a sum of squares; so has u."""
    return UPDATE + (SQUARES if path.settings.max_grad_norm is not None else 0.0) + _cut_off(path, index) / 2


def _cut_off(path: Path, index: int) -> float:
    """What tensor cores may cut off |G_c|^2: of half precision, from the rank on that has them."""
    rank = path.settings.rank or 0
    if path.name != "kernels" or path.gradient_dtype == torch.float32 or rank < TENSOR_CORE_RANK:
        return 0.0
    return path.geometry(path.parameters[index]).width * CUT_OFF


def _weight_errors(
    path: Path, errors: Errors, index: int, position: int, before: Matrix, got: Matrix, exact: Step
) -> float:
    """Note the errors of W and u_prev; returns UPDATE of the update, and all else that float32 may round."""
    spread = exact.spread.norm()
    allowed = UPDATE * exact.update.norm() + spread
    limit, dtype, low_rank = _update_limit(path, index), path.parameters[index].dtype, path.is_low_rank(index)
    moves = bool((exact.update != 0).any())
    budget = allowed + 2 * U * before.W.norm() if moves else 0 * allowed  # W is rounded twice, once for the decay
    if dtype == torch.float32:
        errors.add(path.name, "W", _largest((got.W - exact.after.W).norm() * UPDATE, budget), limit)
    else:
        stored = path.matrices(index, path.parameters[index].detach())[position]
        transposed = low_rank and not path.keeps_rows[index]
        expected = path.rounded(exact.after.W, dtype, Stream.WEIGHT, position, transposed)
        relative = (
            _ratio(exact.spread, exact.update.norm(dim=1))[:, None] if low_rank else torch.zeros_like(exact.update)
        )
        # Errors are a tenth of the spread as a rule: up to a spread of 1e-5, STRADDLING has room for them.
        apt = exact.update.abs() * (relative / 5 - UPDATE).clamp(min=0)
        # The worst of all channels, where W and its update cancel, is six times as far off as most.
        slack = exact.update.abs() * (limit + 6 * relative) + 2 * U * before.W.abs() * moves
        errors.add_rounded(path.name, "W", stored, expected, slack, apt)
    if low_rank and not path.settings.disable_nl:
        scale = exact.after.previous * (allowed / exact.update.norm() if moves else 0.0)
        errors.add(path.name, "u_prev", _largest((got.previous - exact.after.previous) * UPDATE, scale), limit)
    return float(budget)


def _moment_errors(
    path: Path, errors: Errors, index: int, position: int, G: Tensor, P: Tensor | None, got: Matrix, exact: Step
) -> None:
    """Note the errors of M and V: of R's rounding, as far as it enters them, and of their own."""
    state = path.optimizer.state[path.parameters[index]]
    keep1, keep2 = (1 - beta for beta in path.settings.betas)
    G = torch.nan_to_num(G, nan=0.0, posinf=0.0, neginf=0.0)
    if P is None:  # three roundings of each operand
        R, dR, limit = G, G.abs(), 3 * U
    else:
        R, dR, limit = (
            G @ P.double().T,
            G.norm(dim=1, keepdim=True) * size_of(P.double(), path.settings),
            projected(G.shape[1]),
        )
    if path.settings.max_grad_norm is not None:
        limit += SQUARES
    scales = keep1 * dR + exact.after.M.abs(), keep2 * (2 * R.abs() + limit * dR) * dR + exact.after.V
    for name, key, mine, true, scale, stream in (
        ("M", "exp_avg", got.M, exact.after.M, scales[0], Stream.EXP_AVG),
        ("V", "exp_avg_sq", got.V, exact.after.V, scales[1], Stream.EXP_AVG_SQ),
    ):
        if state[key].dtype == torch.float32:
            errors.add(path.name, name, _largest(mine - true, scale), limit)
        else:
            expected = path.rounded(true, torch.bfloat16, stream, position, transposed=False)
            errors.add_rounded(path.name, name, mine.to(torch.bfloat16), expected, limit * scale)


def _svd_errors(path: Path, errors: Errors, G: Tensor, P: Tensor) -> None:
    """Note how far P's rows are from orthonormal, and from catching all that as many directions can."""
    away = (P @ P.T - torch.eye(len(P), dtype=P.dtype, device=P.device)).abs().amax()
    most = torch.linalg.svdvals(G)[: len(P)].square().sum()
    errors.add(path.name, "P", torch.maximum(away, ((G @ P.T).square().sum() / most - 1).abs()), ORTHONORMAL)


def _verbs(path: Path, errors: Errors) -> None:
    """The last step of a few, verb by verb: each is compared with float64's on what the one before it made of the same
    step, so that it shows its own errors alone."""
    for _ in range(path.case.steps - 1):
        path.new_gradients()
        path.optimizer.step()
    path.new_gradients()
    gradient, before = path.parameters[0].grad, path.snapshot()[0]
    assert gradient is not None
    gradients, projections = path.matrices(0, gradient.double()), path.projections(0)
    stages = _kernel_stages(path) if path.name == "kernels" else _reference_stages(path)
    made = zip(*(stage.double().chunk(len(before)) for stage in stages), strict=True)
    for position, (known, got, G, P, (R, squared_G, s, sums)) in enumerate(
        zip(before, path.snapshot()[0], gradients, projections, made, strict=True)
    ):
        _sketch_errors(path, errors, G, P.double(), R, squared_G)
        s, u = _rescale_errors(path, errors, position, known, got, R, squared_G, s, sums.flatten())
        _apply_errors(path, errors, position, known, got, G, s, u)


def _sketch_errors(path: Path, errors: Errors, G: Tensor, P: Tensor, R: Tensor, squared_G: Tensor) -> None:
    norms = G.norm(dim=1)
    errors.add(
        path.name, "R", _largest((R - G @ P.T).norm(dim=1), norms * size_of(P, path.settings)), projected(G.shape[1])
    )
    true, limit = norms.square(), SQUARES + _cut_off(path, 0)
    errors.add(path.name, "|G|^2", _largest(squared_G.sum() - true.sum(), true.sum()), limit)
    if path.settings.scale_type == "channel":
        errors.add(path.name, "|G_c|^2", _largest(squared_G - true, true), limit)


def _rescale_errors(
    path: Path,
    errors: Errors,
    position: int,
    before: Matrix,
    got: Matrix,
    R: Tensor,
    squared_G: Tensor,
    s: Tensor,
    sums: Tensor,
) -> tuple[Tensor, Tensor]:
    """Note errors of the moments, s and the sums, given R; returns the path's s ``[channels or 1, 1]`` and u."""
    o, M, V, R2 = path.settings, before.M, before.V, R.square()
    keep1, keep2 = (1 - beta for beta in o.betas)
    exact = rescale(R, M, V, o)
    scales = 3 * keep1 * (R - M).abs() + exact.M.abs(), 3 * keep2 * (R2 - V).abs() + keep2 * R2 + exact.V
    for name, mine, true, scale, stream in (
        ("M", got.M, exact.M, scales[0], Stream.EXP_AVG),
        ("V", got.V, exact.V, scales[1], Stream.EXP_AVG_SQ),
    ):
        if o.state_dtype == torch.float32:
            errors.add(path.name, name, _largest(mine - true, scale), ELEMENTWISE)
        else:
            expected = path.rounded(true, o.state_dtype, stream, position, transposed=False)
            errors.add_rounded(path.name, name, mine.to(o.state_dtype), expected, ELEMENTWISE * scale)
    # |N|^2 as if nothing cancelled in M.
    most = ((o.betas[0] * M.abs() + keep1 * R.abs()) / (exact.V.sqrt() + o.eps)).square()
    if o.scale_type == "tensor":
        true = torch.stack([exact.N.square().sum(), R2.sum(), squared_G.sum()])
        errors.add(path.name, "sums", _largest(sums - true, torch.stack([most.sum(), true[1], true[2]])), SQUARES)
        s = (sums[0].sqrt() / (sums[1].sqrt() + 1e-8)).reshape(1, 1)
        return s, s[0, 0] * sums[2].sqrt()
    scale = most.sum(1).sqrt() / (R2.sum(1).sqrt() + 1e-8)
    errors.add(path.name, "s_c", _largest(s - exact.s[:, 0], scale), FACTOR)
    true = (s.square() * squared_G).sum()
    errors.add(path.name, "sums", _largest(sums[0] - true, true), SQUARES)
    return s[:, None], sums[0].sqrt()


def _apply_errors(
    path: Path, errors: Errors, position: int, before: Matrix, got: Matrix, G: Tensor, s: Tensor, u: Tensor
) -> None:
    o, parameter = path.settings, path.parameters[0]
    W, previous, update = apply(before.W, G, s, u, before.previous, path.t, o)
    if not o.disable_nl:
        errors.add(path.name, "u_prev", _largest(got.previous - previous, previous), NORM)
    # W is rounded when the update is subtracted, and around the decay.
    decay = float(o.lr) * o.weight_decay
    scale = UPDATE_GIVEN_S * update.abs() + (1 + 3 * decay) * (before.W - update).abs() + (W.abs() if decay else 0)
    if parameter.dtype == torch.float32:
        errors.add(path.name, "W", _largest(got.W - W, scale), ELEMENTWISE)
    else:
        stored = path.matrices(0, parameter.detach())[position]
        expected = path.rounded(W, parameter.dtype, Stream.WEIGHT, position, not path.keeps_rows[0])
        errors.add_rounded(path.name, "W", stored, expected, ELEMENTWISE * scale)


def _table(path: Path) -> Table:
    """The kernels' table for all of a case's matrices."""
    plan = Plan(path.optimizer.param_groups, path.optimizer.state, [path.settings], False, Agreement())
    table = plan.low_rank[0]
    if path.settings.proj == "svd":
        table.point_at(path.projections(0))
    return table


def _kernel_stages(path: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """R, |G_c|^2, s_c and the sums, of all matrices one after another, from the kernels; W then is the next one."""
    table, o, moment = _table(path), path.settings, Moment(path.t, None, None)
    projections.refresh(table, o, moment)
    sketch = fused.sketch(table, o, moment)
    factors = fused.rescale(table, o, moment, sketch)
    sums = torch.zeros(table.matrices, factors.sums.shape[1], dtype=torch.float64, device=path.device)
    sums.index_add_(0, table.channel_programs, factors.sums.double())
    fused.apply(table, o, moment, factors)
    return sketch.projected, sketch.squared_norms, sums if factors.channel is None else factors.channel, sums


def _batch(path: Path) -> Batch:
    """The reference path's view of the same."""
    parameter = path.parameters[0]
    assert parameter.grad is not None
    batch = Batch(path.geometry(parameter), path.settings, path.t, path.settings.seed, Scratch())
    projections = path.projections(0)
    P = torch.stack(projections) if len(projections) > 1 else projections[0]
    piece = piece_of(parameter, path.geometry(parameter))
    batch.add(parameter, parameter.grad, path.optimizer.state[parameter], P, piece)
    return batch


def _reference_stages(path: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same from the reference path."""
    batch = _batch(path)
    sketch = reference.sketch(batch)
    factors = reference.rescale(batch, sketch)
    reference.apply(batch, factors)
    s = factors.sums if factors.channel is None else factors.channel
    return sketch.projected.flatten(0, 1), sketch.squared_norms.flatten(), s.flatten(), factors.sums


def _projection(path: Path, errors: Errors) -> None:
    """P as ``sketch`` sees it, which an identity gives away, at the first two epochs; and as it lies in memory."""
    o, parameter = path.settings, path.parameters[0]
    assert o.rank is not None
    parameter.grad = torch.eye(len(parameter), device=path.device, dtype=parameter.dtype)
    path.optimizer.step()  # makes the state
    for path.t in (1, GAP + 1):
        P = path.projections(0)[0]
        if path.name == "kernels":
            table, moment = _table(path), Moment(path.t, None, None)
            projections.refresh(table, o, moment)
            R = fused.sketch(table, o, moment).projected
            for projection in table.projections:
                expected = torch.zeros_like(projection.buffer, dtype=torch.float32)
                expected[:, : P.shape[1]] = P
                inside = (projection.buffer.double() / math.sqrt(o.rank)).float()
                errors.add(path.name, "P", (inside - expected).abs().amax(), EXACTLY)
        else:
            R = reference.sketch(_batch(path)).projected[0]
        normals = P.double() * math.sqrt(o.rank)
        error = R.T.double() * math.sqrt(o.rank) - normals
        limit = NORMAL if projection_kind(o) is GAUSSIAN else SCALED
        errors.add(path.name, "R", _largest(error, normals.abs().clamp(min=1)), limit)
