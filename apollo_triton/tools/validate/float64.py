"""The algorithm in float64, one matrix at a time, and how much float32 may differ: for ``apollo-triton validate``.

It is written from the equations (arXiv 2412.05270, algorithm 1; arXiv 2410.01623, equation 6) and shares no code with
the backends. Matrices are channels first: G and W are ``[channels, width]``; R, M, V and N are ``[channels, rank]``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...core.scale import auto_scale
from ...core.settings import Settings

U = 2.0**-24  # the relative error of one float32 operation
# Compiled kernels use PTX's approximate square roots and quotients. Their errors are at most 2 U and 4 U instead of U.
# Limit of one step's update, by its norm. It has two roots and three quotients in s, three more in the limiter and ten
# other operations: 38 U = 2.3e-6 if all were at their worst in the same direction. An s that is off by 1e-5 is five
# times the limit.
UPDATE = 2e-6
# Limit of one channel's s. M cancels where R changes sign, so its error is 2 U of |M| + |R|. V and its root add 3 U,
# and three roots or quotients 10 U.
FACTOR = 16 * U
# Limit of u_prev, from u^2: 2 U for the sum of the partial sums, a root, and three quotients. An update given s, or the
# sums that s is made of, has these and two products; one s per tensor takes another root and quotient.
NORM = 16 * U
UPDATE_GIVEN_S = 24  # times U
# Limit of sums of squares, which do not cancel. Kernels add them as trees. A CPU's dot product adds 2**20 terms in 16
# strands of 2**16 terms, and is then off by sqrt(2**16 / 3 / 16) U = 37 U = 2.2e-6.
SQUARES = 2.2e-6
# Tensor cores that add up |G_c|^2 cut off 0.7 U of it for each 16 terms (measured on an H100).
CUT_OFF = U / 16


# Limit of elementwise results whose operands are weighted with how often each is rounded: the worst case is then U. The
# slack of 1 % covers terms in U^2.
ELEMENTWISE = 1.01 * U
# Limit of the share of 16-bit entries that differ. Both backends and float64 round the same value once, to nearest or
# by the same random bits. Results differ only if float32's error of 1e-7 straddles a rounding boundary. Boundaries are
# 2**-8 of the value apart in bfloat16 and 2**-11 in float16, so 3e-5 and 2e-4 of all entries of a case differ. Small
# counts scatter, so 3 more entries are allowed: if 0.1 are expected, a right result then exceeds the limit, with four,
# once in 300 000 cases.
STRADDLING, STRAGGLERS = 1e-3, 3
# Limit of float32 Box-Muller, for normals up to 5.8: 4e-7 by logarithm, root and sine, and 3 U as in the next line.
NORMAL = 4e-7 + 3 * U
SCALED = 3 * U  # of exact normals and signs: 1 / sqrt(rank), the product with it, and the rounding in projection_matrix
ORTHONORMAL = (
    256 * U
)  # of singular vectors: LAPACK's are off by 10 to 30 U, their energies by twice that; cuSOLVER's by 180 U
EXACTLY = 0.0


def projected(width: int) -> float:
    """Limit of R's error as a share of |G_c| |P|.

    A sum of random signs grows to sqrt(width) times a term. All its roundings together are then 0.4 U of that, and 3 U
    in the worst of thousands of channels. Tensor cores cut off instead of rounding: every 16 terms pull R, which is
    |G_c| |P| / sqrt(width), towards zero by 2 U. At a small width the error of the normals themselves is seen as well.
    """
    return (3 + math.sqrt(width) / 8) * U + NORMAL / math.sqrt(width)


def size_of(P: Tensor, settings: Settings) -> Tensor:
    """|P|, and for a random P at least its expected value, because the error of a float32 normal is a share of 1, not
    of the normal."""
    return P.norm() if settings.proj == "svd" else P.norm().clamp(min=math.sqrt(P.shape[1]))


def typically_projected(width: int) -> float:
    """R's error in most channels, a sixth to a third of ``projected``. For norms, into which many channels enter."""
    return (0.5 + math.sqrt(width) / 24) * U + NORMAL / 4 / math.sqrt(width)


class Matrix(NamedTuple):
    """A matrix and its state. ``previous`` is u_prev, 0 if there is none yet. Dense moments have the shape of W."""

    W: Tensor
    M: Tensor
    V: Tensor
    previous: Tensor


class Factors(NamedTuple):
    """The results of ``rescale``. s is ``[channels, 1]``, or ``[1, 1]`` for one s per tensor."""

    M: Tensor
    V: Tensor
    N: Tensor
    s: Tensor


class Step(NamedTuple):
    """A matrix after a step, its update, and ``spread``: by how much float32's errors of R and M are likely to change
    the update of each channel, by its norm."""

    after: Matrix
    update: Tensor
    spread: Tensor


