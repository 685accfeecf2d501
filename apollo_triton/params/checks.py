"""What a parameter and its gradient may be. The errors name the parameter and say what to do.

Nothing here changes anything. The optimizer calls these functions before it changes anything itself.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.dtensors import is_dtensor, local
from ..core.geometry import FLATTENED, is_flattened
from ..core.settings import Settings
from ..int8.weight import Int8Weight, int8_weight_of
from .aliasing import check_elements
from .member import Param, find_shard, geometry_of

WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_NO_ZERO = (
    "its rows and columns are gone, so it cannot be projected; use FSDP2, torch.distributed.fsdp.fully_shard(model), "
    "which shards as ZeRO-3 does and keeps them, or ZeRO stage 0"
)


def _foreign_type(tensor: Tensor) -> str | None:
    """The class of a tensor that computes in a way of its own, and may keep its numbers anywhere: its name, None for
    what we know. Subclasses without ``__torch_dispatch__`` are tensors like any other."""
    if type(tensor) in (torch.nn.Parameter, Tensor):
        return None
    if is_dtensor(tensor):
        tensor = local(tensor)
    kind = type(tensor)
    if kind.__torch_dispatch__ is Tensor.__torch_dispatch__ or isinstance(tensor, Int8Weight):
        return None
    return None if hasattr(tensor, "fake_mode") else f"{kind.__module__}.{kind.__name__}"


def holds_matrix(group: dict[str, Any]) -> bool:
    """Whether a parameter of the group has two dimensions or more."""
    return any(parameter.dim() > 1 for parameter in group["params"])


def check_groups(groups: list[dict[str, Any]], had_matrix: list[bool]) -> None:
    """Raise ValueError for a low-rank group that was given matrices and now holds only vectors, since AdamW would train
    them silently. ``check_parameter`` reports FSDP1's vectors, with advice for FSDP1."""
    first_index = 0
    for group_index, (group, had) in enumerate(zip(groups, had_matrix, strict=False)):  # groups may have been replaced
        flattened = had and group.get("rank") is not None and group["params"] and not holds_matrix(group)
        if flattened and not is_flattened(group["params"][0]):
            raise ValueError(
                f"parameter group {group_index} was given matrices, and its parameter {first_index} is now a vector of "
                f"shape {tuple(group['params'][0].shape)}, as DeepSpeed ZeRO makes of them: {_NO_ZERO}"
            )
        first_index += len(group["params"])


def lost_shape(parameter: Tensor) -> str:
    """What has made a vector of a matrix, as the end of an error that begins with its name; "" for any other."""
    if parameter.dim() > 1:
        return ""
    if is_flattened(parameter):
        return FLATTENED
    whole = tuple(getattr(parameter, "ds_shape", ()))
    return f"is what DeepSpeed ZeRO-3 left of a weight of shape {whole}: {_NO_ZERO}" if len(whole) > 1 else ""


