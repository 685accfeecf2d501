"""The state of one parameter as a checkpoint has it: what may be loaded, and how it becomes the optimizer's own.

A checkpoint may have been cast (``state_dict`` to bfloat16 for a smaller file), sharded otherwise, or broken. All is
looked at and converted aside, before the optimizer changes.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..core.dtensors import is_dtensor, local
from ..core.messages import shown
from ..core.settings import Settings
from .member import Param
from .sharding import LocalShard, resharded
from .state import (
    ABSMAXES,
    MOMENTS,
    SHARDED,
    Expected,
    check_8bit,
    check_count,
    check_seed,
    check_tensor,
    expected_tensors,
)

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_COUNTS = (*_FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_AT_LEAST_ZERO = ("exp_avg_sq", "update_norm", *ABSMAXES)
_INSTEAD = "load the weights alone, and begin with a fresh optimizer"


def check_saved_state(param: Param, saved: Any, settings: Settings) -> None:
    """Raise ValueError unless a saved state has what training continues from. Values of tensors come later."""
    if not isinstance(saved, Mapping):
        raise ValueError(f"{param}: its state is {shown(saved)} (allowed: a dictionary as state_dict() returns it)")
    _check_origin(param, saved)
    check_8bit(param, saved, settings)
    for name, expected in expected_tensors(param.tensor, settings, saved).items():
        if expected.optional and name not in saved:
            continue
        dtypes = expected.dtypes if torch.uint8 in expected.dtypes else _FLOATS
        check_tensor(param, saved, name, Expected(expected.shape, dtypes))
        if saved[name].is_meta and not param.tensor.is_meta:
            raise ValueError(f"{param}: its state {name!r} is on the meta device, where it has no values")
    check_count(param, saved, _number(saved.get("step")))
    check_seed(param, saved, _number(saved.get("seed")))


def loaded_state(param: Param, saved: Mapping[str, Any], settings: Settings, shard: LocalShard) -> dict[str, Any]:
    """A copy of a checked state: on the parameter's device, sharded if the parameter is, in the dtypes of a step.

    ``step`` becomes float32 on the host. Moments get the group's ``state_dtype``, except if both are bfloat16 or both
    8-bit already. ``torch.optim`` would cast all to the parameter's dtype. Keys that are not ours are copied.

    Where a ``DTensor`` has other placements it is gathered, so every rank must call this for the same parameters.
    """
    found = {saved[name].dtype for name in MOMENTS}
    kept = found == {torch.bfloat16} or found == {torch.uint8}
    wanted = dict.fromkeys(expected_tensors(param.tensor, settings, saved), torch.float32)
    wanted |= {name: saved[name].dtype if kept else settings.state_dtype for name in MOMENTS}
    state: dict[str, Any] = {}
    for name, value in saved.items():
        if name == "step":
            state[name] = torch.tensor(float(_number(value)), dtype=torch.float32, device="cpu")
        elif name == "seed":
            state[name] = int(_number(value))
        elif name in wanted:
            state[name] = _placed(name, value, param.tensor, shard).to(wanted[name])
        else:
            state[name] = copied(value, f"{param}: its state {shown(name)}", param.tensor.device)
    return state


def check_values(param: Param, state: Mapping[str, Any]) -> None:
    """Raise ValueError for a number in a loaded state that would make weights NaN."""
    for name in (*SHARDED, *ABSMAXES):
        value = state.get(name)
        if not isinstance(value, Tensor) or value.is_meta or not value.is_floating_point() or not local(value).numel():
            continue
        low, high = (bound.item() for bound in torch.aminmax(local(value)))
        if low != low or max(-low, high) == float("inf"):
            raise ValueError(f"{param}: its state {name!r} has numbers that are NaN or infinite in {value.dtype}")
        if name in _AT_LEAST_ZERO and low < 0:
            raise ValueError(f"{param}: its state {name!r} has negative numbers, down to {low} (allowed: 0 or more)")


def copied(value: Any, what: str, device: torch.device | None = None) -> Any:
    """A copy of a value that is not ours to know, a tensor on ``device``. Raises ValueError where there is none."""
    try:
        if isinstance(value, Tensor):
            return value.detach().to(value.device if device is None else device, copy=True)
        return copy.deepcopy(value)
    except Exception as error:  # of any type: a checkpoint may hold anything, nested deeper than Python can follow
        raise ValueError(f"{what} cannot be copied ({type(error).__name__}); remove it") from None


def _check_origin(param: Param, saved: Mapping[str, Any]) -> None:
    """Raise ValueError for a state of another optimizer, which it names."""
    if "state1" in saved:
        origin = "has moments of bitsandbytes"
    elif "projector" in saved:
        raise ValueError(
            f"{param}: its state has a 'projector', as apollo-torch and GaLore save it; read an apollo-torch file with "
            "apollo_triton.checkpoint.from_apollo_torch, and load what it returns"
        )
    elif "exp_avg" in saved and "seed" not in saved:
        origin = "is an AdamW state (torch.optim's or a relative: it has 'exp_avg' and no 'seed')"
    else:
        return
    raise ValueError(f"{param}: its state {origin}, whose moments belong to another algorithm; {_INSTEAD}")


def _number(value: Any) -> Any:
    """The number in ``value``, which may be a tensor of one element; NaN for what is none."""
    if isinstance(value, Tensor):
        is_plain = value.layout == torch.strided and not value.is_meta and value.dtype in _COUNTS
        return value.item() if is_plain and value.numel() == 1 else float("nan")
    return float("nan") if isinstance(value, bool) or not isinstance(value, Real) else value


def _placed(name: str, value: Tensor, parameter: Tensor, shard: LocalShard) -> Tensor:
    """A copy on the parameter's device, sharded as the parameter needs it, in memory of its own."""
    if name in SHARDED and (is_dtensor(parameter) or is_dtensor(value)):
        return resharded(name, value, parameter, shard)
    return value.detach().to(parameter.device, copy=True)
