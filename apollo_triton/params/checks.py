"""What a parameter and its gradient may be, and errors that name the parameter and what to do.

Nothing here changes anything: the optimizer calls these before it does.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.settings import Settings
from ..int8.weight import Int8Weight
from .member import Label, find_piece, geometry_of
from .sharding import is_dtensor

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SHARDED_8BIT = (
    "it is a DTensor, and 8-bit moments are not sharded, since their blocks of 256 would span ranks; use "
    "state_bits=32, with state_dtype=torch.bfloat16 for moments of half the size"
)
_NO_ZERO = (
    "its rows and columns are gone, so it cannot be projected; use FSDP2, torch.distributed.fsdp.fully_shard(model), "
    "which shards as ZeRO-3 does and keeps them, or ZeRO stage 0"
)


def is_flattened(parameter: Tensor) -> bool:
    """Whether it is FSDP1's one flat parameter, or with use_orig_params=True one of its shards, a vector a weight."""
    return getattr(parameter, "_is_flat_param", False) or getattr(parameter, "_fsdp_flattened", False)


def holds_matrix(group: dict[str, Any]) -> bool:
    """Whether a parameter of the group has two dimensions or more."""
    return any(parameter.dim() > 1 for parameter in group["params"])


def check_groups(groups: list[dict[str, Any]], had_matrix: list[bool]) -> None:
    """Raise ValueError for a low-rank group that once had matrices and now has vectors alone: AdamW would train them
    without a word. FSDP1's are left to ``check_parameter``, which knows them."""
    first = 0
    for number, (group, had) in enumerate(zip(groups, had_matrix, strict=False)):  # groups may have been replaced
        flattened = had and group.get("rank") is not None and group["params"] and not holds_matrix(group)
        if flattened and not is_flattened(group["params"][0]):
            raise ValueError(
                f"parameter group {number} was given matrices, and its parameter {first} is now a vector of shape "
                f"{tuple(group['params'][0].shape)}, as DeepSpeed ZeRO makes of them: {_NO_ZERO}"
            )
        first += len(group["params"])


def check_parameter(label: Label, settings: Settings) -> None:
    """Raise ValueError unless the parameter's dtype, layout and shape suit its group."""
    parameter = label.parameter
    trained = parameter.requires_grad or parameter.grad is not None
    if trained and parameter.dtype not in WEIGHT_DTYPES:  # frozen ones, quantised say, may be anything
        raise ValueError(
            f"{label} has dtype {parameter.dtype}; weights may be float32, bfloat16 or float16: "
            "convert the model first, e.g. model.float()"
        )
    if isinstance(parameter, Int8Weight) and settings.rank is None:
        raise ValueError(
            f"{label} is int8 and its group has no 'rank': AdamW's updates are not made for it; put it into a low-rank "
            "group, or leave it out of quantize_model's target_modules"
        )
    piece = find_piece(label, settings)
    if settings.capturable and is_dtensor(parameter):
        raise ValueError(f"{label} is a DTensor, whose step communicates and is not captured; use capturable=False")
    if settings.state_bits == 8 and is_dtensor(parameter):
        raise ValueError(f"{label}: {SHARDED_8BIT}")
    if settings.rank is not None and is_flattened(parameter) and parameter.dim() < 2:
        raise ValueError(
            f"{label} is a flattened FSDP shard: its rows and columns are gone, so it cannot be projected; "
            "shard with FSDP2, torch.distributed.fsdp.fully_shard(model), which keeps them, or wrap with "
            "FullyShardedDataParallel(..., use_orig_params=True, sharding_strategy=NO_SHARD), "
            "or put it into a group without 'rank'"
        )
    whole_shape = tuple(getattr(parameter, "ds_shape", ()))
    if settings.rank is not None and len(whole_shape) > 1 and parameter.dim() < 2:
        raise ValueError(f"{label} is what DeepSpeed ZeRO-3 left of a weight of shape {whole_shape}: {_NO_ZERO}")
    geometry = geometry_of(parameter, settings)
    if geometry is None or settings.rank is None:
        return
    if settings.rank > geometry.width and not settings.rank_above_width:
        raise ValueError(
            f"{label}: rank {settings.rank} is above its projected width {geometry.width}, which would inflate the "
            f"state; use a rank of at most {geometry.width}, put it into a group without 'rank', or allow it by "
            "'rank_above_width': True in the group"
        )
    if settings.proj == "svd" and piece.summed:
        raise ValueError(
            f"{label} is sharded ({parameter.placements}), and proj='svd' needs the singular vectors of the whole "  # type: ignore[attr-defined]
            "gradient; use proj='random'"
        )
    if settings.proj == "svd" and settings.rank > min(geometry.rows, geometry.columns):
        raise ValueError(
            f"{label}: rank {settings.rank} is above its {min(geometry.rows, geometry.columns)} singular vectors; "
            "use a smaller rank or proj='random'"
        )


def check_gradient(label: Label, gradient: Tensor) -> None:
    """Raise RuntimeError or ValueError unless the gradient is a dense real one like its parameter."""
    parameter = label.parameter
    if is_dtensor(gradient) != is_dtensor(parameter):
        raise ValueError(
            f"{label} and its gradient must both be DTensors, or neither: the parameter is a "
            f"{type(parameter).__name__}, the gradient a {type(gradient).__name__}"
        )
    if is_dtensor(parameter) and gradient.device_mesh != parameter.device_mesh:  # type: ignore[attr-defined]
        raise ValueError(
            f"{label}: its gradient is a DTensor of another device mesh ({gradient.device_mesh}) than "  # type: ignore[attr-defined]
            f"its own ({parameter.device_mesh}); redistribute it to the weight's"  # type: ignore[attr-defined]
        )
    if gradient.layout != torch.strided:
        raise RuntimeError(
            f"{label}: APOLLOAdamW does not support sparse gradients; use sparse=False in the embedding, "
            "or torch.optim.SparseAdam for it"
        )
    if not gradient.is_floating_point():
        raise RuntimeError(f"{label}: its gradient has dtype {gradient.dtype}, which is not a real floating-point type")
    if gradient.dtype not in WEIGHT_DTYPES:
        raise ValueError(
            f"{label}: its gradient has dtype {gradient.dtype}; gradients may be float32, bfloat16 or float16: convert "
            "it, e.g. parameter.grad.float()"
        )
    if gradient.is_neg():
        raise ValueError(
            f"{label}: its gradient is negated where it is read, not in memory (a view of a complex conjugate); "
            "use parameter.grad = parameter.grad.resolve_neg()"
        )
    if gradient.shape != parameter.shape or gradient.device != parameter.device:
        raise ValueError(
            f"{label} on {parameter.device}: its gradient has shape {tuple(gradient.shape)} on {gradient.device}; "
            "both must agree (was the parameter resized or moved after its gradient was made?)"
        )
