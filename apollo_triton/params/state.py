"""The optimizer's state of one parameter: made at its first step, checked, and brought back from a checkpoint.

Tensors and numbers only, channel-major whichever side is kept; P is not among them, except for svd.
"""

from __future__ import annotations

from collections.abc import Mapping
from math import prod
from typing import Any

import torch
from torch import Tensor

from ..core.moments_8bit import absmax_count
from ..core.philox import parameter_seed
from ..core.settings import Settings
from .checks import SHARDED_8BIT
from .member import Label, geometry_of
from .sharding import Piece, is_dtensor, resharded, sharded_zeros

MOMENTS = ("exp_avg", "exp_avg_sq")
STATE_TENSORS = (*MOMENTS, "update_norm", "projection")


def state_shapes(parameter: Tensor, settings: Settings) -> dict[str, tuple[int, ...]]:
    """The shape of each state tensor of a parameter but ``step``."""
    geometry = geometry_of(parameter, settings)
    if geometry is None:
        return {"exp_avg": tuple(parameter.shape), "exp_avg_sq": tuple(parameter.shape)}
    experts = (geometry.matrices,) if geometry.matrices > 1 else ()
    rank = settings.rank or 0
    shapes = {
        "exp_avg": (*experts, geometry.channels, rank),
        "exp_avg_sq": (*experts, geometry.channels, rank),
        "update_norm": experts,
    }
    if settings.proj == "svd":
        shapes["projection"] = (*experts, rank, geometry.width)
    return shapes


def _absmax_shape(parameter: Tensor, settings: Settings) -> tuple[int, ...]:
    """Of the absmax of 8-bit moments: their blocks never span two matrices."""
    geometry = geometry_of(parameter, settings)
    if geometry is None:
        return (absmax_count(parameter.numel()),)
    blocks = absmax_count(geometry.channels * (settings.rank or 0))
    return (geometry.matrices, blocks) if geometry.matrices > 1 else (blocks,)


def is_8bit(parameter: Tensor, settings: Settings, state: Mapping[str, Any]) -> bool:
    """Whether its moments are 8-bit: as they are, or where there are none yet, as they will be made."""
    if "exp_avg" in state:
        return state["exp_avg"].dtype == torch.uint8
    return settings.state_bits == 8 and prod(state_shapes(parameter, settings)["exp_avg"]) >= settings.min_8bit_size


def make_state(label: Label, settings: Settings, piece: Piece) -> dict[str, Any]:
    """Zeros of the right shapes: float32 ``step`` on the host, ``seed``, the moments, and u_prev for low rank.

    Moments of a dense weight keep its memory layout; those of a ``DTensor`` are ``DTensor``s of the same mesh. 8-bit
    ones are row-major, with an ``exp_avg_absmax`` and an ``exp_avg_sq_absmax``. svd's projection comes with the first
    gradient.
    """
    own = settings.seed_per_param
    state: dict[str, Any] = {
        "step": torch.zeros((), dtype=torch.float32, device="cpu"),
        "seed": parameter_seed(settings.seed, label.number) if own else settings.seed,
    }
    parameter = label.parameter
    bits8 = is_8bit(parameter, settings, state)
    for name, shape in state_shapes(parameter, settings).items():
        if bits8 and name in MOMENTS:
            state[name] = torch.zeros(shape, dtype=torch.uint8, device=parameter.device)
            blocks = _absmax_shape(parameter, settings)
            state[f"{name}_absmax"] = torch.zeros(blocks, dtype=torch.float32, device=parameter.device)
        elif geometry_of(parameter, settings) is None:
            state[name] = torch.zeros_like(parameter, dtype=settings.state_dtype)
        elif name != "projection":
            dtype = torch.float32 if name == "update_norm" else settings.state_dtype
            if is_dtensor(parameter):
                state[name] = sharded_zeros(name, parameter, piece, shape, dtype)
            else:
                state[name] = torch.zeros(shape, dtype=dtype, device=parameter.device)
    return state


def check_state(label: Label, state: Mapping[str, Any], settings: Settings) -> None:
    """Raise ValueError unless the state fits the parameter's shape and settings. Foreign keys are left alone."""
    for name, shape in state_shapes(label.parameter, settings).items():
        value = state.get(name)
        if isinstance(value, Tensor):
            if tuple(value.shape) != shape:
                raise ValueError(_complaint(label, name, f"has shape {tuple(value.shape)}, not {shape}"))
        elif name != "projection":  # made at the next step: a group may turn to svd at any time
            raise ValueError(_complaint(label, name, "is missing"))
    for name in ("step", "seed"):
        if name not in state:
            raise ValueError(_complaint(label, name, "is missing"))
    if is_8bit(label.parameter, settings, state):
        if is_dtensor(label.parameter):
            raise ValueError(f"{label}: {SHARDED_8BIT}")
        expected = _absmax_shape(label.parameter, settings)
        for name in (f"{moment}_absmax" for moment in MOMENTS):
            if name not in state:
                raise ValueError(_complaint(label, name, "is missing"))
            if tuple(state[name].shape) != expected:
                raise ValueError(_complaint(label, name, f"has shape {tuple(state[name].shape)}, not {expected}"))


def check_numbers(label: Label, state: Mapping[str, Any]) -> None:
    """Raise ValueError unless a saved state's ``step`` and ``seed`` can be counted on with."""
    limits = {"step": (2**53, "a whole number"), "seed": (2**32, "an integer below 2**32")}
    for name, (limit, allowed) in limits.items():
        value = state[name]
        number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
        if not (is_number and 0 <= number < limit and number == int(number)):
            raise ValueError(f"{label}: its state {name!r} is {value!r} (allowed: {allowed}, 0 or more)")


def check_device(label: Label, state: Mapping[str, Any]) -> None:
    """Raise ValueError unless the state is where the parameter is: kernels take addresses as they are."""
    device = label.parameter.device
    for name in (*STATE_TENSORS, *(f"{moment}_absmax" for moment in MOMENTS)):
        value = state.get(name)
        if isinstance(value, Tensor) and value.device != device:
            raise ValueError(
                f"{label}: its state {name!r} is on {value.device}, and the parameter on {device}; move the model "
                "before the first step, or bring the state along: optimizer.load_state_dict(optimizer.state_dict())"
            )


def _complaint(label: Label, name: str, problem: str) -> str:
    return (
        f"{label}: its state {name!r} {problem}. It belongs to another model, or rank, proj_type or proj of the "
        "group changed; give the group the settings it was saved with, or clear optimizer.state[parameter]"
    )


def restored(name: str, value: Any, parameter: Tensor, piece: Piece) -> Any:
    """A saved value as a copy where and as the parameter is: on its device, sharded like it or whole.

    ``step`` stays float32 on the host; ``torch.optim`` itself would cast moments to the parameter's dtype.
    """
    if name == "step":
        return torch.as_tensor(value).detach().to("cpu", torch.float32, copy=True)
    if not isinstance(value, Tensor):
        return value
    if name in STATE_TENSORS and (is_dtensor(parameter) or is_dtensor(value)):
        return resharded(name, value, parameter, piece)
    return value.detach().to(parameter.device, copy=True)