def check_parameter(param: Param, settings: Settings) -> None:
    """Raise ValueError unless the parameter's dtype, sharding and shape suit its group."""
    parameter = param.tensor
    trained = parameter.requires_grad or parameter.grad is not None
    if trained and parameter.dtype not in WEIGHT_DTYPES:  # a frozen one may be of any dtype, e.g. quantised
        raise ValueError(
            f"{param} has dtype {parameter.dtype}; weights may be float32, bfloat16 or float16: "
            "convert the model first, e.g. model.float()"
        )
    kind = _foreign_type(parameter) if trained else None
    if kind is not None:
        raise ValueError(
            f"{param} is a {kind}, a tensor subclass that this optimizer does not know and could update wrongly or by "
            "half; known are plain tensors, DTensor and the int8 weights of apollo_triton.quantize_model. Train the "
            "model before it is converted, or leave this parameter to another optimizer"
        )
    if trained and parameter.is_inference():
        raise ValueError(
            f"{param} was made under torch.inference_mode(), and nothing outside may change it; make the model outside"
        )
    if trained and parameter.is_neg():
        raise ValueError(
            f"{param} is negated where it is read, not in memory (a view of a complex conjugate), and the kernels "
            "would move it the wrong way; use nn.Parameter(weight.detach().resolve_neg())"
        )
    if trained:
        check_elements(param)
    int8_weight = int8_weight_of(parameter)
    if int8_weight is not None:
        try:
            int8_weight.check()
        except ValueError as error:
            raise ValueError(f"{param}: {error}") from None
    if int8_weight is not None and settings.rank is None:
        raise ValueError(
            f"{param} is int8 and its group has no 'rank': AdamW does not train int8 weights; put it into a low-rank "
            "group, or leave it out of quantize_model's target_modules"
        )
    shard = find_shard(param, settings)
    if settings.capturable and is_dtensor(parameter):
        raise ValueError(f"{param} is a DTensor, whose step communicates and is not captured; use capturable=False")
    if settings.rank is not None and (lost := lost_shape(parameter)):
        raise ValueError(f"{param} {lost}, or put it into a group without 'rank'")
    geometry = geometry_of(parameter, settings)
    if geometry is None or settings.rank is None:
        return
    if settings.rank > geometry.width and not settings.rank_above_width:
        raise ValueError(
            f"{param}: rank {settings.rank} is above its projected width {geometry.width}, which would inflate the "
            f"state; use a rank of at most {geometry.width}, put it into a group without 'rank', or allow it by "
            "'rank_above_width': True in the group"
        )
    if settings.proj == "svd" and shard.sum_axes:
        raise ValueError(
            f"{param} is sharded ({parameter.placements}), and proj='svd' needs the singular vectors of the whole "  # type: ignore[attr-defined]
            "gradient; use proj='random'"
        )
    if settings.proj == "svd" and settings.rank > min(geometry.rows, geometry.columns):
        raise ValueError(
            f"{param}: rank {settings.rank} is above its {min(geometry.rows, geometry.columns)} singular vectors; "
            "use a smaller rank or proj='random'"
        )


def check_gradient(param: Param, gradient: Tensor) -> None:
    """Raise RuntimeError or ValueError unless the gradient is dense, real and floating-point, and matches its
    parameter."""
    parameter = param.tensor
    kind = _foreign_type(gradient)
    if kind is not None:
        raise ValueError(
            f"{param}: its gradient is a {kind}, a tensor subclass that this optimizer does not know; give it a plain "
            "tensor or a DTensor"
        )
    int8_weight = int8_weight_of(parameter)
    inner = parameter if int8_weight is None else int8_weight.q
    if hasattr(gradient, "fake_mode") != hasattr(inner, "fake_mode"):
        raise ValueError(
            f"{param} and its gradient: one of the two is a fake tensor of a FakeTensorMode, the other is not; make "
            "both within it, or neither"
        )
    if is_dtensor(gradient) != is_dtensor(parameter):
        raise ValueError(
            f"{param} and its gradient must both be DTensors, or neither: the parameter is a "
            f"{type(parameter).__name__}, the gradient a {type(gradient).__name__}"
        )
    if is_dtensor(parameter) and gradient.device_mesh != parameter.device_mesh:  # type: ignore[attr-defined]
        raise ValueError(
            f"{param}: its gradient is a DTensor of another device mesh ({gradient.device_mesh}) than "  # type: ignore[attr-defined]
            f"its own ({parameter.device_mesh}); redistribute it to the weight's"  # type: ignore[attr-defined]
        )
    if gradient.layout != torch.strided:
        raise RuntimeError(
            f"{param}: APOLLOAdamW does not support sparse gradients; use sparse=False in the embedding, "
            "or torch.optim.SparseAdam for it"
        )
    if not gradient.is_floating_point():
        raise RuntimeError(f"{param}: its gradient has dtype {gradient.dtype}, which is not a real floating-point type")
    if gradient.dtype not in WEIGHT_DTYPES:
        raise ValueError(
            f"{param}: its gradient has dtype {gradient.dtype}; gradients may be float32, bfloat16 or float16: convert "
            "it, e.g. parameter.grad.float()"
        )
    if gradient.is_neg():
        raise ValueError(
            f"{param}: its gradient is negated where it is read, not in memory (a view of a complex conjugate); "
            "use parameter.grad = parameter.grad.resolve_neg()"
        )
    if gradient.shape != parameter.shape or gradient.device != parameter.device:
        raise ValueError(
            f"{param} on {parameter.device}: its gradient has shape {tuple(gradient.shape)} on {gradient.device}; "
            "both must agree (was the parameter resized or moved after its gradient was made?)"
        )
