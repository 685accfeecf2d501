"""The handles that are attached in this process, so that no two optimizers' hooks move one parameter."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Collection
from typing import Protocol

from torch import Tensor

from ..optimizer import APOLLOAdamW
from ..params.member import Param, params_of


class Handle(Protocol):
    @property
    def is_attached(self) -> bool: ...

    @property
    def updates(self) -> Collection[Tensor]: ...

    def remove(self) -> None: ...


attached: weakref.WeakSet[Handle] = weakref.WeakSet()


def check_others(optimizer: APOLLOAdamW) -> None:
    """Raise ValueError if hooks of another optimizer update one of this one's parameters: they would come first."""
    params = [*params_of(optimizer.param_groups)]
    for handle in [*attached]:
        if not handle.is_attached:
            handle.remove()  # its optimizer is gone, and its hooks would say so in backward

    def updated_by_others() -> list[Param]:
        hooks = [handle.updates for handle in attached]
        return [param for param in params if any(param.tensor in updates for updates in hooks)]

    if updated_by_others():
        gc.collect()  # a Trainer that is gone may hold itself, and so its optimizer, until the collector runs
        for param in updated_by_others():
            raise ValueError(
                f"{param} has layer-wise updates of another optimizer, whose hooks would move it first; call remove() "
                "on the handle that attach_layerwise returned for it"
            )
