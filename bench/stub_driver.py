"""Triton's way to a launch on a machine without a GPU: everything up to the driver is real.

After ``install()`` ``kernel[grid](...)`` binds and specialises its arguments, compiles ahead of time for sm_90, and
looks the compiled kernel up, as on a GPU. Only the launcher, which on a GPU converts the arguments in C and calls the
driver, does nothing but count. Tensors on the CPU pass for the device's. Needs triton 3.4 or newer.
"""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

DEVICE, STREAM = 0, 0


class StubDriver:
    """What Triton asks of its driver. ``launches``: how many there were."""

    def __init__(self) -> None:
        from triton.backends.compiler import GPUTarget

        self.launches = 0
        self._target = GPUTarget("cuda", 90, 32)
        self.utils = SimpleNamespace(
            get_device_properties=lambda device: {"max_shared_mem": 227 * 1024},
            # module, function, registers, spills, and the most threads that a program may have
            load_binary=lambda name, kernel, shared, device: (name, name, 0, 0, 1024),
        )

    def get_current_device(self) -> int:
        return DEVICE

    def get_current_stream(self, device: int) -> int:
        return STREAM

    def get_current_target(self) -> Any:
        return self._target

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        return self._launch

    def _launch(self, *arguments: Any) -> None:
        self.launches += 1


def install() -> StubDriver:
    """The driver of this process from now on: there is no other to go back to."""
    from triton.runtime import driver

    stub = StubDriver()
    driver.set_active(stub)
    return stub
