"""What was most likely not meant, in what an optimizer is given: warnings, each given once, when a group is added."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..core.coverage import narrowness
from ..core.messages import shown, warn
from ..core.settings import Settings
from ..core.spelling import unread_keys
from ..int8.weight import Int8Weight
from .member import Param, geometry_of

# At lower rates bfloat16 weights lose more than 7 % of their way. In docs/options.md's measurement, weights of a size
# of 0.02 went 9 % of it at 1e-5, 70 % at 1e-4, 93 % at 2e-4 and 98 % at 3e-4.
LEAST_BFLOAT16_LR = 2e-4


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


def advise_on_group(params: Sequence[Param], settings: Settings, where: str) -> None:
    """Warn of a low-rank group without matrices, and of matrices that low rank suits badly."""
    if settings.rank is None:
        return
    geometries = [(param, geometry_of(param.tensor, settings)) for param in params]
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
        and not isinstance(param.tensor, Int8Weight)  # which AdamW does not train
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
        and 0 < lr < LEAST_BFLOAT16_LR
        and any(_is_bfloat16_matrix(param.tensor) for param in params)
    )


def advise_on_rounding(lr: float) -> None:
    warn(
        f"bfloat16 weights at lr={lr:g} without stochastic rounding lose updates that are smaller than half a rounding "
        "step: in a measurement they went 9 % of the way of float32 weights at 1e-5, and 70 % at 1e-4 "
        "(docs/options.md, bfloat16 weights); pass stochastic_rounding=True, or keep the weights in float32"
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


def _is_bfloat16_matrix(parameter: Tensor) -> bool:
    return (
        parameter.dtype == torch.bfloat16
        and parameter.dim() > 1
        and parameter.requires_grad
        and not isinstance(parameter, Int8Weight)  # has a rounding of its own
    )
