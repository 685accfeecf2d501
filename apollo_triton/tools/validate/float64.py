"""The algorithm in float64, one matrix at a time, and by how much float32 may differ: for ``apollo-triton validate``.

Written from the equations (arXiv 2412.05270, algorithm 1; arXiv 2410.01623, equation 6), and sharing no code with the
engines. Matrices come channels first: G and W are ``[channels, width]``, R, M, V and N ``[channels, rank]``.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from ...core.settings import Settings

U = 2.0**-24  # the relative error of one float32 operation
# Compiled kernels take PTX's approximate square roots and quotients: 2 U and 4 U each at most, instead of U.
# One step's update, by its norm: two roots and three quotients in s, three more in the limiter and ten other operations
# are 38 U = 2.3e-6 were every one at its worst in the same direction. An s that is off by 1e-5 is five times the limit.
UPDATE = 2e-6
# One channel's s: M cancels where R turns, so that its error, 2 U, is one of |M| + |R|; V and its root 3 U, three roots
# or quotients 10 U.
FACTOR = 16 * U
# u_prev from u^2: the sum of the partial sums 2 U, a root, three quotients. The same and two products are in an update
# given s or its sums, which takes another root and quotient for one s a tensor.
NORM = 16 * U
UPDATE_GIVEN_S = 24  # times U
# Sums of squares do not cancel. Kernels add as trees; a CPU's dot product of 2**20 terms in 16 strands of 2**16 is off
# by sqrt(2**16 / 3 / 16) U = 37 U = 2.2e-6.
SQUARES = 2.2e-6
# Where tensor cores add up |G_c|^2 they cut off 0.7 U of it for each 16 terms (seen on an H100).
CUT_OFF = U / 16


# Elementwise, where each operand is weighted with how often it is rounded: the worst case is then U. The slack covers
# terms in U^2.
ELEMENTWISE = 1.01 * U
# Each path rounds the same float32 number, so 16-bit results differ from float64's, rounded once to nearest or by the
# same random bits, only where float32's error of 1e-7 straddles a boundary. Those are 2**-8 of the number apart in
# bfloat16 and 2**-11 in float16: 3e-5 and 2e-4 of all entries of a case. Few entries scatter: with 3 more allowed,
# four where 0.1 are expected, a right result misses once in 300 000 cases.
STRADDLING, STRAGGLERS = 1e-3, 3
# float32 Box-Muller against float64, of numbers up to 5.8: 4e-7 by logarithm, root and sine; 3 U as in the next line.
NORMAL = 4e-7 + 3 * U
SCALED = 3 * U  # exact normals and signs: 1 / sqrt(rank), the product with it, and projection_matrix's own rounding
ORTHONORMAL = 256 * U  # singular vectors: LAPACK's are 10 to 30 U off and energies twice as much, cuSOLVER's 180 U
EXACTLY = 0.0


def projected(width: int) -> float:
    """Limit of R as a share of |G_c| |P|. A sum of random signs wanders to sqrt(width) times a term, so that all its
    roundings together are 0.4 U of that, 3 U in the worst of thousands of channels. Tensor cores cut off instead: each
    16 terms pull R, which is |G_c| |P| / sqrt(width), 2 U towards zero. Few normals show their own error."""
    return (3 + math.sqrt(width) / 8) * U + NORMAL / math.sqrt(width)


def size_of(P: Tensor, o: Settings) -> Tensor:
    """|P|; of a random one at least what is expected: float32's normals are off by a share of 1, not of themselves."""
    return P.norm() if o.proj == "svd" else P.norm().clamp(min=math.sqrt(P.shape[1]))


def typically_projected(width: int) -> float:
    """The same for most channels, a sixth or a third: for what enters many channels together, by its norm."""
    return (0.5 + math.sqrt(width) / 24) * U + NORMAL / 4 / math.sqrt(width)


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
    """A matrix after a step, its update, and ``spread``: how far float32's R and M are apt to take each channel's."""

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
    # s = |N| / |R| moves by (dN + s dR) / |R|. M moves with R, and by its own roundings, which are much where it turns.
    norms, keep1 = G.norm(dim=1), 1 - o.betas[0]
    dR = typically_projected(G.shape[1]) * norms * size_of(P, o)
    dM = keep1 * dR[:, None] / math.sqrt(len(P)) + U * (3 * keep1 * (R - M).abs() + factors.M.abs())
    dN = dM / (factors.V.sqrt() + o.eps)
    if o.scale_type == "tensor":
        ds = (dN.norm() + factors.s[0, 0] * dR.norm()) / (R.norm() + 1e-8)
    else:
        ds = (dN.norm(dim=1) + factors.s[:, 0] * dR) / (R.norm(dim=1) + 1e-8)
    spread = ds * norms * (update.norm() / u if u > 0 else 0.0)
    if (
        o.scale_type == "channel" and not o.disable_nl and u > 0
    ):  # the limiter hands on to all channels what u has of the worst
        spread = spread + update.norm(dim=1) * spread.norm() / update.norm()
    return Step(after, update, spread)


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
