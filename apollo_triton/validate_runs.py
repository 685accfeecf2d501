"""The runs behind ``apollo-triton validate``: both engines on copies of the same parameters, measured against float64.

Every step is compared with a float64 one from that path's own weights and state, so that errors neither hide in earlier
ones nor grow from them; float32 trajectories are compared as a whole besides, with a float64 run that is left to itself.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from . import fused, reference
from .batches import Batch
from .geometry import Geometry
from .optimizer import APOLLOAdamW
from .philox import Stream, round_stochastic
from .plan import Plan
from .projection import projection_matrix
from .scratch import Scratch
from .settings import LOW_RANK_DEFAULTS, Settings
from .tables import Table
from .validate_cases import DTYPES, GAP, Case
from .validate_float64 import (
    ELEMENTWISE,
    EXACTLY,
    FACTOR,
    NORM,
    NORMAL,
    SCALED,
    SQUARES,
    STRADDLING,
    UPDATE,
    Matrix,
    Step,
    U,
    apply,
    dense_step,
    low_rank_step,
    projected,
    rescale,
)

PATHS = {"kernels": "triton", "reference": "reference"}
# As in a language model. A step's update is then half the weight, and the weight's own rounding hides little of it.
LEARNING_RATE, WEIGHT_SCALE, GRADIENT_SCALE = 1e-2, 0.02, 1e-2
SPIKE = 4  # the step whose gradient holds an infinity


class Errors:
    """Of one case: each measure's limit and the largest error of each path; a NaN counts as infinite."""

    def __init__(self) -> None:
        self.limits: dict[str, float] = {}
        self.found: dict[str, dict[str, float]] = {}

    def add(self, path: str, measure: str, error: Tensor | float, limit: float) -> None:
        """Note an error."""
        value = float(error)
        found = self.found.setdefault(measure, dict.fromkeys(PATHS, 0.0))
        found[path] = max(found[path], math.inf if math.isnan(value) else value)
        self.limits[measure] = max(limit, self.limits.get(measure, 0.0))

    def share(self, measure: str) -> float:
        """The larger error as a share of the limit."""
        error, limit = max(self.found[measure].values()), self.limits[measure]
        return error / limit if limit else math.inf if error else 0.0

    def worst(self) -> list[str]:
        """The measures, nearest to its limit first."""
        return sorted(self.found, key=self.share, reverse=True)


def measured(case: Case, device: torch.device, seed: int) -> Errors:
    """Run a case on both paths."""
    errors = Errors()
    for name in PATHS:
        with torch.no_grad():
            {"projection": _projection, "verbs": _verbs, "steps": _steps}[case.kind](
                Path(case, name, device, seed), errors
            )
    return errors


