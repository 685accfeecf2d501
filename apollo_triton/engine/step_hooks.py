"""What updates parameters before ``step``, as far as the optimizer has to know it: ``layerwise.Layerwise`` is one."""

from __future__ import annotations

from collections.abc import Collection
from typing import Any, Protocol

from torch import Tensor


class StepHooks(Protocol):
    """Updates within the backward pass."""

    def check_settings(self, groups: list[dict[str, Any]]) -> None: ...

    def check_step(self) -> None: ...

    @property
    def updates(self) -> Collection[Tensor]: ...

    def updated(self) -> Collection[Tensor]: ...

    def takes(self, weight: Tensor) -> bool: ...

    def skipped(self) -> list[Tensor]: ...

    def refuse_grad_scaler(self) -> None: ...

    def forget(self) -> None: ...

    def end_step(self) -> None: ...
