"""The state of one parameter as a checkpoint has it: what may be loaded, and how it becomes the optimizer's own.

A checkpoint may have been cast (``state_dict`` to bfloat16 for a smaller file), sharded otherwise, or broken. Moments
may be 8-bit there and floats here, or the other way round, where ranks hold no whole blocks. Second moments may be one
an element there and one a row here, or the other way round. All is looked at and converted aside, before the optimizer
changes.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping
from dataclasses import replace
from numbers import Real
from typing import Any

import torch
from torch import Tensor

from ..core.dtensors import is_dtensor, local
from ..core.messages import shown
from ..core.moments_8bit import dequantize_blockwise, quantize_blockwise
from ..core.settings import Settings
from .blocks import absmax_shape
from .member import CODES, Param, geometry_of, has_row_moments
from .sharding import LocalShard, as_sharded, local_shape, resharded
from .state import (
    ABSMAXES,
    MOMENTS,
    SHARDED,
    Expected,
    check_count,
    check_seed,
    check_tensor,
    expected_tensors,
    in_a_row_too,
    state_shapes,
    with_codes_named,
)

_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_COUNTS = (*_FLOATS, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
_AT_LEAST_ZERO = ("exp_avg_sq", "update_norm", *ABSMAXES)
_PART = 1 << 21  # elements, whole blocks
_INSTEAD = "load the weights alone, and begin with a fresh optimizer"


def check_saved_state(param: Param, saved: Any, settings: Settings) -> None:
    """Raise ValueError unless a saved state has what training continues from. Values of tensors come later."""
    if not isinstance(saved, Mapping):
        raise ValueError(f"{param}: its state is {shown(saved)} (allowed: a dictionary as state_dict() returns it)")
    _check_origin(param, saved)
    saved = with_codes_named(saved)
    if both := [name for name in CODES if name in saved and CODES[name] in saved]:
        raise ValueError(
            f"{param}: its state has {both[0]!r}, moments in floats, and {CODES[both[0]]!r}, 8-bit ones. "
            "set_optimizer_state_dict(..., full_state_dict=True) leaves this run's own beside those of the dictionary, "
            "where one is 8-bit and the other is not; give the dictionary to optimizer.load_state_dict(...) on every "
            "rank, which converts it"
        )
    settings = replace(settings, second_moment=second_moment_of(saved, param, settings))
    for name, expected in expected_tensors(param.tensor, settings, saved).items():
        if expected.optional and name not in saved:
            continue
        dtypes = expected.dtypes if torch.uint8 in expected.dtypes else _FLOATS
        if name in ABSMAXES:
            expected = in_a_row_too(saved.get(name), expected)
        check_tensor(param, saved, name, Expected(expected.shape, dtypes))
        if saved[name].is_meta and not param.tensor.is_meta:
            raise ValueError(f"{param}: its state {name!r} is on the meta device, where it has no values")
    check_count(param, saved, _number(saved.get("step")))
    check_seed(param, saved, _number(saved.get("seed")))


def loaded_state(
    param: Param, saved: Mapping[str, Any], settings: Settings, shard: LocalShard, was: torch.dtype | None = None
) -> dict[str, Any]:
    """A copy of a checked state: on the parameter's device, sharded if the parameter is, in the dtypes of a step.

    ``step`` becomes float32 on the host. Moments are 8-bit if those of a new state would be, and second ones of rows
    float32. Else they get the group's ``state_dtype``, except if all are bfloat16 already because the file was cast:
    ``was``, the ``state_dtype`` under which they were saved, is not another. ``torch.optim`` would cast all to the
    parameter's dtype. Keys that are not ours are copied.

    Where a ``DTensor`` has other placements it is gathered, so every rank must call this for the same parameters.
    """
    saved = with_codes_named(saved)
    was_row, is_row = (second_moment_of(saved, param, settings) == "row", has_row_moments(param.tensor, settings))
    kept = {saved[name].dtype for name in MOMENTS[: 1 if was_row else 2] if name in saved} == {torch.bfloat16}
    kept &= was != torch.bfloat16  # else they are what that group asked for, and this one asks for its own
    saved = _in_form(saved, param, settings)
    new = expected_tensors(param.tensor, settings, {})
    rounded = [name for name in MOMENTS if name in saved and name not in new]  # from float32, not ``state_dtype``
    wanted = dict.fromkeys(expected_tensors(param.tensor, settings, saved), torch.float32)
    wanted |= {name: torch.uint8 for name in CODES.values() if name in saved}
    for name in MOMENTS:
        is_float32 = name in rounded or (is_row and name == "exp_avg_sq")
        wanted[name] = torch.float32 if is_float32 else torch.bfloat16 if kept else settings.state_dtype
    state: dict[str, Any] = {}
    for name, value in saved.items():
        if name == "step":
            state[name] = torch.tensor(float(_number(value)), dtype=torch.float32, device="cpu")
        elif name == "seed":
            state[name] = int(_number(value))
        elif name in wanted:
            if name in ABSMAXES and not is_dtensor(value):
                value = value.reshape(absmax_shape(param.tensor, settings))
            state[name] = _placed(name, value, param.tensor, shard).to(wanted[name])
        else:
            state[name] = copied(value, f"{param}: its state {shown(name)}", param.tensor.device)
    return _in_8_bits(state, rounded, param, settings, shard)


def was_8bit(saved: Mapping[str, Any]) -> bool:
    """Whether the moments of a checked state are 8-bit."""
    return CODES["exp_avg"] in with_codes_named(saved)


def second_moment_of(saved: Mapping[str, Any], param: Param, settings: Settings) -> str:
    """Which ``second_moment`` a saved state has. Where a row has one element, both are the same floats."""
    of_rows = replace(settings, second_moment="row")
    if not has_row_moments(param.tensor, of_rows):
        return settings.second_moment
    shape = tuple(getattr(saved.get("exp_avg_sq"), "shape", ()))
    if shape != state_shapes(param.tensor, of_rows)["exp_avg_sq"]:
        return "element"
    return "row" if shape != tuple(param.tensor.shape) or was_8bit(saved) else settings.second_moment


def _in_form(saved: Mapping[str, Any], param: Param, settings: Settings) -> dict[str, Any]:
    """A saved state with the exact float32 values, whole, of moments that are 8-bit and not to be so, and with the
    second moments that ``settings`` asks for: of a row their mean, of its elements that of the row."""
    result, parameter = dict(saved), param.tensor
    shapes, new = state_shapes(parameter, settings), expected_tensors(parameter, settings, {})
    for name, code in CODES.items():
        held = code if code in saved else name
        is_unlike = tuple(saved[held].shape) != shapes[name]
        if not is_unlike and (held == name or code in new):
            continue
        values = _whole(result.pop(held))
        if held == code:
            values = _floats(values, _whole(result.pop(f"{name}_absmax")), name, param, settings)
        if is_unlike and has_row_moments(parameter, settings):
            values = values.to(torch.float32).flatten(1).mean(1).view(shapes[name])
        elif is_unlike:
            values = values.expand(shapes[name])
        result[name] = values
    return result


def _floats(q: Tensor, absmax: Tensor, name: str, param: Param, settings: Settings) -> Tensor:
    """The float32 values of a whole 8-bit moment."""
    geometry = geometry_of(param.tensor, settings)
    matrices = 1 if geometry is None else geometry.matrices
    values = [
        dequantize_blockwise(*matrix, signed=name == "exp_avg")
        for matrix in zip(q.reshape(matrices, -1), absmax.to(torch.float32).reshape(matrices, -1), strict=True)
    ]
    return torch.stack(values).view(q.shape)


def _in_8_bits(
    state: dict[str, Any], names: Collection[str], param: Param, settings: Settings, shard: LocalShard
) -> dict[str, Any]:
    """A loaded state with the float moments of ``names`` rounded to 8 bits, as a step would store them."""
    geometry = shard.geometry
    matrices = 1 if geometry is None else geometry.matrices
    for name in names:
        code, values = CODES[name], local(state.pop(name))
        found = (
            [_quantized(matrix, signed=name == "exp_avg") for matrix in values.reshape(matrices, -1)]
            if values.numel()
            else []
        )
        shape = state_shapes(param.tensor, settings)[name]
        of_absmax = absmax_shape(param.tensor, settings)
        parts = {code: (torch.uint8, shape, 0), f"{name}_absmax": (torch.float32, of_absmax, 1)}
        for part, (dtype, whole_shape, index) in parts.items():
            here = local_shape(part, param.tensor, shard, whole_shape)
            stacked = torch.stack([each[index] for each in found]) if found else values.new_empty(0)
            state[part] = as_sharded(part, stacked.to(dtype).view(here), param.tensor, shard, whole_shape)
    return state


def _quantized(values: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """``quantize_blockwise`` of a vector, in parts, since it takes five times their memory in passing."""
    parts = [quantize_blockwise(part, signed) for part in values.split(_PART)]
    q, absmax = (torch.cat(each) for each in zip(*parts, strict=True))
    return q, absmax


def _whole(value: Tensor) -> Tensor:
    """A gathered ``DTensor``, on all ranks alike; any other tensor itself."""
    return value.detach().full_tensor() if is_dtensor(value) else value.detach()  # type: ignore[attr-defined]


def check_values(param: Param, state: Mapping[str, Any]) -> None:
    """Raise ValueError for a number in a loaded state that would make weights NaN."""
    for name in SHARDED:
        value = state.get(name)
        if not isinstance(value, Tensor) or value.is_meta or not value.is_floating_point() or not local(value).numel():
            continue
        low, high = (bound.item() for bound in torch.aminmax(local(value)))
        if low != low or max(-low, high) == float("inf"):
            raise ValueError(f"{param}: its state {name!r} has numbers that are NaN or infinite in {value.dtype}")
        if name in _AT_LEAST_ZERO and low < 0:
            raise ValueError(f"{param}: its state {name!r} has negative numbers, down to {low} (allowed: 0 or more)")
    if _are_codes(state):
        raise ValueError(
            f"{param}: its state 'exp_avg' has whole numbers from 0 to 255, which are the codes of 8-bit moments. "
            "torch.distributed.checkpoint has cast them to floats: an older version saved them under this name. Make "
            "the checkpoint one file by torch.distributed.checkpoint.format_utils.dcp_to_torch_save, and give what is "
            "in it to optimizer.load_state_dict(...), which converts them"
        )


def _are_codes(state: Mapping[str, Any]) -> bool:
    """Whether float moments are what a cast makes of 8-bit ones: whole numbers from 0 to 255.

    Each block of the second has an element of its absmax, whose code is 255, so that hardly any other state is looked
    at twice. Where all gradients were 0, its codes are 0, and those of the first are 127, which reads as 0.
    """
    values = [local(state[name]) for name in ("exp_avg_sq", "exp_avg") if name in state]
    if any(value.is_meta or not value.numel() for value in values) or len(values) < 2:
        return False
    second, first = (float(value.max()) for value in values)
    if second != 255 and not (second == 0 and first >= 1):
        return False
    return all(bool(((value == value.round()) & (value >= 0) & (value <= 255)).all()) for value in values)


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
