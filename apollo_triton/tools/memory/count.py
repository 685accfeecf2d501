"""Exact bytes of weights, gradients and optimizer state, with AdamW, AdamW-8bit and APOLLO."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import nn

from ...core.moments_8bit import BLOCK
from ...optimizer import APOLLOAdamW
from ...summary import Summary

FLOAT32_BYTES = 4
# bitsandbytes keeps float32 moments for tensors of fewer elements.
SMALLEST_8BIT = 4096


@dataclass(frozen=True)
class Memory:
    """Bytes of a model in training, without activations and without memory that is used only during a step.

    ``moments`` are the first and second moments. ``other`` is the rest of the optimizer's state: for each parameter a
    float32 ``step`` (on the host) and APOLLO's ``update_norm``; a stored svd projection; 8-bit scales and maps.

    >>> Memory(weights=32, gradients=32, moments=64, other=4).total
    132
    """

    weights: int
    gradients: int
    moments: int
    other: int

    @property
    def state(self) -> int:
        """Bytes of the optimizer's state: moments and other."""
        return self.moments + self.other

    @property
    def total(self) -> int:
        """Bytes of weights, gradients and state."""
        return self.weights + self.gradients + self.state


def adamw(model: nn.Module) -> Memory:
    """Bytes with ``torch.optim.AdamW``, whose moments have the dtype of the weights.

    >>> adamw(nn.Linear(4, 2, bias=False))
    Memory(weights=32, gradients=32, moments=64, other=4)
    """
    parameters = _trained(model)
    return _with_state(model, 2 * sum(p.nbytes for p in parameters), FLOAT32_BYTES * len(parameters))


def adamw_8bit(model: nn.Module) -> Memory:
    """Bytes with ``bitsandbytes.optim.AdamW8bit`` (0.44 or newer): a byte per moment, a float32 scale per 256 of them.

    Tensors of fewer than 4096 elements keep float32 moments. All parameters share two maps of 256 float32 values.

    >>> adamw_8bit(nn.Linear(64, 64, bias=False)).other == 4 * (2 * 16 + 2 * 256)
    True
    """
    sizes = [p.numel() for p in _trained(model)]
    large = [size for size in sizes if size >= SMALLEST_8BIT]
    moments = 2 * (sum(large) + FLOAT32_BYTES * (sum(sizes) - sum(large)))
    scales = 2 * sum(-(-size // BLOCK) for size in large)
    return _with_state(model, moments, FLOAT32_BYTES * (scales + (2 * 256 if large else 0)))


def apollo(model: nn.Module, rank: int = 256, **options: Any) -> Memory:
    """Bytes with ``APOLLOAdamW.apollo(model, rank, **options)``: moments of matrices are ``[channels, rank]``.

    >>> apollo(nn.ModuleDict({"mlp": nn.Linear(32, 64, bias=False)}), rank=4)
    Memory(weights=8192, gradients=8192, moments=2048, other=8)
    """
    return of_summary(model, APOLLOAdamW.apollo(model, rank, **options).summary())


def apollo_mini(model: nn.Module, **options: Any) -> Memory:
    """Bytes with ``APOLLOAdamW.mini(model, **options)``: moments of rank 1.

    >>> apollo_mini(nn.ModuleDict({"mlp": nn.Linear(32, 64, bias=False)})).moments == 4 * 2 * 64
    True
    """
    return of_summary(model, APOLLOAdamW.mini(model, **options).summary())


def of_summary(model: nn.Module, summary: Summary) -> Memory:
    """Bytes with the optimizer of ``model`` that has this summary."""
    moments = sum(row.moment_bytes for row in summary.rows)
    return _with_state(model, moments, summary.state_bytes - moments)


def _trained(model: nn.Module) -> list[nn.Parameter]:
    return [parameter for parameter in model.parameters() if parameter.requires_grad]


def _with_state(model: nn.Module, moments: int, other: int) -> Memory:
    weights = sum(parameter.nbytes for parameter in model.parameters())
    # An int8 weight has a float gradient.
    gradients = sum(parameter.numel() * parameter.element_size() for parameter in _trained(model))
    return Memory(weights, gradients, moments, other)
