"""What FSDP2 gathers of an int8 weight before its layer runs: codes, scales and zero points, not floats.

At groups of 128 that is 1 + 5 / 128 bytes an element, against 2 of bfloat16. The two methods are FSDP2's all-gather
extension. The parts are gathered one after the other into buffers that FSDP2 owns, frees and fills again, so that the
unsharded weight is made once and only looks at them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..core.dtensors import local


class GatheredByFSDP:
    """The hooks that ``fully_shard`` looks for in a local tensor. Mixed into ``Int8Weight``."""

    def fsdp_pre_all_gather(
        self: Any, mesh: Any, outer_size: torch.Size, outer_stride: tuple[int, ...], module: Any, mp_policy: Any
    ) -> tuple[tuple[Tensor, ...], Any]:
        """What each rank sends. Raises ValueError, on all ranks alike, unless the shards are whole rows of one size."""
        rows, columns = self.shape
        if tuple(outer_size) not in ((rows * mesh.size(), columns), (rows, columns)):
            raise ValueError(
                f"{self.title} is cut into pieces of shape {(rows, columns)} over {mesh.size()} ranks; FSDP2 gathers "
                "int8 weights that are cut into equal numbers of whole rows: leave shard_placement_fn out, or the "
                "layer out of quantize_model's target_modules"
            )
        return (self.q, self.scale, self.zero), None

    def fsdp_post_all_gather(
        self: Any, outputs: tuple[Tensor, ...], metadata: Any, param_dtype: torch.dtype, *, out: Tensor | None = None
    ) -> Any:
        """The whole weight, of whose memory FSDP2 needs to free nothing beside ``outputs``. With ``out``, which looks
        at the same buffers, there is nothing to do.

        On a mesh of one rank FSDP2 copies the first part alone. Scales and zero points are then those of the shard.
        """
        if len(outputs) == 1:
            outputs = (*outputs, self.scale.to(outputs[0].device), self.zero.to(outputs[0].device))
        if out is None:
            parts = dict(zip(map(id, (self.q, self.scale, self.zero)), outputs, strict=True))
            return self.with_parts(lambda part: parts[id(part)], param_dtype), ()
        whole: Any = local(out)
        if _place(whole.q) != _place(outputs[0]):
            raise RuntimeError(f"{self.title}: FSDP2 has gathered it into other memory than it had at first")
        whole.q, whole.scale, whole.zero = outputs
        return None


def _place(tensor: Tensor) -> tuple[int, int]:
    """Where a tensor begins. Memory estimates gather fake ones, which have no address."""
    return tensor.untyped_storage()._cdata, int(tensor.storage_offset())
