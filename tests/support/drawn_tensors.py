"""Weights and gradients of a seed, the same on every device."""

from __future__ import annotations

import torch


def normals(shape, seed):
    """Of a seed, the same on every device."""
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed), device="cpu")
    return values.to(torch.get_default_device())


def gradients_for(shape, count, seed, scale=1e-2):
    generator = torch.Generator().manual_seed(seed)
    # A common part keeps channels from being pure noise, and makes the moments point somewhere.
    common, *own = [torch.randn(shape, generator=generator, device="cpu") for _ in range(count + 1)]
    return [scale * (common + each).to(torch.get_default_device()) for each in own]
