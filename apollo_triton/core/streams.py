"""Which streams of a device use which memory. On a CPU, which has one order for everything, nothing here does anything.

A device does what one stream is given in order, and keeps no order between streams. The allocator gives memory that
the host frees to the stream on which it was made, at once, while kernels on other streams may still read it. Weights,
gradients and state are the caller's, who orders streams as with any optimizer. What an optimizer keeps beside them
nobody else can see.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor


def current(device: torch.device) -> Any:
    """The stream that takes launches for ``device`` now; None where there are no streams."""
    if device.type == "cpu":
        return None
    current_stream = getattr(getattr(torch, device.type, None), "current_stream", None)
    return current_stream and current_stream(device)


def hold(tensor: Tensor, stream: Any) -> None:
    """Let the memory go, once the host has freed it, only when ``stream`` has done what it was given until then."""
    tensor.record_stream(stream)


def hold_here(tensor: Tensor) -> None:
    """The same for the current stream, before it reads what is replaced at some later step."""
    stream = current(tensor.device)
    if stream is not None:
        hold(tensor, stream)


class Uses:
    """The streams that use some tensors, which lie on one device and were made on its current stream.

    Whoever reads waits for whoever has written last. Whoever writes waits for all who have read since. The host never
    waits. A stream that has used the tensors before costs a look into a set.
    """

    def __init__(self, tensors: Sequence[Tensor]) -> None:
        self._tensors, self._device = tensors, tensors[0].device
        stream = current(self._device)
        self._holders, self._users = {stream}, {stream}  # ever, and since the last write
        self._written: Any = None  # an event

    def hold(self) -> None:
        """Before a use that the caller orders."""
        stream = current(self._device)
        if stream is not None and stream not in self._holders:
            self._holders.add(stream)
            for tensor in self._tensors:
                hold(tensor, stream)

    def read(self) -> None:
        """Before the current stream reads."""
        stream = current(self._device)
        if stream is not None and stream not in self._users:
            stream.wait_event(self._written)
            self._users.add(stream)
            self.hold()

    def write(self) -> None:
        """Before the current stream writes; ``written`` comes after it."""
        stream = current(self._device)
        for other in self._users - {stream}:
            stream.wait_stream(other)
        self.hold()

    def written(self) -> None:
        """After the current stream was given what writes."""
        stream = current(self._device)
        if stream is not None:
            self._users = {stream}
            self._written = stream.record_event()
