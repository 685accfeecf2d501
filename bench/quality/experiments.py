"""What the study tries and the package does not have: other limiters, momentum carried over a refresh, a head with
momentum alone. They are written for the study's small models, and do not belong on a GPU's way.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor

from apollo_triton import APOLLOAdamW, projection_matrix
from apollo_triton.core.geometry import Geometry
from apollo_triton.core.scale import scale_of
from apollo_triton.core.settings import Settings


class FlooredLimiter(APOLLOAdamW):
    """The limiter compares with at least ``FLOOR`` times the learning rate a weight (root mean square).

    So an update that is smaller than a third of AdamW's usual one, 0.3 times the rate, may grow at once.
    """

    FLOOR = 0.1

    def step(self, closure: Any = None) -> Any:
        for weight, settings, state in _low_rank(self):
            scale = scale_of(settings, Geometry.of(weight.shape, settings.proj_type))
            norm = state["update_norm"]  # of the update before sqrt(scale) and the rate
            norm.clamp_(min=self.FLOOR * math.sqrt(weight.numel() / scale))
        return super().step(closure)


class CarriedMomentum(APOLLOAdamW):
    """At a refresh the first moment goes over to the new projection P': M <- M (P P^T)^-1 P P'^T.

    That is the projection by P' of the smallest gradient whose projection by P is M. The second moment stays.
    """

    def step(self, closure: Any = None) -> Any:
        for weight, settings, state in _low_rank(self):
            step = int(state["step"]) + 1
            epoch = settings.epoch(step)
            if settings.epoch(step - 1) != epoch:
                width = Geometry.of(weight.shape, settings.proj_type).width
                old, new = (self._projection(state, settings, number, width) for number in (epoch - 1, epoch))
                state["exp_avg"].copy_(state["exp_avg"] @ torch.linalg.lstsq(old.T, new.T).solution)
        return super().step(closure)

    @staticmethod
    def _projection(state: dict[str, Any], settings: Settings, epoch: int, width: int) -> Tensor:
        return projection_matrix(
            int(state["seed"]), epoch, int(settings.rank or 0), width, distribution=settings.distribution
        )


class RowMomentum(torch.optim.Optimizer):
    """Momentum alone, without a second moment: M <- b M + (1 - b) G, W_i <- W_i - lr share M_i / rms(M_i), a row i at
    a time, as SCALE (arXiv 2506.16659) does for the head. ``share`` is the size of its updates in rates."""

    def __init__(self, params: Iterable[Tensor], lr: float, share: float, beta: float = 0.9) -> None:
        super().__init__(params, {"lr": lr, "share": share, "beta": beta})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["exp_avg"] = torch.zeros_like(weight)
                momentum = state["exp_avg"].lerp_(weight.grad, 1 - group["beta"])
                size = momentum.square().mean(dim=1, keepdim=True).sqrt().clamp_(min=1e-12)
                weight.sub_(momentum / size, alpha=group["lr"] * group["share"])


def _low_rank(optimizer: APOLLOAdamW) -> Iterator[tuple[Tensor, Settings, dict[str, Any]]]:
    """The low-rank weights that have a state, with their settings."""
    for group in optimizer.param_groups:
        if group.get("rank") is not None:
            settings = Settings.of(group)
            for weight in group["params"]:
                if optimizer.state[weight]:
                    yield weight, settings, optimizer.state[weight]
