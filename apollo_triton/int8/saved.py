"""An int8 weight as a checkpoint holds it: its keys, and what may stand under them.

Codes stand under ``weight_q`` and not under ``weight``. A float model that reads the checkpoint then reports that its
``weight`` is missing. It would otherwise take codes of 0 to 255 for weights.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..core.dtensors import as_dtensor, is_dtensor, local, local_slices
from ..core.messages import shown
from .weight import FLOATS, SCALES, Int8Weight, int8_weight_of, is_finite, lies_within

PARTS = {"weight_q": "q", "weight_scale": "scale", "weight_zero": "zero"}

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_NAMES = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
_ALLOWED = {
    "weight": f"an int8 weight is made of finite values in {_NAMES}",
    "weight_q": "codes are integers from 0 to 255, a matrix of the weight's shape",
    "weight_scale": f"scales are {_NAMES}, finite and above 0, one for each group",
    "weight_zero": "zero points are integers from 0 to 255, one for each group",
}


def entries(parameter: Tensor) -> dict[str, Tensor]:
    """What ``state_dict`` holds of an int8 weight: ``PARTS``, in its memory. Of a sharded one they are ``DTensor``.

    Scales and zero points are ``[out, in / group_size]`` where groups divide a row, so that what cuts the weight cuts
    all three alike; elsewhere ``[groups]``, as version 0.1 saved them everywhere.
    """
    weight = int8_weight_of(parameter)
    assert weight is not None
    group_size, in_rows = weight.group_size, weight.shape[1] % weight.group_size == 0

    def shape_of(whole: torch.Size) -> tuple[int, ...]:
        return (whole[0], whole[1] // group_size) if in_rows else (whole.numel() // group_size,)

    shape = shape_of(weight.shape)
    parts = {"weight_q": weight.q, "weight_scale": weight.scale.view(shape), "weight_zero": weight.zero.view(shape)}
    if not is_dtensor(parameter):
        return parts
    whole: Any = parameter.shape
    mesh, placements = parameter.device_mesh, parameter.placements  # type: ignore[attr-defined]
    return {
        key: as_dtensor(part, mesh, placements, whole if key == "weight_q" else shape_of(whole))
        for key, part in parts.items()
    }


def is_cut_as(value: Any, like: Any) -> bool:
    """Whether a ``DTensor`` lies on the ranks as ``like`` does."""
    return is_dtensor(value) and (value.device_mesh, value.placements) == (like.device_mesh, like.placements)


def part_here(value: Any, like: Tensor) -> Tensor:
    """This rank's part of ``value``, which has the shape of ``like`` and is whole or cut in any way. A ``DTensor`` that
    is cut in another way is gathered."""
    if is_cut_as(value, like):
        return local(value)
    whole: Tensor = value.full_tensor() if is_dtensor(value) else value
    return whole[local_slices(like)].contiguous()


def checked(found: Mapping[str, Any], prefix: str, errors: list[str], is_sharded: bool = False) -> dict[str, Tensor]:
    """What a checkpoint says of one weight, either a float or int8 ``weight`` or some of ``PARTS``.

    ``found`` is what it has under these keys. Parts come back in the dtypes and layout of the format. Codes that an
    earlier version saved as ``weight`` come back as ``weight_q``. A sharded layer takes ``DTensor`` too. If anything is
    refused, the result is empty, and ``errors`` gets a line for each fault, with its key.
    """
    faults = [f"{prefix}{key} {text}" for key, value in found.items() if (text := _unreadable(value, is_sharded))]
    found = dict(found) if not faults else {}
    parts = [key for key in PARTS if key in found]
    weight, old_name = found.get("weight"), False
    if weight is not None and int8_weight_of(weight) is not None:
        # torch.distributed.checkpoint's set_model_state_dict adds the model's own parameters to what it loads.
        found = {key: found[key] for key in parts} or {"weight": weight}
    elif weight is not None and parts and weight.dtype not in _INTEGERS:
        faults.append(
            f"{prefix}weight is {weight.dtype}, and there is {_joined(prefix, parts)} of an int8 weight too; "
            "remove what is left over"
        )
    elif "weight_q" in parts and weight is not None:
        faults.append(f"{prefix}weight and {prefix}weight_q are both there, and both are codes; remove one of them")
    elif len(parts) == 2 and weight is not None:
        found, old_name = {"weight_q": found.pop("weight")} | found, True
    elif weight is not None and weight.dtype in _INTEGERS:
        faults.append(
            f"{prefix}weight is {weight.dtype}, without the {prefix}weight_scale and {prefix}weight_zero it needs"
        )
    if not faults:
        for key, value in found.items():
            if text := _fault(key, value):
                faults.append(f"{prefix}{'weight' if old_name and key == 'weight_q' else key} {text}")
    errors.extend(faults)
    return {} if faults else {key: _cast(key, value) for key, value in found.items()}


def assembled(parts: Mapping[str, Tensor], prefix: str, parameter: Tensor, errors: list[str]) -> Int8Weight | None:
    """This rank's int8 weight of all ``PARTS``, each of which is checked, for a layer that holds ``parameter``; None,
    with a line in ``errors``, if their shapes do not suit each other or the layer."""
    weight = int8_weight_of(parameter)
    assert weight is not None
    if parts["weight_q"].shape != parameter.shape:
        errors.append(
            f"size mismatch for {prefix}weight: its codes have shape {tuple(parts['weight_q'].shape)} in the "
            f"checkpoint, and the model's weight has {tuple(parameter.shape)}"
        )
        return None
    is_cut = is_dtensor(parameter) and all(is_cut_as(part, parameter) for part in parts.values())
    q, scale, zero = (_whole(parts[key]) if not is_cut else local(parts[key]) for key in PARTS)
    rows = q.shape[0]
    if any(part.dim() == 2 and part.shape[0] != rows for part in (scale, zero)):
        errors.append(
            f"{prefix}weight has {rows} rows, {prefix}weight_scale the shape {tuple(scale.shape)} and "
            f"{prefix}weight_zero {tuple(zero.shape)}: where they have two dimensions, they have the weight's rows"
        )
    elif len({part.is_meta for part in (q, scale, zero)}) == 2:
        errors.append(f"{_joined(prefix, PARTS)}: some are on the meta device, and some are not")
    elif not scale.numel() or q.numel() % scale.numel() or zero.numel() != scale.numel():
        errors.append(
            f"{prefix}weight has {q.numel()} codes, {prefix}weight_scale has {scale.numel()} entries and "
            f"{prefix}weight_zero {zero.numel()}: each group needs one scale and one zero point"
        )
    else:
        group_size = q.numel() // scale.numel()
        scale, zero = scale.to(q.device).reshape(-1), zero.to(q.device).reshape(-1)
        result = Int8Weight(q, scale, zero, group_size, weight.dtype, weight.stochastic_rounding)
        result.name = weight.name
        if is_cut or not is_dtensor(parameter):
            return result
        try:
            here = result[local_slices(parameter)].contiguous()
        except ValueError as error:
            errors.append(f"{prefix}weight cannot be sharded as the model's is: {error}")
        else:
            assert isinstance(here, Int8Weight)
            return here
    return None


def _whole(part: Any) -> Tensor:
    whole: Tensor = part.full_tensor() if is_dtensor(part) else part
    return whole


def _unreadable(value: Any, is_sharded: bool) -> str | None:
    if not isinstance(value, Tensor):
        return f"is {shown(value)}, and no tensor"
    if is_sharded and is_dtensor(value):
        value = local(value)
    if isinstance(value, Int8Weight):
        return None
    is_wrapped: bool = is_traceable_wrapper_subclass(value)  # DTensor, the quantised tensors of torchao
    if is_wrapped or value.layout != torch.strided or value.is_quantized:
        return f"is a {type(value).__name__} of {value.dtype} and layout {value.layout}; a plain tensor is needed"
    return None


def _fault(key: str, value: Tensor) -> str | None:
    dimensions, shape, value = value.dim(), tuple(value.shape), local(value)
    if isinstance(value, Int8Weight):
        return None
    takes_floats = key in ("weight", "weight_scale")
    if value.dtype not in (FLOATS if takes_floats else _INTEGERS):
        return f"is {value.dtype}; {_ALLOWED[key]}"
    if key != "weight" and dimensions not in ((2,) if key == "weight_q" else (1, 2)):
        return f"has shape {shape}; {_ALLOWED[key]}"
    bounds = SCALES if key == "weight_scale" else (0, 255)
    if not (is_finite(value) if key == "weight" else lies_within(value, *bounds)):
        low, high = (bound.item() for bound in torch.aminmax(value.detach()))
        return f"has values from {low} to {high}; {_ALLOWED[key]}"
    return None


def _cast(key: str, value: Tensor) -> Tensor:
    value = value.detach()
    if key == "weight":
        return value
    return value.to(torch.float32 if key == "weight_scale" else torch.uint8).contiguous()


def _joined(prefix: str, keys: Iterable[str]) -> str:
    return ", ".join(f"{prefix}{key}" for key in keys)
