"""Which backend updates a parameter, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..core.device_backend import Backend, device_backend
from ..core.dtensors import is_dtensor, local
from ..core.settings import Settings
from ..int8.weight import int8_weight_of
from ..params.fake import fake_mode_of
from ..params.member import Param, geometry_of, has_row_moments, params_of
from ..params.sharding import LocalShard
from ..params.state import is_8bit
from .reference import dense_8bit


def backend_of(parameter: Tensor, settings: Settings, state: Mapping[str, Any], is_implicit: bool = False) -> Backend:
    """Which backend updates a parameter, and why; ``is_implicit`` if its gradient comes as its two factors.

    It is the device's backend, with two exceptions: bitsandbytes updates dense 8-bit moments, if they are one an
    element, and the kernels that take the factors need int8 groups that fit a tile. Raises ValueError where the backend
    cannot be had.
    """
    backend = device_backend(parameter, settings.backend)
    is_bitsandbytes = geometry_of(parameter, settings) is None and not has_row_moments(parameter, settings)
    if is_bitsandbytes and is_8bit(parameter, settings, state):
        obstacle = dense_8bit.obstacle(parameter.device)
        if obstacle is not None:
            raise ValueError(
                f"its 8-bit moments are bitsandbytes' to update, which cannot on {parameter.device} ({obstacle}); "
                "install bitsandbytes 0.50 or newer (on CUDA 0.45), or put it into a group with 'state_bits': 32"
            )
        return Backend("reference", "bitsandbytes updates it: its moments are 8-bit and it is not projected")
    weight = int8_weight_of(parameter)
    if is_implicit and backend.name == "triton" and weight is not None:
        group = weight.group_size  # a tile of the kernels has whole groups of whole rows
        if not (8 <= group <= 256 and group & (group - 1) == 0 and weight.shape[1] % group == 0):
            reason = f"group_size {group} is no power of two from 8 to 256 that divides its {weight.shape[1]} columns"
            return Backend("reference", reason)
    return backend


def step_backend(
    param: Param, settings: Settings, state: Mapping[str, Any], on_device: bool, is_implicit: bool = False
) -> Backend:
    """``backend_of`` for a step: "none" for a fake tensor. ``on_device``: whether the step count is there.

    Raises ValueError, which names the parameter, where the backend cannot be had or needs the count on the host.
    """
    if fake_mode_of(param.tensor) is not None:
        backend = Backend("none", "a fake tensor has no values")
    else:
        try:
            backend = backend_of(param.tensor, settings, state, is_implicit)
        except ValueError as error:
            raise ValueError(f"{param}: {error}") from None
    if on_device and backend.name != "triton":
        raise ValueError(
            f"{param}: capturable=True needs the Triton kernels, which do not update it ({backend.reason}); use "
            "capturable=False"
        )
    if settings.capturable and settings.proj == "svd" and param.tensor.dim() > 1:
        raise ValueError(f"{param}: proj='svd' reads the step count on the host; use capturable=False")
    return backend


def updater_of(backend: Backend, parameter: Tensor, shard: LocalShard) -> str:
    """The name of the backend that updates what of a parameter is here."""
    if local(parameter).numel():
        return backend.name
    # Nothing to update. But an empty shard takes part in the sums, and in low rank keeps a u_prev, to the bit as the
    # other ranks do: on their backend.
    is_matrix = shard.geometry is not None and shard.geometry.matrices > 0
    return "none" if not is_dtensor(parameter) else backend.name if is_matrix else "reference"


def may_leave_scaling(groups: list[dict[str, Any]], states: Mapping[Tensor, dict[str, Any]]) -> bool:
    """Whether ``torch.amp.GradScaler`` may leave unscaling to a step: kernels update all, on one device each, and none
    needs the step count on the host."""
    settings = [Settings.of(group, f"parameter group {index}") for index, group in enumerate(groups)]
    return all(
        backend_of(param.tensor, settings[param.group], states.get(param.tensor, {})).name == "triton"
        and not is_dtensor(param.tensor)
        and groups[param.group].get("proj") != "svd"
        for param in params_of(groups)
    )
