"""The GPUs that kernels are compiled for, none of which need be here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple
from unittest import mock

import torch

from apollo_triton.core import gpu


class Target(NamedTuple):
    """A GPU as Triton names it, and what a program may have of it."""

    backend: str
    architecture: Any
    threads: int  # of a warp
    shared_memory: int  # KiB
    tensor_memory: int = 0  # columns


TARGETS = {
    "sm_80": Target("cuda", 80, 32, 163),
    "sm_89": Target("cuda", 89, 32, 99),  # what users have at home, as sm_86
    "sm_90": Target("cuda", 90, 32, 227),
    "sm_100": Target("cuda", 100, 32, 227, 512),
    "gfx942": Target("hip", "gfx942", 64, 64),
}


@contextlib.contextmanager
def as_on(name: str) -> Iterator[None]:
    """The package chooses tiles, stages and precision on the CPU as it would on this target."""
    target = TARGETS[name]
    is_amd = target.backend == "hip"
    capability = (0, 0) if is_amd else divmod(target.architecture, 10)
    with contextlib.ExitStack() as stack:
        stack.enter_context(mock.patch.object(gpu, "capability", return_value=capability))
        stack.enter_context(mock.patch.object(torch.version, "hip", "7.0" if is_amd else None))
        yield
