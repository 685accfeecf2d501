"""The algorithm in float64, one matrix at a time, and what float32 may differ from it by: for ``apollo-triton validate``.

Written from the equations (arXiv 2412.05270, algorithm 1; arXiv 2410.01623, equation 6), and sharing no code with the
engines. Matrices come channels first: G and W are ``[channels, width]``, R, M, V and N ``[channels, rank]``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from .settings import Settings

U = 2.0**-24  # the relative error of one float32 operation
# One step's update, by its norm. s takes sums, two roots and three quotients, its product with lr / l six more
# roundings: about 20 U = 1.2e-6 if all fell alike. An s that is off by 1e-5 is five times the limit.
UPDATE = 2e-6
# The same for one channel's s: M cancels where R turns, so its error, 4 U, is one of |M| + |R|; V's root, two quotients
# and two norms take 4 U more.
FACTOR = 8 * U
# u_prev from u^2: a root, the limiter's quotients and constants, and the sum of the partial sums.
NORM = 8 * U
# Sums of squares do not cancel. Kernels add as trees; a CPU's dot product of 2**20 terms in 16 strands of 2**16 is off
# by sqrt(2**16 / 3 / 16) U = 37 U = 2.2e-6.
SQUARES = 2.2e-6
# Elementwise, where each operand is weighted with how often it is rounded: the worst case is then U. The slack covers
# terms in U^2.
ELEMENTWISE = 1.01 * U
# Each path rounds the same float32 number, so 16-bit results differ from float64's, rounded once by the same random bits
# or to nearest, only where float32's error of 1e-7 straddles a boundary; those are 2**-8 of the number apart in
# bfloat16, 2**-11 in float16: 3e-5 and 2e-4 of all entries.
STRADDLING = 1e-3
# float32 Box-Muller against float64, of numbers up to 5.8: 4e-7 by the logarithm, root, and sine; 2 U for the scale.
NORMAL = 4e-7 + 2 * U
SCALED = 2 * U  # entries that are exact but for 1 / sqrt(rank)
EXACTLY = 0.0


def projected(width: int) -> float:
    """Limit of R as a share of |G_c| |P|. A sum of random signs wanders to sqrt(width) times a term, so that all its
    roundings together are 0.4 U of that, 3 U in the worst of thousands of channels. Tensor cores cut off instead: each
    16 terms pull R, which is |G_c| |P| / sqrt(width), 2 U towards zero."""
    return (3 + math.sqrt(width) / 8) * U


class Matrix(NamedTuple):
    """A matrix and its state; ``previous`` is u_prev, 0 for none yet. Dense ones have moments of W's shape."""

    W: Tensor
    M: Tensor
    V: Tensor
    previous: Tensor


class Factors(NamedTuple):
    """What ``rescale`` makes: s is ``[channels, 1]``, or ``[1, 1]`` for one a tensor."""

    M: Tensor
    V: Tensor
    N: Tensor
    s: Tensor


class Step(NamedTuple):
    """A matrix after a step, the update it got, and the most (``spread``, per channel) that float32's R may change it."""

    after: Matrix
    update: Tensor
    spread: Tensor


def rescale(R: Tensor, M: Tensor, V: Tensor, o: Settings) -> Factors:
    """Moments and scaling factors. A channel whose R is not finite keeps its moments."""
    b1, b2 = o.betas
    finite = R.isfinite().all(1, keepdim=True)
    M = torch.where(finite, b1 * M + (1 - b1) * R, M)
    V = torch.where(finite, b2 * V + (1 - b2) * R * R, V)
    N = M / (V.sqrt() + o.eps)
    if o.scale_type == "tensor":
        return Factors(M, V, N, (N.norm() / (R.norm() + 1e-8)).reshape(1, 1))
    return Factors(M, V, N, N.norm(dim=1, keepdim=True) / (R.norm(dim=1, keepdim=True) + 1e-8))


def apply(W: Tensor, G: Tensor, s: Tensor, u: Tensor, previous: Tensor, t: int, o: Settings) -> tuple[Tensor, ...]:
    """W, u_prev and the update for u = |s G|; a u that is not finite moves nothing."""
    if not u.isfinite():
        return W, previous, torch.zeros_like(W)
    root = math.sqrt(o.scale)
    front, back = (root, 1.0) if o.scale_front else (1.0, root)
    limiter = torch.ones_like(u)
    if not o.disable_nl:
        u = u * front
        if previous > 0:
            limiter = (u / (previous + 1e-8)).clamp(min=1.01) / 1.01
        previous = u / limiter if u > 0 else previous
    update = step_size(t, o) * back * (s * front / limiter) * G
    W = W - update
    return W - float(o.lr) * o.weight_decay * W, previous, update


def step_size(t: int, o: Settings) -> float:
    """h of step t."""
    b1, b2 = o.betas
    return float(o.lr) * (math.sqrt(1 - b2**t) / (1 - b1**t) if o.correct_bias else 1.0)


def low_rank_step(before: Matrix, G: Tensor, P: Tensor, t: int, o: Settings) -> Step:
    """sketch, rescale, apply."""
    W, M, V, previous = before
    R = G @ P.T
    factors = rescale(R, M, V, o)
    u = (factors.s * G).norm()
    W, previous, update = apply(W, G, factors.s, u, previous, t, o)
    after = Matrix(W, factors.M, factors.V, previous)
    if not u.isfinite():
        return Step(after, update, torch.zeros_like(W[:, 0]))
    # s = |N| / |R| moves by (dN + 2 s dR) / |R|: once for the division, and at most once more for V.
    norms = G.norm(dim=1)
    dR = projected(G.shape[1]) * norms * P.norm()
    dN = (1 - o.betas[0]) * dR[:, None] / (factors.V.sqrt() + o.eps) / math.sqrt(len(P))
    if o.scale_type == "tensor":
        ds = (dN.norm() + 2 * factors.s[0, 0] * dR.norm()) / (R.norm() + 1e-8)
    else:
        ds = (dN.norm(dim=1) + 2 * factors.s[:, 0] * dR) / (R.norm(dim=1) + 1e-8)
    return Step(after, update, ds * norms * (update.norm() / u if u > 0 else 0.0))


def dense_step(before: Matrix, G: Tensor, t: int, o: Settings) -> Step:
    """AdamW in the same convention; a gradient that is not finite moves nothing, and no state."""
    W, M, V, previous = before
    if not G.isfinite().all():
        return Step(before, torch.zeros_like(W), torch.zeros_like(W))
    b1, b2 = o.betas
    M, V = b1 * M + (1 - b1) * G, b2 * V + (1 - b2) * G * G
    update = step_size(t, o) * M / (V.sqrt() + o.eps)
    W = W - update
    return Step(Matrix(W - float(o.lr) * o.weight_decay * W, M, V, previous), update, torch.zeros_like(update))
