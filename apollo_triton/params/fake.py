"""Fake tensors (``FakeTensorMode``), which have shapes and no values: memory estimates step on them.

Their state is made, also fake, and the step is counted. There is nothing to compute.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from ..core.dtensors import local
from ..core.settings import Settings
from ..int8.weight import int8_weight_of
from .member import Param
from .sharding import LocalShard
from .state import make_state


def fake_mode_of(tensor: Tensor) -> Any:
    """The ``FakeTensorMode`` of a fake tensor; None for any other."""
    if type(tensor) in (torch.nn.Parameter, Tensor):
        return None
    weight = int8_weight_of(tensor)
    return getattr(local(tensor) if weight is None else weight.q, "fake_mode", None)


def real_numbers(fake: bool) -> AbstractContextManager[Any]:
    """A context in which a step count is a real number, which the host can read, also within a ``FakeTensorMode``."""
    if not fake:
        return nullcontext()
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    return unset_fake_temporarily()


def make_state_like(param: Param, settings: Settings, shard: LocalShard) -> dict[str, Any]:
    """``make_state``. That of a fake parameter is fake too, except its step count."""
    mode = fake_mode_of(param.tensor)
    if mode is None:
        return make_state(param, settings, shard)
    with mode:
        made = make_state(param, settings, shard)
    with real_numbers(True):
        made["step"] = torch.zeros((), dtype=torch.float32, device="cpu")
    return made
