"""A linear layer's gradient as the two factors that a backward pass has of it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class Operands(NamedTuple):
    """A linear layer's gradient as two factors: G [out, in] = output_gradient^T inputs, which is never formed."""

    inputs: Tensor  # X [tokens, in], contiguous
    output_gradient: Tensor  # dY [tokens, out], contiguous, same dtype and device