def rescale(R: Tensor, M: Tensor, V: Tensor, settings: Settings) -> Factors:
    """Moments and factors s. A channel whose R is not finite keeps its moments."""
    b1, b2 = settings.betas
    finite = R.isfinite().all(1, keepdim=True)
    M = torch.where(finite, b1 * M + (1 - b1) * R, M)
    V = torch.where(finite, b2 * V + (1 - b2) * R * R, V)
    N = M / (V.sqrt() + settings.eps)
    if settings.scale_type == "tensor":
        return Factors(M, V, N, (N.norm() / (R.norm() + 1e-8)).reshape(1, 1))
    return Factors(M, V, N, N.norm(dim=1, keepdim=True) / (R.norm(dim=1, keepdim=True) + 1e-8))


def apply(
    W: Tensor, G: Tensor, s: Tensor, u: Tensor, previous: Tensor, t: int, settings: Settings
) -> tuple[Tensor, ...]:
    """W, u_prev and the update, for u = |s G|. If u is not finite, nothing changes."""
    if not u.isfinite():
        return W, previous, torch.zeros_like(W)
    scale = settings.scale
    if isinstance(scale, str):
        assert settings.rank is not None
        scale = auto_scale(G.shape[1], settings.rank, settings.scale_type)
    root = math.sqrt(scale)
    scale_before_limiter, scale_after_limiter = (root, 1.0) if settings.scale_front else (1.0, root)
    limiter = torch.ones_like(u)
    if not settings.disable_nl:
        u = u * scale_before_limiter
        if previous > 0:
            limiter = (u / (previous + 1e-8)).clamp(min=1.01) / 1.01
        previous = u / limiter if u > 0 else previous
    update = step_size(t, settings) * scale_after_limiter * (s * scale_before_limiter / limiter) * G
    W = W - update
    return W - float(settings.lr) * settings.weight_decay * W, previous, update


def step_size(t: int, settings: Settings) -> float:
    """h of step t."""
    b1, b2 = settings.betas
    return float(settings.lr) * (math.sqrt(1 - b2**t) / (1 - b1**t) if settings.correct_bias else 1.0)


def low_rank_step(before: Matrix, G: Tensor, P: Tensor, t: int, settings: Settings) -> Step:
    """A step of APOLLO: sketch, rescale, apply."""
    W, M, V, previous = before
    R = G @ P.T
    factors = rescale(R, M, V, settings)
    u = (factors.s * G).norm()
    W, previous, update = apply(W, G, factors.s, u, previous, t, settings)
    after = Matrix(W, factors.M, factors.V, previous)
    if not u.isfinite():
        return Step(after, update, torch.zeros_like(W[:, 0]))
    # s = |N| / |R| changes by (dN + s dR) / |R|. M changes with R and by its own roundings, which are large in
    # proportion where M changes sign.
    norms, keep1 = G.norm(dim=1), 1 - settings.betas[0]
    dR = typically_projected(G.shape[1]) * norms * size_of(P, settings)
    dM = keep1 * dR[:, None] / math.sqrt(len(P)) + U * (3 * keep1 * (R - M).abs() + factors.M.abs())
    dN = dM / (factors.V.sqrt() + settings.eps)
    if settings.scale_type == "tensor":
        ds = (dN.norm() + factors.s[0, 0] * dR.norm()) / (R.norm() + 1e-8)
    else:
        ds = (dN.norm(dim=1) + factors.s[:, 0] * dR) / (R.norm(dim=1) + 1e-8)
    spread = ds * norms * (update.norm() / u if u > 0 else 0.0)
    if settings.scale_type == "channel" and not settings.disable_nl and u > 0:
        # The error of the worst channel enters u, and through the limiter all channels.
        spread = spread + update.norm(dim=1) * spread.norm() / update.norm()
    return Step(after, update, spread)


def dense_step(before: Matrix, G: Tensor, t: int, settings: Settings) -> Step:
    """A step of AdamW in APOLLO's convention. A gradient that is not finite changes neither weight nor state.

    V has one element a row if ``second_moment`` is "row": the mean of the row's.
    """
    W, M, V, previous = before
    if not G.isfinite().all():
        return Step(before, torch.zeros_like(W), torch.zeros_like(W))
    b1, b2 = settings.betas
    squares = G * G if V.shape == G.shape else (G * G).flatten(1).mean(1).reshape(V.shape)
    M, V = b1 * M + (1 - b1) * G, b2 * V + (1 - b2) * squares
    update = step_size(t, settings) * M / (V.sqrt() + settings.eps)
    W = W - update
    return Step(
        Matrix(W - float(settings.lr) * settings.weight_decay * W, M, V, previous), update, torch.zeros_like(update)
    )
