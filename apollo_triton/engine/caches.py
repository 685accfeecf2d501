"""What the engines of one optimizer share: made again whenever it is missing, never state, never saved.

Layer-wise updates run an engine a parameter. One P a width serves them all: at 7B one for each would be 450 MB.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING
from weakref import WeakSet

from ..core.projection import ProjectionCache
from ..core.scratch import Scratch

if TYPE_CHECKING:
    from ..backends.triton.projections import Projection


@dataclass
class Caches:
    """P for the reference path; P for the kernels, alive for as long as a plan uses it; float32 blocks."""

    projections: ProjectionCache = field(default_factory=ProjectionCache)
    materialised: WeakSet[Projection] = field(default_factory=WeakSet)
    scratch: Scratch = field(default_factory=Scratch)
