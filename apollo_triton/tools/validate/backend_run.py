"""One backend's run of a case of ``apollo-triton validate``, and the errors of both backends' runs."""

from __future__ import annotations

import math
import warnings
from typing import Any

import torch
from torch import Tensor, nn

from ...core.geometry import Geometry
from ...core.philox import Stream, round_stochastic
from ...core.projection import projection_matrix
from ...core.settings import DENSE_DEFAULTS, LOW_RANK_DEFAULTS, Settings
from ...optimizer import APOLLOAdamW
from ...params.member import has_row_moments
from .cases import DTYPES, GAP, Case
from .float64 import STRADDLING, STRAGGLERS, Matrix

BACKENDS = {"kernels": "triton", "reference": "reference"}  # a run's name, and the optimizer's ``backend``
# Scales as in a language model. A step's update is then half the weight, and the weight's rounding hides little of it.
LEARNING_RATE, WEIGHT_SCALE, GRADIENT_SCALE = 1e-2, 0.02, 1e-2
SPIKE = 4  # the step whose gradient holds an infinity


class Errors:
    """One case's errors: for each measure the limit, and the largest error of each run. A NaN counts as infinite."""

    def __init__(self) -> None:
        self.limits: dict[str, float] = {}
        self.found: dict[str, dict[str, float]] = {}
        self._counts: dict[tuple[str, str], list[float]] = {}

    def add(self, backend: str, measure: str, error: Tensor | float, limit: float) -> None:
        """Note an error of the run named ``backend``."""
        value = float(error)
        found = self.found.setdefault(measure, dict.fromkeys(BACKENDS, 0.0))
        found[backend] = max(found[backend], math.inf if math.isnan(value) else value)
        self.limits[measure] = max(limit, self.limits.get(measure, 0.0))

    def add_rounded(
        self, backend: str, measure: str, got: Tensor, expected: Tensor, slack: Tensor, excused: Tensor | None = None
    ) -> None:
        """Note which share of a case's 16-bit values are not as expected.

        The share is infinite if a value is off by more than a unit in the last place plus ``slack``, the error that
        float32 makes if values cancel. ``excused`` is the error that a badly conditioned R excuses.
        """
        finfo = torch.finfo(got.dtype)
        unit = finfo.eps * expected.double().abs() + finfo.smallest_normal * finfo.eps
        near = (got.double() - expected.double()).abs() <= unit + slack
        counts = self._counts.setdefault((backend, measure), [0, 0, STRAGGLERS])
        counts[0] += int((got != expected).sum()) if bool(near.all()) else math.inf
        counts[1] += got.numel()
        if excused is not None:
            counts[2] += float((excused / (unit / 2)).clamp(max=1).sum())  # a unit is ``unit`` or half of it
        self.found.setdefault(measure, dict.fromkeys(BACKENDS, 0.0))[backend] = counts[0] / counts[1]
        counted = [values for (_, name), values in self._counts.items() if name == measure]
        self.limits[measure] = max(STRADDLING + stragglers / size for _, size, stragglers in counted)

    def share(self, measure: str) -> float:
        """The larger of the two runs' errors, as a share of the limit."""
        error, limit = max(self.found[measure].values()), self.limits[measure]
        return error / limit if limit else math.inf if error else 0.0

    def worst(self) -> list[str]:
        """The measures, the one nearest to its limit first."""
        return sorted(self.found, key=self.share, reverse=True)


