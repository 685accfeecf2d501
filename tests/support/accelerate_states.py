"""Functions that change Accelerate's state, of which a process has only one."""

from __future__ import annotations

import sys
from typing import Any


def forget_accelerate() -> None:
    """Reset the state, if there is one, so that the next Trainer or Accelerator starts afresh."""
    if "accelerate" in sys.modules:
        sys.modules["accelerate"].state.AcceleratorState._reset_state(reset_partial_state=True)


def shard_on_cpus() -> None:
    """Make Accelerate shard on CPUs too, in this process from here on. Nothing else of it changes.

    It shards on accelerators only. On a CPU it ignores its FSDP plugin and gives no warning.
    """
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def initialise(self: AcceleratorState, *arguments: Any, fsdp_plugin: Any = None, **keys: Any) -> None:
        original(self, *arguments, fsdp_plugin=fsdp_plugin, **keys)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # every later state reads it

    AcceleratorState.__init__ = initialise
