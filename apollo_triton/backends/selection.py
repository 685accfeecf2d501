"""Which backend updates a parameter, and why."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..core.backend import Backend, choose
from ..core.settings import Settings
from ..params.member import geometry_of
from ..params.state import is_8bit
from .reference import dense_8bit


def engine_of(parameter: Tensor, settings: Settings, state: Mapping[str, Any]) -> Backend:
    """Which engine updates it, and why: ``choose``, but for what is bitsandbytes' to update.

    Raises ValueError where that cannot be had.
    """
    backend = choose(parameter, settings.backend)
    if geometry_of(parameter, settings) is None and is_8bit(parameter, settings, state):
        obstacle = dense_8bit.obstacle(parameter.device)
        if obstacle is not None:
            raise ValueError(
                f"its 8-bit moments are bitsandbytes' to update, which cannot on {parameter.device} ({obstacle}); "
                "install bitsandbytes 0.50 or newer (on CUDA 0.45), or put it into a group with 'state_bits': 32"
            )
        return Backend("reference", "bitsandbytes updates it: its moments are 8-bit and it is not projected")
    return backend
