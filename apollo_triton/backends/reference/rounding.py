"""How float32 results become weights and moments: the decay, and the rounding at the store."""

from __future__ import annotations

import torch
from torch import Tensor

from ...core.philox import Stream, round_stochastic
from ...core.settings import Settings


def shrink(W: Tensor, decay: float | Tensor) -> None:
    """W <- W - decay W. Not W.mul_(1 - decay): rounding 1 - decay errs the same way at every step, by up to 3 % of a
    decay of 1e-6."""
    if isinstance(decay, Tensor):
        W.addcmul_(W, decay, value=-1)
    else:
        W.add_(W, alpha=-decay)


def store(values: Tensor, target: Tensor, settings: Settings, seed: int, step: int, stream: Stream, start: int) -> None:
    """Round float32 ``values`` into ``target``, whose first element is number ``start`` of its parameter.

    bfloat16 moments always round stochastically (b2 = 0.999 cannot move them otherwise), bfloat16 weights when
    asked to.
    """
    stochastic = settings.stochastic_rounding or stream != Stream.WEIGHT
    if stochastic and target.dtype == torch.bfloat16:
        values = round_stochastic(values, seed, step, stream, start)
    target.copy_(values)
