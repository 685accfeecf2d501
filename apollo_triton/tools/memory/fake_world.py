"""A device mesh of any size in one process, which is its first rank. Collectives send nothing.

The first rank holds most: ``torch.chunk``, by which FSDP2 and tensor parallelism cut weights, gives it whole pieces.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from math import prod
from typing import Any

import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh


@contextmanager
def fake_mesh(**sizes: int) -> Iterator[Any]:
    """A mesh with these dimensions, for the time of a ``with``.

    Raises RuntimeError where a process group exists already, since a process has one.

    >>> with fake_mesh(data=128, tensor=8) as mesh:
    ...     mesh.size()
    1024
    """
    # Not public, and the only process groups that send nothing. The import registers collectives on the meta device.
    import torch.distributed._tools.fake_collectives  # noqa: F401
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError("this process has a process group; count in a process that has none")
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=prod(sizes.values()))
    try:
        yield init_device_mesh("cpu", tuple(sizes.values()), mesh_dim_names=tuple(sizes))
    finally:
        dist.destroy_process_group()
