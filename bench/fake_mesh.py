"""A device mesh of any size in one process, which is its first rank. Collectives send nothing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.testing._internal.distributed.fake_pg import FakeStore


@contextmanager
def fake_mesh(**sizes: int) -> Iterator[Any]:
    """A mesh with these dimensions, for the time of a ``with``.

    >>> with fake_mesh(data=128, tensor=8) as mesh:
    ...     mesh.size()
    1024
    """
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=prod(sizes.values()))
    try:
        yield init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    finally:
        dist.destroy_process_group()
