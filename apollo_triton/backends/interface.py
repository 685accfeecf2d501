"""What the engine knows of a backend: the results of the verbs, and the updates that run them.

    sketch             G -> R, |G_c|^2             called only if the projected dimension is sharded; ranks sum R
    squared_norms      |G|^2                       called only to clip; of a sketch, which ``rescale`` takes then
    rescale            R -> moments in place, s    takes the sketches that were made, or makes the sketch itself
    sharded_results    what other ranks need       called only if the sums over a matrix are sharded
    apply              s, G -> W in place          takes what came back from the other ranks

``reference/updates.py`` and ``triton/updates.py`` implement ``Update``. Dictionaries are by the index of the member in
the plan, which all ranks count alike.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

import torch
from torch import Tensor

ByMember = dict[int, Tensor]

WARM_UP = "a step is captured before one was run as it is: run a step with the same parameters before every capture"


class StepScalars(NamedTuple):
    """The numbers that one step passes to every verb: t on the host, 0 where ``step_tensor`` (float32) has it on the
    device; ``gradient_scale``, a float32 scalar that multiplies every gradient, None for 1; and ``numbers``, float32
    ``[3]``: t, the step size h and the decay, where t or the learning rate is on the device."""

    step: int
    step_tensor: Tensor | None = None
    gradient_scale: Tensor | None = None
    numbers: Tensor | None = None

    def scaled(self, gradient_scale: Tensor | None) -> StepScalars:
        """The same with a ``gradient_scale``."""
        return self if gradient_scale is None else self._replace(gradient_scale=gradient_scale)


class Sketch(NamedTuple):
    """R and |G_c|^2, float32: sums over the projected dimension, so they can be added up where that is sharded.

    Of a batch ``[matrices, channels, rank]`` and ``[matrices, channels]``, or |G|_F^2 ``[matrices, 1]`` for
    ``scale_type="tensor"``. Of a table ``[all channels, rank]`` and ``[all channels]``.
    """

    projected: Tensor
    squared_norms: Tensor


class Factors(NamedTuple):
    """s_c, None for ``scale_type="tensor"``, and the sums over channels that the limiter needs, float32.

    The sums are u^2 ``[..., 1]``, or |N|^2, |R|^2, |G|^2 ``[..., 3]`` for ``scale_type="tensor"``. They can be added up
    where channels are sharded. A batch has s_c ``[matrices, channels]`` and one row of sums a matrix; a table s_c
    ``[all channels]`` and one row a program, which ``apply`` adds up.
    """

    channel: Tensor | None
    sums: Tensor


_MOST_KEPT = 1 << 29  # bytes


def keeps_sketch(R: int, gradient: int, is_fused: bool) -> bool:
    """Whether clipping makes the sketch at once, takes the norm from it, and keeps it until the norm of all gradients
    is known. If not, the gradient is read once more, for its norm alone.

    ``R`` and ``gradient``: the bytes of each. If R is kept, it is written and read. That is worth it if it is less than
    G, as for bfloat16 at ranks below a quarter of the width. ``is_fused``: without clipping R would not leave the
    registers. If it does so anyway, to keep it moves nothing.

    At most 512 MiB for a table or batch. They are taken when activations are gone, so that the peak of a training step
    does not see them. LLaMA-7B's two tables take 5 + 1 MB at rank 1, 315 + 90 at rank 64, and 1258 + 361 at rank 256,
    where the first is read once more. A bound on their sum would depend on what else is trained, and replicas of a
    weight, which must agree to the bit, might keep it on one rank alone.
    """
    return R <= _MOST_KEPT and (not is_fused or gradient > 2 * R)


class Update(Protocol):
    """What one step does to one batch, table or dense parameter. It lives for that step.

    ``is_width_sharded``: the projected dimension is cut over ranks. ``is_sum_sharded``: any sum over a matrix is.
    """

    is_width_sharded: bool
    is_sum_sharded: bool
    device: torch.device

    def squared_norms(self) -> ByMember:
        """|G|_F^2 of each matrix here, ``[matrices]``, which clipping needs of every member, before ``rescale``."""
        ...

    def sketch(self) -> ByMember:
        """R, and where factors are per channel |G_c|^2 as its last column: ``[matrices, channels, columns]``."""
        ...

    def rescale(self, sketches: ByMember, gradient_scale: Tensor | None) -> None:
        """Move the moments and keep the factors; ``gradient_scale`` multiplies the gradients, None for 1."""
        ...

    def sharded_results(self) -> tuple[ByMember, ByMember]:
        """s_c ``[matrices, channels]`` of the channels whose moments are here, and the sums ``[matrices, columns]``."""
        ...

    def apply(self, factors: ByMember, sums: ByMember) -> Tensor | None:
        """Move the weights. Returns how many matrices were skipped, an int64 scalar, unless a table counts them."""
        ...
