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

from ..core.messages import shown
from .weight import FLOATS, SCALES, Int8Weight, is_finite, lies_within

PARTS = {"weight_q": "q", "weight_scale": "scale", "weight_zero": "zero"}

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)
_NAMES = ", ".join(str(dtype).removeprefix("torch.") for dtype in FLOATS)
_ALLOWED = {
    "weight": f"an int8 weight is made of finite values in {_NAMES}",
    "weight_q": "codes are integers from 0 to 255, a matrix of the weight's shape",
    "weight_scale": f"scales are {_NAMES}, finite and above 0, one for each group",
    "weight_zero": "zero points are integers from 0 to 255, one for each group",
}


def checked(found: Mapping[str, Any], prefix: str, errors: list[str]) -> dict[str, Tensor]:
    """What a checkpoint says of one weight, either a float or int8 ``weight`` or some of ``PARTS``.

    ``found`` is what it has under these keys. Parts come back in the dtypes and layout of the format. Codes that an
    earlier version saved as ``weight`` come back as ``weight_q``. If anything is refused, the result is empty, and
    ``errors`` gets a line for each fault, with its key.
    """
    faults = [f"{prefix}{key} {text}" for key, value in found.items() if (text := _unreadable(value))]
    found = dict(found) if not faults else {}
    parts = [key for key in PARTS if key in found]
    weight, old_name = found.get("weight"), False
    if isinstance(weight, Int8Weight):
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


def assembled(parts: Mapping[str, Tensor], prefix: str, weight: Int8Weight, errors: list[str]) -> Int8Weight | None:
    """The int8 weight of all ``PARTS``, each of which is checked, for a layer that holds ``weight``; None, with a line
    in ``errors``, if their shapes do not suit each other or the layer."""
    q, scale, zero = (parts[key] for key in PARTS)
    if q.shape != weight.shape:
        errors.append(
            f"size mismatch for {prefix}weight: its codes have shape {tuple(q.shape)} in the checkpoint, and the "
            f"model's weight has {tuple(weight.shape)}"
        )
    elif len({part.is_meta for part in (q, scale, zero)}) == 2:
        errors.append(f"{_joined(prefix, PARTS)}: some are on the meta device, and some are not")
    elif not scale.numel() or q.numel() % scale.numel() or zero.shape != scale.shape:
        errors.append(
            f"{prefix}weight has {q.numel()} codes, {prefix}weight_scale has {scale.numel()} entries and "
            f"{prefix}weight_zero {zero.numel()}: each group needs one scale and one zero point"
        )
    else:
        group_size = q.numel() // scale.numel()
        scale, zero = scale.to(q.device), zero.to(q.device)
        return Int8Weight(q, scale, zero, group_size, weight.dtype, weight.stochastic_rounding)
    return None


def _unreadable(value: Any) -> str | None:
    if not isinstance(value, Tensor):
        return f"is {shown(value)}, and no tensor"
    if isinstance(value, Int8Weight):
        return None
    is_wrapped: bool = is_traceable_wrapper_subclass(value)  # DTensor, the quantised tensors of torchao
    if is_wrapped or value.layout != torch.strided or value.is_quantized:
        return f"is a {type(value).__name__} of {value.dtype} and layout {value.layout}; a plain tensor is needed"
    return None


def _fault(key: str, value: Tensor) -> str | None:
    if isinstance(value, Int8Weight):
        return None
    takes_floats = key in ("weight", "weight_scale")
    if value.dtype not in (FLOATS if takes_floats else _INTEGERS):
        return f"is {value.dtype}; {_ALLOWED[key]}"
    if key != "weight" and value.dim() != (2 if key == "weight_q" else 1):
        return f"has shape {tuple(value.shape)}; {_ALLOWED[key]}"
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
