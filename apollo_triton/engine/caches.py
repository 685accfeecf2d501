"""What the engines of one optimizer share: made again whenever it is missing, never state, never saved.

Layer-wise updates run an engine for each parameter or sharded module. They share one P a width: at 7B one each would
take 450 MB.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakSet

from ..core.projection import ProjectionCache
from ..core.scratch import Scratch

if TYPE_CHECKING:
    from ..backends.triton.projections import ProjectionBuffer


@dataclass
class Caches:
    """P for the reference path; P for the kernels, alive for as long as a plan uses it; float32 blocks.

    ``has_told_of_blocks``: whether the user knows that 8-bit moments of some shards stay floats.
    """

    projections: ProjectionCache = field(default_factory=ProjectionCache)
    projection_buffers: WeakSet[ProjectionBuffer] = field(default_factory=WeakSet)
    scratch: Scratch = field(default_factory=Scratch)
    has_told_of_blocks: bool = False
