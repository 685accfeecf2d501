"""What a plan was made for, as values that a step compares with those of the last one.

Where every tensor lies, which launches the groups can share, and the settings that a plan depends on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..core.implicit_gradient import ImplicitGradient
from ..core.settings import FIELD_NAMES, STRUCTURAL, Settings
from ..int8.weight import Int8Weight
from ..params.sharding import is_dtensor, local
from ..params.state import ABSMAXES

Groups = list[dict[str, Any]]
States = Mapping[Tensor, dict[str, Any]]
Given = Mapping[Tensor, ImplicitGradient]


def identities(settings: list[Settings]) -> list[int]:
    """For each group the first that it can share launches with: all hyperparameters are equal.

    Each group has a tensor lr of its own. On the host its value counts, which the launches are given. On a device it is
    the tensor, since to read it would wait for the device, so that each group has launches of its own there.
    """
    first: dict[tuple[Any, ...], int] = {}
    result = []
    for position, group in enumerate(settings):
        lr: Any = group.lr
        is_read = not isinstance(lr, Tensor)
        if isinstance(lr, Tensor):
            is_read = lr.device.type == "cpu" and not group.capturable
            lr = lr.tolist() if is_read else lr.data_ptr()
        key = (is_read, lr, *(getattr(group, name) for name in FIELD_NAMES if name != "lr"))
        result.append(first.setdefault(key, position))
    return result


def structure(settings: list[Settings]) -> list[Any]:
    """What a plan was made for, without the numbers that may change from step to step."""
    return [identities(settings), *(tuple(getattr(group, name) for name in STRUCTURAL) for group in settings)]


def addresses(groups: Groups, states: States, given: Given) -> tuple[list[tuple[Any, ...]] | None, list[int]]:
    """Where every parameter with a gradient and its state are, and where the gradients are.

    None where a tensor has no address of its own or there is no state yet. Runs at every step, over every parameter.
    """
    places: list[tuple[Any, ...]] = []
    gradients: list[int] = []
    uint8, plain = torch.uint8, torch.nn.Parameter
    try:
        for position, group in enumerate(groups):
            for parameter in group["params"]:
                implicit = given.get(parameter) if given else None
                gradient = parameter.grad
                if gradient is None and implicit is None:
                    continue
                state = states.get(parameter)
                if not state:
                    return None, []
                norm, step, seed = state.get("update_norm"), state["step"], state["seed"]
                exp_avg, exp_avg_sq = state["exp_avg"], state["exp_avg_sq"]
                # Objects too: a tensor of another dtype may come to lie where the old one was.
                identity = (position, id(parameter), id(state), id(exp_avg), id(exp_avg_sq), id(norm), id(step))
                absmax: tuple[int, ...] = ()
                int8_parts: tuple[Any, ...] = ()
                if exp_avg.dtype is uint8:
                    first, second = (state[name] for name in ABSMAXES)
                    absmax = first.data_ptr(), second.data_ptr(), id(first), id(second)
                if type(parameter) is not plain:
                    if type(parameter) is Int8Weight:
                        parts = parameter.scale, parameter.zero
                        int8_parts = tuple((part.data_ptr(), part.dtype, part.shape, part.stride()) for part in parts)
                        parameter = parameter.q
                    elif is_dtensor(parameter):
                        parameter, gradient = local(parameter), local(gradient)
                        exp_avg, exp_avg_sq = local(exp_avg), local(exp_avg_sq)
                        norm = None if norm is None else local(norm)
                layout: tuple[Any, ...]
                if implicit is None:
                    address = gradient.data_ptr()
                    if not address and gradient.numel():
                        return None, []  # a tensor subclass, which keeps its numbers elsewhere
                    layout = address & 15, gradient.shape, gradient.stride(), gradient.dtype, gradient.is_neg()
                else:
                    address, layout = 0, (implicit.dtype,)
                places.append(
                    (
                        identity,
                        type(seed),
                        seed,
                        step.data_ptr(),
                        parameter.data_ptr(),
                        exp_avg.data_ptr(),
                        exp_avg_sq.data_ptr(),
                        None if norm is None else norm.data_ptr(),
                        absmax,
                        parameter.shape,
                        parameter.stride(),
                        parameter.dtype,
                        int8_parts,
                        layout,
                    )
                )
                gradients.append(address)
    except (RuntimeError, KeyError, AttributeError, TypeError):  # a sparse gradient has no address, None no tensor's
        return None, []
    return places, gradients
