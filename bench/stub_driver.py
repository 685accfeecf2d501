"""Triton's way to a launch on a machine without a GPU: everything but the driver is real.

Inside ``installed()`` ``kernel[grid](...)`` binds and specialises its arguments, compiles ahead of time for sm_90, and
looks the compiled kernel up, as on a GPU. Only the launcher, which would convert the arguments in C and call the driver
(a few microseconds more on a GPU), does nothing but count. Tensors on the CPU pass for a device's.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

DEVICE, STREAM = 0, 0


class StubDriver:
    """What Triton asks of an active driver. ``launched``: the names of the kernels that were launched, in order, while
    ``keeps`` is set; a benchmark does not want the list to grow."""

    def __init__(self, capability: int = 90) -> None:
        from triton.backends.compiler import GPUTarget

        self._target = GPUTarget("cuda", capability, 32)
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
            # module, function, registers, spills, most threads of a program
            load_binary=lambda name, kernel, shared, device: (name, name, 0, 0, 1024),
        )
        self.launched: list[str] = []

    def get_current_device(self) -> int:
        return DEVICE

    def get_current_stream(self, device: int) -> int:
        return STREAM

    def get_current_target(self) -> Any:
        return self._target

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return _launch


def _launch(*arguments: Any) -> None:
    pass