class BackendRun:
    """A case run by one backend. Each run has its own parameters, with the same values in both."""

    def __init__(self, case: Case, name: str, device: torch.device, seed: int) -> None:
        self.case, self.name, self.device, self.t = case, name, device, 0
        self.generator = torch.Generator().manual_seed(seed)
        dtype, self.gradient_dtype = DTYPES[case.dtypes]
        weights = [_laid_out(self.drawn(shape, WEIGHT_SCALE).to(device, dtype), case.layout) for shape in case.shapes]
        self.parameters = [nn.Parameter(weight) for weight in weights]
        # All gradients share this part, so that the moments have a direction.
        self.common = [self.drawn(shape, GRADIENT_SCALE) for shape in case.shapes]
        options: dict[str, Any] = {"lr": LEARNING_RATE, **case.options}
        if options.get("capturable"):  # only for the kernels; the learning rate is then a tensor
            options |= {"lr": torch.tensor(LEARNING_RATE, device=device), "capturable": name == "kernels"}
        low_rank_options = {key: options.pop(key) for key in ("rank", *LOW_RANK_DEFAULTS) if key in options}
        dense_options = {key: options.pop(key) for key in DENSE_DEFAULTS if key in options}
        keys = {"update_proj_gap": GAP} | low_rank_options if low_rank_options else dense_options
        group = {"params": self.parameters, **keys}
        with warnings.catch_warnings():  # the shapes that are tried are meant to be odd
            warnings.simplefilter("ignore", UserWarning)
            self.optimizer = APOLLOAdamW([group], backend=BACKENDS[name], seed=seed, **options)
        self.settings = Settings.of(self.optimizer.param_groups[0])
        self.keeps_rows = [self.geometry(parameter).keeps_rows for parameter in self.parameters]

    def drawn(self, shape: tuple[int, ...], scale: float) -> Tensor:
        """Normals times ``scale``, the same in both runs."""
        return torch.randn(shape, generator=self.generator) * scale

    def geometry(self, parameter: Tensor) -> Geometry:
        """The parameter's geometry; a vector's is that of a 1 x 1 matrix."""
        return Geometry.of(parameter.shape if parameter.dim() > 1 else (1, 1), self.settings.proj_type)

    def is_low_rank(self, index: int) -> bool:
        """Whether a parameter is projected."""
        return self.settings.rank is not None and self.parameters[index].dim() > 1

    def new_gradients(self) -> None:
        """Set the gradients of the next step."""
        self.t += 1
        for index, parameter in enumerate(self.parameters):
            gradient = self.common[index] + self.drawn(tuple(parameter.shape), GRADIENT_SCALE)
            if self.case.spike and self.t == SPIKE and index == 0:
                gradient.view(-1)[gradient.numel() // 3] = math.inf
            self.set_gradient(parameter, _laid_out(gradient.to(self.device, self.gradient_dtype), self.case.layout))

    def set_gradient(self, parameter: Tensor, gradient: Tensor) -> None:
        """Set ``.grad``, which may have another dtype than the parameter."""
        parameter.grad = None
        if gradient.dtype != parameter.dtype:
            parameter.grad_dtype = gradient.dtype
        parameter.grad = gradient

    def matrices(self, index: int, tensor: Tensor) -> list[Tensor]:
        """The matrices of a weight or gradient, channels first; a dense one as it is."""
        if not self.is_low_rank(index):
            return [tensor]
        matrices = list(tensor) if tensor.dim() == 3 else [tensor.reshape(len(tensor), -1)]
        return [matrix if self.keeps_rows[index] else matrix.T for matrix in matrices]

    def snapshot(self) -> list[list[Matrix]]:
        """Copies of the matrices of each parameter, with their state, in float64."""
        result = []
        for index, parameter in enumerate(self.parameters):
            state, found = self.optimizer.state.get(parameter, {}), []
            weights = self.matrices(index, parameter.detach())
            for position, weight in enumerate(weights):
                shape = (len(weight), self.settings.rank or 0) if self.is_low_rank(index) else tuple(weight.shape)
                by_row = has_row_moments(parameter, self.settings)
                squares = (len(weight), *[1] * (weight.dim() - 1)) if by_row else shape
                values = []
                for name, size in (("exp_avg", shape), ("exp_avg_sq", squares), ("update_norm", ())):
                    value = state.get(name, torch.zeros(len(weights), *size, device=self.device))
                    values.append(value.reshape(len(weights), *size)[position].double().clone())
                found.append(Matrix(weight.double().clone(), *values))
            result.append(found)
        return result

    def projections(self, index: int) -> list[Tensor]:
        """P of this step for each matrix of a parameter. For svd it is read from the state, so call this after the
        step."""
        settings = self.settings
        assert settings.rank is not None
        parameter = self.parameters[index]
        if settings.proj == "svd":
            kept = self.optimizer.state[parameter]["projection"]
            return list(kept) if kept.dim() == 3 else [kept]
        geometry, epoch = self.geometry(parameter), (self.t - 1) // settings.update_proj_gap
        P = projection_matrix(
            settings.seed, epoch, settings.rank, geometry.width, distribution=settings.distribution, device=self.device
        )
        return [P] * geometry.matrices

    def rounded(self, values: Tensor, dtype: torch.dtype, stream: Stream, position: int, transposed: bool) -> Tensor:
        """float64 values as a step stores them: rounded once, to nearest or by the random bits of their elements."""
        values = values.T if transposed else values
        stochastic = stream != Stream.WEIGHT or self.settings.stochastic_rounding
        if stochastic and dtype == torch.bfloat16:
            start = position * values.numel()
            result = round_stochastic(values.float().contiguous(), self.settings.seed, self.t, stream, start)
        else:
            result = values.to(dtype)
        return result.T if transposed else result


def _laid_out(values: Tensor, layout: str) -> Tensor:
    """The same values with another memory layout."""
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
