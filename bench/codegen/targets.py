"""The GPUs that kernels are compiled for, none of which need be here."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import NamedTuple
from unittest import mock

import torch

from apollo_triton.core import gpu


class Target(NamedTuple):
    """A GPU as Triton names it, and what a program may have of it."""

    backend: str
    architecture: int | str
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
    with contextlib.ExitStack() as stack:
        large = target.shared_memory >= 160
        stack.enter_context(mock.patch.object(gpu, "has_large_shared_memory", return_value=large))
        stack.enter_context(mock.patch.object(torch.version, "hip", "7.0" if target.backend == "hip" else None))
        yield
