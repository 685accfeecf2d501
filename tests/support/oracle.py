"""A second implementation of the algorithm, in float64 and for one matrix at a time. The package is tested against it.

It is written from the paper's equations alone, and shares no code with the package except ``projection_matrix``, and
of the law of ``scale="auto"`` its one constant, which is measured.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from apollo_triton import projection_matrix


class OracleMatrix:
    """One matrix under APOLLO. ``weight`` is float64 and never rounded."""

    def __init__(self, weight: Tensor, rank: int, **options: object) -> None:
        self.weight = weight.detach().double().clone()
        self.rank = rank
        self.options = {
            "lr": 1e-3,
            "betas": (0.9, 0.999),
            "eps": 1e-6,
            "weight_decay": 0.0,
            "correct_bias": True,
            "scale_front": False,
            "disable_nl": False,
            "seed": 0,
            "proj_type": "std",
            "scale_type": "channel",
            "scale": 1.0,
            "update_proj_gap": 200,
            "distribution": "gaussian",
        } | options
        rows, columns = weight.shape
        self.keeps_rows = {
            "std": rows >= columns,
            "reverse_std": rows < columns,
            "right": True,
            "left": False,
        }[self.options["proj_type"]]
        channels, width = (rows, columns) if self.keeps_rows else (columns, rows)
        self.scale = self.options["scale"]
        if self.scale == "auto":
            # N of ``width`` numbers is sqrt(width / rank) times as long as that of ``rank``. Each channel's 1 / |R_c|^2
            # is rank / (rank - 2) times 1 / |G_c|^2 on average, and without a mean at ranks 1 and 2 counts as at 3.
            in_the_mean = max(rank, 3) / (max(rank, 3) - 2) if self.options["scale_type"] == "channel" else 1
            # 8: an update has sqrt(8) times the norm of AdamW's, since its noise is averaged by nothing.
            self.scale = 8 * width / rank / in_the_mean
        self.M = torch.zeros(channels, rank, dtype=torch.float64, device=weight.device)
        self.V = torch.zeros_like(self.M)
        self.update_norm: float | None = None
        self.step_count = 0
        # The largest |G| |P| / |R| so far, of a channel or the tensor. The relative rounding error of R grows by it.
        self.conditioning = 0.0

    def step(self, gradient: Tensor, projection: Tensor | None = None) -> None:
        """One update. ``projection`` replaces the random P. It is given for svd, whose signs are not unique."""
        o = self.options
        G = gradient.double() if self.keeps_rows else gradient.double().T
        b1, b2 = o["betas"]
        self.step_count += 1
        t = self.step_count
        epoch = (t - 1) // o["update_proj_gap"]
        P = projection
        if P is None:
            P = projection_matrix(o["seed"], epoch, self.rank, G.shape[1], distribution=o["distribution"]).to(G)
        R = G @ P.T
        dims = {"dim": 1} if o["scale_type"] == "channel" else {}
        self.conditioning = max(self.conditioning, (P.norm() * G.norm(**dims) / R.norm(**dims)).max().item())
        self.M = b1 * self.M + (1 - b1) * R
        self.V = b2 * self.V + (1 - b2) * R * R
        N = self.M / (self.V.sqrt() + o["eps"])
        if o["scale_type"] == "channel":
            s = (N.norm(dim=1) / (R.norm(dim=1) + 1e-8))[:, None]
        else:
            s = N.norm() / (R.norm() + 1e-8)
        update = s * G
        if o["scale_front"]:
            update = update * math.sqrt(self.scale)
        if not o["disable_nl"]:
            u = update.norm().item()
            limiter = 1.0 if self.update_norm is None else max(u / (self.update_norm + 1e-8), 1.01) / 1.01
            if u > 0:
                self.update_norm = u / limiter
            update = update / limiter
        if not o["scale_front"]:
            update = update * math.sqrt(self.scale)
        h = o["lr"] * (math.sqrt(1 - b2**t) / (1 - b1**t) if o["correct_bias"] else 1)
        self.weight -= h * (update if self.keeps_rows else update.T)
        self.weight -= o["lr"] * o["weight_decay"] * self.weight


def oracle_adamw(weight, gradients, lr, betas, eps, weight_decay, correct_bias=True, second_moment="element"):
    """AdamW for the dense parameters, with the same conventions and in float64. With the second moments of rows, every
    element of a row has that of their mean square (arXiv 2406.16793)."""
    W = weight.detach().double().clone()
    M, V = torch.zeros_like(W), torch.zeros_like(W)
    for t, gradient in enumerate(gradients, 1):
        G = gradient.double()
        M = betas[0] * M + (1 - betas[0]) * G
        squares = G * G
        if second_moment == "row" and G.dim() > 1 and G.numel():
            squares = torch.stack([torch.full_like(row, row.mean().item()) for row in squares])
        V = betas[1] * V + (1 - betas[1]) * squares
        h = lr * (math.sqrt(1 - betas[1] ** t) / (1 - betas[0] ** t) if correct_bias else 1)
        W -= h * M / (V.sqrt() + eps)
        W -= lr * weight_decay * W
    return W
