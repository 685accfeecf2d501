"""Stage (a), first half: the projected gradient against float64, again and again, looking for a race.

A race shows as elements that are wrong now and then, or that have other bits when the same launch runs again. With
beta1 = 0 the first moment is R = G P^T itself, so it is read from the optimizer's state, and the whole kernel runs as
it does in training. |G_c|^2 is seen in the norm of the update.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from apollo_triton import APOLLOAdamW, projection_matrix
from apollo_triton.tools.validate.float64 import projected

from ..clock import rounded
from ..results_file import Row

# Tensor cores cut off sums of squares by at most 1e-4 at these widths, and one tile that is left out makes 1e-3.
NORM_LIMIT = 3e-4
MOST_LISTED = 12  # repetitions with errors that a row lists
EPS = 1e-6


@dataclass(frozen=True)
class Race:
    """One matrix of ``shape`` at a rank, so many times. Rows are channels if it has more of them than columns."""

    rank: int
    dtype: torch.dtype
    shape: tuple[int, int]
    repetitions: int

    @property
    def name(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}, rank {self.rank}, {self.shape[0]} x {self.shape[1]}"


def races(large: bool, factor: float = 1.0) -> list[Race]:
    """What is repeated, float32 at ranks 16 and 32 first: most often, and over the longest loops."""
    float32, bfloat16, float16 = torch.float32, torch.bfloat16, torch.float16
    tall, wide = ((11008, 4096), (4096, 11008)) if large else ((48, 40), (40, 48))
    most, some, few = (max(1, round(times * factor)) for times in (300, 100, 30))
    listed = [Race(rank, float32, shape, most) for rank in (16, 32) for shape in (tall, wide)]
    listed += [Race(256, bfloat16, shape, some) for shape in (tall, wide)]
    listed += [Race(rank, float32, wide, few) for rank in (64, 128, 256)]
    listed += [Race(rank, dtype, tall, few) for dtype in (bfloat16, float16) for rank in (16, 64, 128)]
    listed += [Race(rank, bfloat16, wide, few) for rank in (1, 4)]
    return listed if large else [listed[0], Race(16, bfloat16, wide, few)]


def measured(race: Race, device: str) -> Row:
    """The row of a race: how many elements of R were wrong in all repetitions, and how many had other bits when the
    same step ran again."""
    weight = nn.Parameter(torch.zeros(race.shape, dtype=race.dtype, device=device))
    keys: dict[str, Any] = {"rank": race.rank, "betas": (0.0, 0.0), "eps": EPS, "update_proj_gap": 10**6}
    optimizer = APOLLOAdamW([{"params": [weight], **keys}], lr=0.0, correct_bias=False, seed=3, backend="triton")
    rows_kept = race.shape[0] >= race.shape[1]
    P = projection_matrix(3, 0, race.rank, min(race.shape), device=device).double()
    limit = projected(min(race.shape))
    generator = torch.Generator(device).manual_seed(0)
    found: Row = {"repetitions": race.repetitions, "wrong": 0, "other_bits": 0, "worst": 0.0, "norm_error": 0.0}
    listed: dict[str, list[int]] = {}
    for repetition in range(race.repetitions):
        weight.grad = torch.empty_like(weight).normal_(0, 1e-2, generator=generator)
        R, norm = _step(optimizer, weight)
        again, _ = _step(optimizer, weight)
        G = weight.grad.double() if rows_kept else weight.grad.double().T
        exact = G @ P.T
        error = (R.double() - exact).abs() / (limit * G.norm(dim=1, keepdim=True) * P.norm())
        wrong = int((~(error <= 1)).sum())  # NaN is wrong too
        other = int((again != R).sum())
        found["wrong"] += wrong
        found["other_bits"] += other
        found["worst"] = max(found["worst"], float(torch.nan_to_num(error, nan=torch.inf).max()))
        found["norm_error"] = max(found["norm_error"], abs(norm / _norm(G, exact) - 1))
        if wrong or other:
            listed[str(repetition)] = [wrong, other]
    found["elements"] = race.repetitions * R.numel()
    found["worst"], found["norm_error"] = rounded(found["worst"]), rounded(found["norm_error"])
    found["repetitions_with_errors"] = len(listed)
    found["wrong_and_other_bits"] = dict(list(listed.items())[:MOST_LISTED])
    found["right"] = not listed and found["norm_error"] <= NORM_LIMIT
    return found


def _step(optimizer: APOLLOAdamW, weight: nn.Parameter) -> tuple[Tensor, float]:
    """R and the norm of the update of a step that finds no earlier one: no limiter, and what is not written stays 0."""
    if state := optimizer.state[weight]:
        for name in ("exp_avg", "exp_avg_sq", "update_norm"):
            state[name].zero_()
    optimizer.step()
    state = optimizer.state[weight]
    return state["exp_avg"].clone(), float(state["update_norm"])


def _norm(G: Tensor, R: Tensor) -> float:
    """The norm of the update in float64: of s_c G_c with s_c = |N_c| / |R_c| and N = R / (|R| + eps)."""
    factors = (R / (R.abs() + EPS)).norm(dim=1) / (R.norm(dim=1) + 1e-8)
    return float((factors * G.norm(dim=1)).norm())