class Path:
    """One engine with parameters of its own, which both paths draw alike."""

    def __init__(self, case: Case, name: str, device: torch.device, seed: int) -> None:
        self.case, self.name, self.device, self.t = case, name, device, 0
        self.generator = torch.Generator().manual_seed(seed)
        dtype, self.gradient_dtype = DTYPES[case.dtypes]
        weights = [_laid_out(self._drawn(shape, WEIGHT_SCALE).to(device, dtype), case.layout) for shape in case.shapes]
        self.parameters = [nn.Parameter(weight) for weight in weights]
        # A common part makes the moments point somewhere.
        self.common = [self._drawn(shape, GRADIENT_SCALE) for shape in case.shapes]
        options: dict[str, Any] = {"lr": LEARNING_RATE, **case.options}
        if options.get("capturable"):  # the kernels' alone; the learning rate is a tensor then
            options |= {"lr": torch.tensor(LEARNING_RATE, device=device), "capturable": name == "kernels"}
        own = {key: options.pop(key) for key in ("rank", *LOW_RANK_DEFAULTS) if key in options}
        group = {"params": self.parameters, **({"update_proj_gap": GAP} | own if own else {})}
        self.optimizer = APOLLOAdamW([group], backend=PATHS[name], seed=seed, **options)
        self.settings = Settings.of(self.optimizer.param_groups[0])
        self.keeps_rows = [self._geometry(parameter).keeps_rows for parameter in self.parameters]

    def _drawn(self, shape: tuple[int, ...], scale: float) -> Tensor:
        return torch.randn(shape, generator=self.generator) * scale

    def _geometry(self, parameter: Tensor) -> Geometry:
        return Geometry.of(parameter.shape if parameter.dim() > 1 else (1, 1), self.settings.proj_type)

    def is_low_rank(self, index: int) -> bool:
        """Whether a parameter is projected."""
        return self.settings.rank is not None and self.parameters[index].dim() > 1

    def new_gradients(self) -> None:
        """Those of the next step, in place of the last."""
        self.t += 1
        for index, parameter in enumerate(self.parameters):
            gradient = self.common[index] + self._drawn(tuple(parameter.shape), GRADIENT_SCALE)
            if self.case.spike and self.t == SPIKE and index == 0:
                gradient.view(-1)[gradient.numel() // 3] = math.inf
            gradient = _laid_out(gradient.to(self.device, self.gradient_dtype), self.case.layout)
            parameter.grad = None
            if gradient.dtype != parameter.dtype:
                parameter.grad_dtype = gradient.dtype
            parameter.grad = gradient

    def matrices(self, index: int, tensor: Tensor) -> list[Tensor]:
        """Those of a weight or gradient, channels first; a dense one as it is."""
        if not self.is_low_rank(index):
            return [tensor]
        matrices = list(tensor) if tensor.dim() == 3 else [tensor.reshape(len(tensor), -1)]
        return [each if self.keeps_rows[index] else each.T for each in matrices]

    def snapshot(self) -> list[list[Matrix]]:
        """Copies of the matrices of each parameter, with their state, in float64."""
        result = []
        for index, parameter in enumerate(self.parameters):
            state, found = self.optimizer.state.get(parameter, {}), []
            weights = self.matrices(index, parameter.detach())
            for position, weight in enumerate(weights):
                shape = (len(weight), self.settings.rank or 0) if self.is_low_rank(index) else tuple(weight.shape)
                values = []
                for name, size in (("exp_avg", shape), ("exp_avg_sq", shape), ("update_norm", ())):
                    value = state.get(name, torch.zeros(len(weights), *size, device=self.device))
                    values.append(value.reshape(len(weights), *size)[position].double().clone())
                found.append(Matrix(weight.double().clone(), *values))
            result.append(found)
        return result

    def projections(self, index: int) -> list[Tensor]:
        """P of this step for each matrix of a parameter, which svd has made by now."""
        settings = self.settings
        assert settings.rank is not None
        parameter = self.parameters[index]
        if settings.proj == "svd":
            kept = self.optimizer.state[parameter]["projection"]
            return list(kept) if kept.dim() == 3 else [kept]
        geometry, epoch = self._geometry(parameter), (self.t - 1) // settings.update_proj_gap
        P = projection_matrix(
            settings.seed, epoch, settings.rank, geometry.width, distribution=settings.distribution, device=self.device
        )
        return [P] * geometry.matrices

    def rounded(self, values: Tensor, dtype: torch.dtype, stream: Stream, position: int, transposed: bool) -> Tensor:
        """float64 values as a step stores them: rounded once, to nearest or by the random bits of their places."""
        values = values.T if transposed else values
        stochastic = stream != Stream.WEIGHT or self.settings.stochastic_rounding
        if stochastic and dtype == torch.bfloat16:
            start = position * values.numel()
            result = round_stochastic(values.float().contiguous(), self.settings.seed, self.t, stream, start)
        else:
            result = values.to(dtype)
        return result.T if transposed else result


def _laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values, elsewhere in memory."""
    if layout == "transposed":
        return values.mT.contiguous().mT if values.dim() > 1 else values
    if layout == "gaps":
        return values.repeat_interleave(2, dim=-1)[..., ::2] if values.dim() else values
    if layout == "misaligned":
        return (
            torch.empty(values.numel() + 1, dtype=values.dtype, device=values.device)[1:].view_as(values).copy_(values)
        )
    if layout == "channels_last":
        return values.contiguous(memory_format=torch.channels_last)
    return values


def _largest(error: Tensor, scale: Tensor) -> Tensor:
    """The largest |error| / scale, where 0 / 0 is 0."""
    return torch.where(error == 0, 0.0, error.abs() / scale).amax()


def _straddling(got: Tensor, expected: Tensor, slack: Tensor) -> tuple[Tensor | float, float]:
    """The share of 16-bit numbers that are not those expected, and its limit, one of them at least; infinite if one is
    off by more than a unit in the last place and ``slack``, which is float32's error where numbers cancel."""
    numbers = torch.finfo(got.dtype)
    unit = numbers.eps * expected.double().abs() + numbers.smallest_normal * numbers.eps
    near = (got.double() - expected.double()).abs() <= unit + slack
    share = (got != expected).double().mean() if bool(near.all()) else math.inf
    return share, max(STRADDLING, 1 / got.numel())


# The kinds of cases.


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
                if P is not None and path.settings.proj == "svd" and path.t % GAP == 1:
                    _svd_errors(path, errors, G, P.double())
                if free is not None:
                    free[index][position] = mine = run(free[index][position]).after
                    budgets[index][position] += budget
                    if path.t == path.case.steps:
                        error = (got.W - mine.W).norm() * UPDATE / budgets[index][position]
                        errors.add(path.name, "W at end", error, _update_limit(path))
    errors.add(path.name, "skipped", abs(int(path.optimizer.skipped_updates) - skipped), EXACTLY)


def _clip(path: Path) -> float:
    """What all gradients are multiplied by: as ``torch.nn.utils.clip_grad_norm_``."""
    limit = path.settings.max_grad_norm
    if limit is None:
        return 1.0
    squares = sum(float(parameter.grad.double().square().sum()) for parameter in path.parameters)  # type: ignore[union-attr]
    return min(1.0, limit / (math.sqrt(squares) + 1e-6))


def _update_limit(path: Path) -> float:
    """Clipping multiplies G twice, in s and in the update, by what has half the error of a sum of squares."""
    return UPDATE + (SQUARES if path.settings.max_grad_norm is not None else 0.0)


def _weight_errors(
    path: Path, errors: Errors, index: int, position: int, before: Matrix, got: Matrix, exact: Step
) -> float:
    """Note the errors of W and u_prev; returns UPDATE of the update, and all else that float32 may round."""
    spread = exact.spread.norm()
    allowed = UPDATE * exact.update.norm() + spread
    limit, dtype, low_rank = _update_limit(path), path.parameters[index].dtype, path.is_low_rank(index)
    moves = bool((exact.update != 0).any())
    budget = allowed + 2 * U * before.W.norm() if moves else 0 * allowed  # W is rounded twice, once for the decay
    if dtype == torch.float32:
        errors.add(path.name, "W", _largest((got.W - exact.after.W).norm() * UPDATE, budget), limit)
    else:
        stored = path.matrices(index, path.parameters[index].detach())[position]
        transposed = low_rank and not path.keeps_rows[index]
        expected = path.rounded(exact.after.W, dtype, Stream.WEIGHT, position, transposed)
        relative = UPDATE + (_largest_each(exact.spread, exact.update.norm(dim=1))[:, None] if low_rank else 0.0)
        slack = exact.update.abs() * relative + 2 * U * before.W.abs() * moves
        errors.add(path.name, "W", *_straddling(stored, expected, slack))
    if low_rank and not path.settings.disable_nl:
        scale = exact.after.previous * (allowed / exact.update.norm() if moves else 0.0)
        errors.add(path.name, "u_prev", _largest((got.previous - exact.after.previous) * UPDATE, scale), limit)
    return float(budget)


def _largest_each(values: Tensor, by: Tensor) -> Tensor:
    return torch.where(values == 0, 0.0, values / by)


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
        R, dR, limit = G @ P.double().T, G.norm(dim=1, keepdim=True) * P.double().norm(), projected(G.shape[1])
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
            errors.add(path.name, name, *_straddling(mine.to(torch.bfloat16), expected, limit * scale))


def _svd_errors(path: Path, errors: Errors, G: Tensor, P: Tensor) -> None:
    """Note how far P's rows are from orthonormal, and from catching all that as many directions can: float32's
    decomposition is good to a few U times the matrix, and energies to twice that."""
    away = (P @ P.T - torch.eye(len(P), dtype=P.dtype, device=P.device)).abs().amax()
    most = torch.linalg.svdvals(G)[: len(P)].square().sum()
    errors.add(path.name, "P", torch.maximum(away, ((G @ P.T).square().sum() / most - 1).abs()), 32 * U)


def _verbs(path: Path, errors: Errors) -> None:
    """The last step of a few, verb by verb: each from what the one before it made, so that every verb shows its own
    errors alone."""
    o = path.settings
    for _ in range(path.case.steps - 1):
        path.new_gradients()
        path.optimizer.step()
    path.new_gradients()
    parameter, before = path.parameters[0], path.snapshot()[0]
    assert parameter.grad is not None
    gradients = path.matrices(0, parameter.grad.double())
    projections = [P.double() for P in path.projections(0)]
    stages = _kernel_stages(path) if path.name == "kernels" else _reference_stages(path)
    R, squared_G, s, sums = ([part.double() for part in each.chunk(len(before))] for each in stages)
    after, note = path.snapshot()[0], lambda *found: errors.add(path.name, *found)
    keep1, keep2 = (1 - beta for beta in o.betas)
    for position, (known, got) in enumerate(zip(before, after, strict=True)):
        G, P = gradients[position], projections[position]
        W, M, V, previous = known
        norms = G.norm(dim=1)
        note("R", _largest((R[position] - G @ P.T).norm(dim=1), norms * P.norm()), projected(G.shape[1]))
        mine, true = squared_G[position], norms.square()
        note("|G|^2", _largest(mine.sum() - true.sum(), true.sum()), SQUARES)
        if len(mine) == len(true):
            note("|G_c|^2", _largest(mine - true, true), SQUARES)

        exact = rescale(R[position], M, V, o)
        R2 = R[position].square()
        for name, key, number, value, scale, stream in (
            ("M", "exp_avg", got.M, exact.M, 3 * keep1 * (R[position] - M).abs() + exact.M.abs(), Stream.EXP_AVG),
            ("V", "exp_avg_sq", got.V, exact.V, 3 * keep2 * (R2 - V).abs() + keep2 * R2 + exact.V, Stream.EXP_AVG_SQ),
        ):
            if o.state_dtype == torch.float32:
                note(name, _largest(number - value, scale), ELEMENTWISE)
            else:
                stored = path.optimizer.state[parameter][key].reshape(len(before), *value.shape)[position]
                expected = path.rounded(value, o.state_dtype, stream, position, transposed=False)
                note(name, *_straddling(stored, expected, ELEMENTWISE * scale))
        largest_N = ((o.betas[0] * M.abs() + keep1 * R[position].abs()) / (exact.V.sqrt() + o.eps)).square()
        total = sums[position].reshape(-1)
        if o.scale_type == "tensor":
            true_sums = torch.stack([exact.N.square().sum(), R2.sum(), squared_G[position].sum()])
            note("sums", _largest(total - true_sums, torch.stack([largest_N.sum(), *true_sums[1:]])), SQUARES)
            factor = (total[0].sqrt() / (total[1].sqrt() + 1e-8)).reshape(1, 1)
            u = factor[0, 0] * total[2].sqrt()
        else:
            factor = s[position].reshape(-1, 1)
            scale = largest_N.sum(1).sqrt() / (R2.sum(1).sqrt() + 1e-8)
            note("s_c", _largest(factor[:, 0] - exact.s[:, 0], scale), FACTOR)
            true_sum = (factor[:, 0].square() * squared_G[position]).sum()
            note("sums", _largest(total[0] - true_sum, true_sum), SQUARES)
            u = total[0].sqrt()

        W_after, u_after, update = apply(W, G, factor, u, previous, path.t, o)
        if not o.disable_nl:
            note("u_prev", _largest(got.previous - u_after, u_after), NORM)
        # The factor of G is rounded twelve times at most; W when the update is subtracted, and the decay thrice.
        decay = float(o.lr) * o.weight_decay
        scale = 12 * update.abs() + (1 + 3 * decay) * (W - update).abs() + (W_after.abs() if decay else 0)
        if parameter.dtype == torch.float32:
            note("W", _largest(got.W - W_after, scale), ELEMENTWISE)
        else:
            stored = path.matrices(0, parameter.detach())[position]
            expected = path.rounded(W_after, parameter.dtype, Stream.WEIGHT, position, not path.keeps_rows[0])
            note("W", *_straddling(stored, expected, ELEMENTWISE * scale))


def _table(path: Path) -> Table:
    """The kernels' table of the next step's one launch."""
    plan = Plan(path.optimizer.param_groups, path.optimizer.state, [path.settings], False, None)
    table = plan.low_rank[0][0]
    if path.settings.proj == "svd":
        table.point_at(path.projections(0))
    return table


def _kernel_stages(path: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """R, |G_c|^2, s_c and the sums, of all matrices one after another, from the kernels; then ``apply``."""
    table, o, moment = _table(path), path.settings, fused.Moment(path.t, None, None)
    fused.refresh(table, o, moment)
    sketch = fused.sketch(table, o, moment)
    factors = fused.rescale(table, o, moment, sketch)
    sums = torch.zeros(table.matrices, factors.sums.shape[1], dtype=torch.float64, device=path.device)
    sums.index_add_(0, table.channel_programs, factors.sums.double())
    fused.apply(table, o, moment, factors)
    return sketch.projected, sketch.squared_norms, _or_nothing(factors.channel, len(sums)), sums


def _reference_stages(path: Path) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """The same from the reference path."""
    parameter = path.parameters[0]
    assert parameter.grad is not None
    batch = Batch(path._geometry(parameter), path.settings, path.t, path.settings.seed, Scratch())
    projections = path.projections(0)
    P = torch.stack(projections) if len(projections) > 1 else projections[0]
    batch.add(parameter, parameter.grad, path.optimizer.state[parameter], P)
    sketch = reference.sketch(batch)
    factors = reference.rescale(batch, reference.Sketch(sketch.projected.clone(), sketch.squared_norms.clone()))
    reference.apply(batch, factors)
    s = _or_nothing(factors.channel, len(factors.sums)).flatten()
    return sketch.projected.flatten(0, 1), sketch.squared_norms.flatten(), s, factors.sums


def _or_nothing(factors: Tensor | None, matrices: int) -> Tensor:
    return torch.zeros(matrices) if factors is None else factors


def _projection(path: Path, errors: Errors) -> None:
    """P as ``sketch`` sees it, which an identity gives away, at the first two epochs; and as it lies in memory."""
    o, parameter = path.settings, path.parameters[0]
    assert o.rank is not None
    parameter.grad = torch.eye(len(parameter), device=path.device, dtype=parameter.dtype)
    path.optimizer.step()  # makes the state
    for t in (1, GAP + 1):
        path.t = t
        P = path.projections(0)[0]
        if path.name == "kernels":
            table, moment = _table(path), fused.Moment(t, None, None)
            fused.refresh(table, o, moment)
            R = fused.sketch(table, o, moment).projected
            for projection in table.projections:
                expected = torch.zeros_like(projection.buffer, dtype=torch.float32)
                expected[:, : P.shape[1]] = P
                inside = (projection.buffer.double() / math.sqrt(o.rank)).float()
                errors.add(path.name, "P", (inside - expected).abs().amax(), EXACTLY)
        else:
            R = _reference_sketch(path)
        normals = P.double() * math.sqrt(o.rank)
        limit = NORMAL if fused.projection_kind(o) is fused.sketch_kernels.GAUSSIAN else SCALED
        error = R.T.double() * math.sqrt(o.rank) - normals
        errors.add(path.name, "R", _largest(error, normals.abs().clamp(min=1)), limit)


def _reference_sketch(path: Path) -> Tensor:
    parameter = path.parameters[0]
    assert parameter.grad is not None
    batch = Batch(path._geometry(parameter), path.settings, path.t, path.settings.seed, Scratch())
    batch.add(parameter, parameter.grad, path.optimizer.state[parameter], path.projections(0)[0])
    return reference.sketch(batch).projected[0]
