"""Steps that would train nothing: the optimizer's parameters are not those of the model any more, or never were.

An optimizer does not know its model. It can only see which parameters a conversion of ours has replaced, and that no
parameter has ever had a gradient.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor

from ..core.messages import warn
from ..int8.replaced import count_replaced, replaced_by
from .member import params_of

_STEPS = 2  # the first may be the one that schedulers want before they are made


class IdleSteps:
    """Looks at the steps of one optimizer until it has seen a gradient, and again whenever a conversion has replaced
    parameters."""

    def __init__(self) -> None:
        self._without_gradient: int | None = 0  # how many steps; None once there was a gradient
        self._replaced = 0

    def check(self, groups: list[dict[str, Any]], updated: Collection[Tensor]) -> None:
        """Raise ValueError if a parameter was replaced in its model, and warn once if none has ever had a gradient.

        ``updated`` are the parameters that hooks have updated since the last step.
        """
        if self._replaced != count_replaced():
            self._check_replaced(groups, updated)
        if self._without_gradient is not None:
            self._count(groups, updated)

    def _check_replaced(self, groups: list[dict[str, Any]], updated: Collection[Tensor]) -> None:
        count = count_replaced()
        replaced = [param for param in params_of(groups) if replaced_by(param.tensor) and param.tensor.requires_grad]
        # One that still gets gradients is also a parameter of another model, which was not converted.
        idle = [param for param in replaced if param.tensor.grad is None and param.tensor not in updated]
        if idle:
            conversion, total = replaced_by(idle[0].tensor), sum(len(group["params"]) for group in groups)
            raise ValueError(
                f"{idle[0]} is not in its model any more: {conversion} has replaced {len(idle)} of this optimizer's "
                f"{total} parameters, and steps do not reach the new ones; make the optimizer after {conversion}"
            )
        if not replaced:
            self._replaced = count

    def _count(self, groups: list[dict[str, Any]], updated: Collection[Tensor]) -> None:
        params = [parameter for group in groups for parameter in group["params"]]
        if updated or any(parameter.grad is not None for parameter in params):
            self._without_gradient = None
            return
        assert self._without_gradient is not None
        self._without_gradient += 1
        if self._without_gradient == _STEPS and params:
            frozen = sum(not parameter.requires_grad for parameter in params)
            warn(
                f"step() has found no gradient in any of its {len(params)} parameters ({frozen} of them frozen), now "
                f"{_STEPS} times in a row, so it trains nothing. Call backward() before it. If you do, the model's "
                "parameters were replaced after the optimizer was made (fully_shard, LoRA, a conversion, "
                "load_state_dict(assign=True)): make the optimizer after that"
            )
