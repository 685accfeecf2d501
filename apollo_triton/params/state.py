"""The optimizer's state of one parameter: made at its first step, checked, and restored from a checkpoint.

The state is tensors and numbers only. Low-rank moments are ``[channels, rank]``, whichever side is kept. P is not part
of the state, except with ``proj="svd"``.
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
from .member import Param, geometry_of
from .sharding import LocalShard, is_dtensor, resharded, sharded_zeros

# The names of the state's tensors, except ``step``, a scalar on the host.
MOMENTS = ("exp_avg", "exp_avg_sq")
ABSMAXES = ("exp_avg_absmax", "exp_avg_sq_absmax")  # only with 8-bit moments
SHARDED = (*MOMENTS, "update_norm", "projection")  # DTensors if the weight is one


def state_shapes(parameter: Tensor, settings: Settings) -> dict[str, tuple[int, ...]]:
    """The shape of each state tensor of a parameter, except ``step`` and the absmax of 8-bit moments."""
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
    """The shape of the absmaxes of 8-bit moments. A block never spans two matrices."""
    geometry = geometry_of(parameter, settings)
    if geometry is None:
        return (absmax_count(parameter.numel()),)
    blocks = absmax_count(geometry.channels * (settings.rank or 0))
    return (geometry.matrices, blocks) if geometry.matrices > 1 else (blocks,)


def is_8bit(parameter: Tensor, settings: Settings, state: Mapping[str, Any]) -> bool:
    """Whether the parameter's moments are 8-bit or, before its first step, whether they will be."""
    if "exp_avg" in state:
        return state["exp_avg"].dtype == torch.uint8
    return settings.state_bits == 8 and prod(state_shapes(parameter, settings)["exp_avg"]) >= settings.min_8bit_size


def make_state(param: Param, settings: Settings, shard: LocalShard) -> dict[str, Any]:
    """A new state: float32 ``step`` on the host, ``seed``, zero moments and, for low rank, a zero ``update_norm``
    (u_prev).

    Moments of a dense weight have its memory layout. Moments of a ``DTensor`` are ``DTensor``s on the same mesh. 8-bit
    moments are row-major and come with ``exp_avg_absmax`` and ``exp_avg_sq_absmax``. svd's projection is added at the
    first gradient.
    """
    state: dict[str, Any] = {
        "step": torch.zeros((), dtype=torch.float32, device="cpu"),
        "seed": parameter_seed(settings.seed, param.index) if settings.seed_per_param else settings.seed,
    }
    parameter = param.tensor
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
                state[name] = sharded_zeros(name, parameter, shard, shape, dtype)
            else:
                state[name] = torch.zeros(shape, dtype=dtype, device=parameter.device)
    return state


def check_state(param: Param, state: Mapping[str, Any], settings: Settings) -> None:
    """Raise ValueError unless the state fits the parameter's shape and settings. Other keys are ignored."""
    for name, shape in state_shapes(param.tensor, settings).items():
        value = state.get(name)
        if isinstance(value, Tensor):
            if tuple(value.shape) != shape:
                raise ValueError(_complaint(param, name, f"has shape {tuple(value.shape)}, not {shape}"))
        elif name != "projection":  # made at the next step, since a group may change to svd at any time
            raise ValueError(_complaint(param, name, "is missing"))
    for name in ("step", "seed"):
        if name not in state:
            raise ValueError(_complaint(param, name, "is missing"))
    if is_8bit(param.tensor, settings, state):
        if is_dtensor(param.tensor):
            raise ValueError(f"{param}: {SHARDED_8BIT}")
        expected = _absmax_shape(param.tensor, settings)
        for name in ABSMAXES:
            if name not in state:
                raise ValueError(_complaint(param, name, "is missing"))
            if tuple(state[name].shape) != expected:
                raise ValueError(_complaint(param, name, f"has shape {tuple(state[name].shape)}, not {expected}"))


def check_numbers(param: Param, state: Mapping[str, Any]) -> None:
    """Raise ValueError unless a saved state's ``step`` and ``seed`` are numbers that training can continue from."""
    limits = {"step": (2**53, "a whole number"), "seed": (2**32, "an integer below 2**32")}
    for name, (limit, allowed) in limits.items():
        value = state[name]
        number = value.item() if isinstance(value, Tensor) and value.numel() == 1 else value
        is_number = isinstance(number, (int, float)) and not isinstance(number, bool)
        if not (is_number and 0 <= number < limit and number == int(number)):
            raise ValueError(f"{param}: its state {name!r} is {value!r} (allowed: {allowed}, 0 or more)")


def check_device(param: Param, state: Mapping[str, Any]) -> None:
    """Raise ValueError unless the state is on the parameter's device: kernels do not check the addresses they get."""
    device = param.tensor.device
    for name in (*SHARDED, *ABSMAXES):
        value = state.get(name)
        if isinstance(value, Tensor) and value.device != device:
            raise ValueError(
                f"{param}: its state {name!r} is on {value.device}, and the parameter on {device}; move the model "
                "before the first step, or bring the state along: optimizer.load_state_dict(optimizer.state_dict())"
            )


def _complaint(param: Param, name: str, problem: str) -> str:
    return (
        f"{param}: its state {name!r} {problem}. It belongs to another model, or rank, proj_type or proj of the "
        "group changed; give the group the settings it was saved with, or clear optimizer.state[parameter]"
    )


def restored(name: str, value: Any, parameter: Tensor, shard: LocalShard) -> Any:
    """A copy of a saved value: on the parameter's device, and sharded if the parameter is.

    ``step`` stays float32 on the host. Moments keep their dtype; ``torch.optim`` would cast them to the parameter's.
    """
    if name == "step":
        return torch.as_tensor(value).detach().to("cpu", torch.float32, copy=True)
    if not isinstance(value, Tensor):
        return value
    if name in SHARDED and (is_dtensor(parameter) or is_dtensor(value)):
        return resharded(name, value, parameter, shard)
    return value.detach().to(parameter.device, copy=True)
