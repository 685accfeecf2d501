"""What was most likely not meant, in what an optimizer is given: warnings, each given once, when a group is added."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.coverage import narrowness
from ..core.messages import shown, warn
from ..core.scale import LEAST_CHANNEL_RANK, scale_of
from ..core.settings import AUTO, Settings
from ..core.spelling import unread_keys
from ..int8.weight import int8_weight_of
from .blocks import obstacle_anywhere
from .member import Param, geometry_of, params_of

# At lower rates bfloat16 weights lose more than 6 % of their way. In the measurement of docs/options.md, weights of a
# size of 0.02 went with AdamW 16 % of it at 1e-5, 33 % at 3e-5, 94 % at 1e-4 and all at 2e-4. A low-rank update of k
# times AdamW's norm goes as far at 1/k of the rate: with scale="auto" 46 % at 1e-5 and 89 % at 3e-5.
LEAST_BFLOAT16_LR = 1e-4
# From here on a rate looks like the paper's 1e-2, and wide matrices do not take it from AdamW. In bench/rates.py
# AdamW's best was 5e-3 at a width of 128, and lower from 256 on.
HIGH_AUTO_LR, WIDE = 5e-3, 512


def check_is_no_model(params: Any, optimizer: str) -> None:
    """Raise TypeError for a model, or one group, where an iterable is wanted."""
    if isinstance(params, nn.Module):
        raise TypeError(
            f"{optimizer} was given a model ({type(params).__name__}) as params; use {optimizer}.apollo(model, ...) "
            f"for APOLLO, or {optimizer}.mini(model, ...) for APOLLO-Mini; {optimizer}(model.parameters()) is AdamW"
        )
    if isinstance(params, dict):
        raise TypeError(
            f"{optimizer} was given a dictionary as params, with the keys {shown(list(params))}; give parameters, or a "
            "list of groups: [{'params': ..., 'rank': ...}, {'params': ...}]"
        )


def advise_on_keys(group: dict[str, Any], where: str) -> None:
    """Warn of keys that do nothing, of a group as it was given."""
    for note in unread_keys(group):
        warn(f"{where}: {note}")


def advise_on_group(params: Sequence[Param], settings: Settings, lr: float, where: str) -> None:
    """Warn of a low-rank group without matrices, of ranks without an auto scale, of the paper's rate with it, and of
    matrices that low rank suits badly."""
    if settings.rank is None:
        return
    if settings.scale == AUTO and settings.scale_type == "channel" and settings.rank < LEAST_CHANNEL_RANK:
        warn(
            f"{where}: scale='auto' with a factor for each channel at rank {settings.rank}: the size of an update has "
            "no mean there, and some channels take steps many times AdamW's; take rank 3 or more, or "
            "scale_type='tensor'"
        )
    geometries = [(param, geometry_of(param.tensor, settings)) for param in params]
    trained = [geometry for param, geometry in geometries if geometry is not None and param.tensor.requires_grad]
    width = max((geometry.width for geometry in trained), default=0)
    if settings.scale == AUTO and lr >= HIGH_AUTO_LR and width >= WIDE:
        warn(
            f"{where}: lr={lr:g} with scale='auto' is taken as AdamW's rate, and is high for matrices of width "
            f"{width}; give what AdamW would get, 1e-3 or less, or with the paper's 1e-2 the paper's scale: 1, or 128 "
            "for Mini"
        )
    if not any(param.tensor.dim() > 1 for param in params):
        what = "no parameters" if not params else "only parameters of fewer than two dimensions"
        warn(
            f"{where} has rank {settings.rank} and {what}, so nothing in it is low-rank; put the model's matrices into "
            "it, or let APOLLOAdamW.apollo(model) or apollo_param_groups(model) make the groups"
        )
    if settings.rank_above_width:
        return
    narrow = [
        (param, reason)
        for param, geometry in geometries
        if geometry is not None
        and int8_weight_of(param.tensor) is None  # which AdamW does not train
        and (reason := narrowness(geometry, settings.rank, settings.proj))
    ]
    if narrow:
        (first, reason), *more = narrow
        others = f", and {len(more)} more of the group are too narrow" if more else ""
        warn(f"{first} is {reason}{others}; put what is narrow into a group without 'rank'")


def loses_updates(params: Sequence[Param], settings: Settings, lr: float) -> bool:
    """Whether weights are bfloat16 alone and ``lr`` so small that rounding to the nearest loses much of the way."""
    return (
        not settings.stochastic_rounding
        and lr > 0
        and any(
            _is_bfloat16_matrix(param.tensor) and lr * _norm_over_adamws(param.tensor, settings) < LEAST_BFLOAT16_LR
            for param in params
        )
    )


def _norm_over_adamws(matrix: Tensor, settings: Settings) -> float:
    """About how many times the norm of AdamW's update of ``matrix`` the norm of its own is."""
    geometry = geometry_of(matrix, settings)
    if geometry is None or settings.rank is None:
        return 1.0
    return math.sqrt(scale_of(settings, geometry) * settings.rank / max(geometry.width, 1))


def advise_on_rounding(lr: float) -> None:
    warn(
        f"bfloat16 weights at lr={lr:g} without stochastic rounding lose updates that are smaller than half a rounding "
        "step: in a measurement they went 46 % of the way of float32 weights at 1e-5 with scale='auto', and 16 % with "
        "AdamW (docs/options.md, bfloat16 weights); pass stochastic_rounding=True, or keep the weights in float32"
    )


def advise_on_plain_adamw(parameters: Sequence[Tensor]) -> None:
    """Warn of an optimizer that was given parameters and no groups: none of them is low-rank."""
    matrices = sum(parameter.dim() > 1 and parameter.requires_grad for parameter in parameters)
    if matrices:
        warn(
            f"no parameter has a 'rank', so this is AdamW with AdamW's memory (matrices: {matrices}); use "
            "APOLLOAdamW.apollo(model, ...), APOLLOAdamW.mini(model, ...), or model.named_parameters() with a rank. "
            "If AdamW is meant, give the parameters as a group: [{'params': ...}]"
        )


def advise_on_state_bits(groups: list[dict[str, Any]]) -> None:
    """Warn of ``state_bits=8`` that no parameter's moments follow, on whatever number of ranks."""
    settings = [Settings.of(group) for group in groups]
    wanted = [param for param in params_of(groups) if settings[param.group].state_bits == 8]
    obstacles = [obstacle_anywhere(param.tensor, settings[param.group]) for param in wanted]
    if wanted and all(obstacles):
        warn(f"state_bits=8 changes nothing: no moments can be 8-bit ({wanted[0].label}: {obstacles[0]}); leave it out")


def _is_bfloat16_matrix(parameter: Tensor) -> bool:
    return (
        parameter.dtype == torch.bfloat16
        and parameter.dim() > 1
        and parameter.requires_grad
        and int8_weight_of(parameter) is None  # has a rounding of its own
    )
