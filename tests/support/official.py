"""Runs apollo-torch 1.0.3 beside this package: its projector returns our P, and both train in small loops.

The official package is run and never read, because its licence is CC-BY-NC.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import apollo_torch
import pytest
import torch
from apollo_torch.random_projector import GradientProjector
from oracle import OracleMatrix
from torch import Tensor
from torch.nn import Parameter

from apollo_triton import APOLLOAdamW, projection_matrix

KEYS = {"rank": 3, "proj": "random", "proj_type": "std", "scale_type": "channel", "scale": 1.0, "update_proj_gap": 3}
# A step moves a weight by about lr, so that the path is about as long as the weight. Each of the seven or eight float32
# steps adds errors of about 2**-24 of it, one from the store and a few from the factors.
LR, TOLERANCE = 0.1, 1e-5


def share_projection(monkeypatch: pytest.MonkeyPatch, our_seed: int) -> list[GradientProjector]:
    """Make the official projector return this package's P. Returns a list with the projector of each refresh."""
    refreshed: list[GradientProjector] = []

    def our_matrix(self: GradientProjector, weights: Tensor, rank: int, type: str, seed: int) -> Tensor:
        epoch = sum(projector is self for projector in refreshed)
        refreshed.append(self)
        P = projection_matrix(our_seed, epoch, rank, weights.shape[1 if type == "right" else 0], device=weights.device)
        return (P if type == "right" else P.T).to(weights.dtype)

    monkeypatch.setattr(GradientProjector, "get_orthogonal_matrix", our_matrix)
    return refreshed


def departs(check: Callable[..., None], failure: Any, match: str | None, *args: Any, **keys: Any) -> None:
    """``check`` passes with this package's optimizer and fails in this way with the official one."""
    check(APOLLOAdamW, *args, **keys)
    with pytest.raises(failure, match=match):
        check(apollo_torch.APOLLOAdamW, *args, **keys)


def group(*params: Tensor, **keys: Any) -> dict[str, Any]:
    """A low-rank group with every key, as the official code requires it."""
    return {"params": list(params), **KEYS, **keys}


def weight(*shape: int, dtype: torch.dtype = torch.float32) -> Parameter:
    return Parameter(torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype))


def gradients(*shape: int, steps: int = 7, dtype: torch.dtype = torch.float32, seed: int = 1) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator).to(dtype) for _ in range(steps)]


def several(kind: type, parameters: list[Parameter], constructor: dict[str, Any], **keys: Any) -> torch.optim.Optimizer:
    """An optimizer whose parameters are low-rank, except for the last one, which is dense."""
    return kind([group(*parameters[:-1], **keys), {"params": parameters[-1:]}], lr=LR, **constructor)


def train(optimizer: torch.optim.Optimizer, parameters: list[Parameter], sequences: list[list[Tensor]]) -> None:
    """One step per gradient. ``sequences`` has a list of gradients for each parameter."""
    for given in zip(*sequences, strict=True):
        for parameter, gradient in zip(parameters, given, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()


def alone(kind: type, start: Tensor, sequence: list[Tensor], options: dict | None = None, **keys: Any) -> Tensor:
    """The weight after these gradients, with a low-rank optimizer that has no other weight."""
    parameter = Parameter(start.detach().clone())
    train(kind([group(parameter, **keys)], lr=LR, **(options or {})), [parameter], [sequence])
    return parameter.detach()


def exact(start: Tensor, sequence: list[Tensor], **options: Any) -> Tensor:
    oracle = OracleMatrix(start, lr=LR, **(KEYS | options))
    for gradient in sequence:
        oracle.step(gradient)
    return oracle.weight


def close(found: Tensor, expected: Tensor, start: Tensor) -> bool:
    return bool((found.detach() - expected).norm() < TOLERANCE * (expected - start.detach()).norm())


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors of a state, including those in dictionaries and in the official projector."""
    if isinstance(value, GradientProjector):
        value = vars(value)
    values = value.values() if isinstance(value, dict) else ()
    return [value] if isinstance(value, Tensor) else [found for item in values for found in tensors_of(item)]
