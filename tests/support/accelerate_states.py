"""Accelerate's state, which is one for the whole process, as tests need it."""

from __future__ import annotations

import sys
from typing import Any


def forget_accelerate() -> None:
    """Let the next Trainer or Accelerator begin anew, if there was one."""
    if "accelerate" in sys.modules:
        sys.modules["accelerate"].state.AcceleratorState._reset_state(reset_partial_state=True)


def shard_on_cpus() -> None:
    """Accelerate shards on accelerators alone, and passes over its own plugin on a CPU without a word: in this process
    it does not, from here on. Nothing else of it changes."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    original = AcceleratorState.__init__

    def initialise(self: AcceleratorState, *arguments: Any, fsdp_plugin: Any = None, **keys: Any) -> None:
        original(self, *arguments, fsdp_plugin=fsdp_plugin, **keys)
        if fsdp_plugin is not None:
            self.distributed_type, self.fsdp_plugin = DistributedType.FSDP, fsdp_plugin
            PartialState._shared_state["distributed_type"] = DistributedType.FSDP  # which every later state reads

    AcceleratorState.__init__ = initialise
