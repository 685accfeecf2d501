"""Layer-wise updates: each weight moves as soon as its gradient is known, during backward, and the gradient is freed.

So the gradients of one layer are alive at a time instead of the whole model's. A hook runs the engine of its one
parameter; the state stays where it always is, in ``optimizer.state``, and the numbers are those of a plain step.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from .checks import Label, is_flattened, labels
from .engine import Engine
from .optimizer import APOLLOAdamW
from .sharding import is_dtensor


def attach_layerwise(model: nn.Module, optimizer: APOLLOAdamW) -> Layerwise:
    """Update each weight of ``optimizer`` during ``loss.backward()`` and free its gradient at once.

    The training loop stays as it is and so do its results, bit for bit: ``optimizer.step()`` updates what still has a
    gradient and ends the step. A parameter that is added or unfrozen later is updated by ``step()`` once, and by its
    hook from then on. All but the last backward of a step go into ``with handle.accumulate():``. Learning rates are
    read during backward, so set them before it.

    Returns a handle; ``handle.remove()``, or leaving it as a context manager, brings plain behaviour back.

    Raises:
        ValueError: hooks are attached already, a parameter is not the model's, or something needs all gradients at
            once: ``max_grad_norm``, ``capturable``, DistributedDataParallel, FSDP, DTensor. ``GradScaler.step``
            raises it later.
        RuntimeError: from ``backward()``, for a weight whose gradient comes twice before ``optimizer.step()``: by
            reentrant checkpointing of a shared weight, or by accumulation outside ``accumulate()``.

    >>> model = nn.Linear(8, 8)
    >>> optimizer = APOLLOAdamW([{"params": [model.weight], "rank": 2}, {"params": [model.bias]}])
    >>> handle = attach_layerwise(model, optimizer)
    >>> model(torch.ones(8)).sum().backward()  # moves the weights
    >>> model.weight.grad is None
    True
    >>> optimizer.step()
    """
    if not isinstance(optimizer, APOLLOAdamW):
        raise TypeError(f"attach_layerwise(model, optimizer) needs the APOLLOAdamW itself, not {type(optimizer)}")
    if optimizer._layerwise is not None:
        raise ValueError("layer-wise updates are attached to this optimizer already; call remove() on their handle")
    _check_model(model, optimizer)
    handle = Layerwise(optimizer)
    handle.check_settings()
    handle.end_step()
    optimizer._layerwise = handle
    return handle


class Layerwise:
    """The hooks of one optimizer, made by ``attach_layerwise``."""

    def __init__(self, optimizer: APOLLOAdamW) -> None:
        self._optimizer = optimizer
        self._hooks: dict[Tensor, RemovableHandle] = {}
        self._places: dict[Tensor, tuple[int, Label]] = {}  # so that no hook looks through all parameters
        self._updated: set[Tensor] = set()
        self._accumulating = False
        self._lock = threading.Lock()  # autograd has a thread a device, and the caches are shared

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Gradients add up in ``.grad`` as usual; the next backward outside updates with their sum."""
        before, self._accumulating = self._accumulating, True
        try:
            yield
        finally:
            self._accumulating = before

    def remove(self) -> None:
        """Take the hooks away: from now on ``optimizer.step()`` updates everything. May be called again."""
        if self._optimizer._layerwise is not self:
            return
        for hook in self._hooks.values():
            hook.remove()
        engines = self._optimizer._layer_engines
        for engine in engines.values():
            self._optimizer._engine.take_over(engine)
        engines.clear()
        self._optimizer._layerwise = None

    def __enter__(self) -> Layerwise:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def check_settings(self) -> None:
        """Raise ValueError if a group has what needs all gradients at once."""
        for number, group in enumerate(self._optimizer.param_groups):
            _check_group(group, number)

    def refuse_grad_scaler(self) -> None:
        """Raise ValueError: the hooks have moved the weights by gradients that are still multiplied by the scale."""
        raise ValueError(
            "torch.amp.GradScaler scales all gradients, and layer-wise updates have used them by the time it could "
            "unscale them; train in bfloat16, or with GradScaler(enabled=False), or call remove() on the handle"
        )

    def end_step(self) -> None:
        """Start over with all of the optimizer's parameters as they are now: a hook for each that wants a gradient."""
        self._updated.clear()
        places = {label.parameter: (number, label) for number, label in labels(self._optimizer.param_groups)}
        trained = [label for _, label in places.values() if label.parameter.requires_grad]
        new = [label for label in trained if label.parameter not in self._hooks]
        for label in new:
            _check_parameter(label)
        this = weakref.ref(self)  # a hook lives in C++, where the garbage collector would not see a cycle

        def update(parameter: Tensor) -> None:
            if (handle := this()) is not None:
                handle._update(parameter)

        for label in new:
            self._hooks[label.parameter] = label.parameter.register_post_accumulate_grad_hook(update)
        self._places = places

    @torch.no_grad()
    def _update(self, parameter: Tensor) -> None:
        """The hook: one step of ``parameter``, whose gradient is complete, and then has none."""
        if self._accumulating or parameter not in self._places:
            return
        optimizer, (number, label) = self._optimizer, self._places[parameter]
        with self._lock:
            if parameter in self._updated:
                raise RuntimeError(_twice(label))
            group = optimizer.param_groups[number]
            _check_group(group, number)
            engine = optimizer._layer_engines.get(parameter)
            if engine is None:
                engine = Engine(optimizer._caches, number, label.number)
                optimizer._layer_engines[parameter] = engine
            own = {**group, "params": [parameter], "param_names": [label.name]}
            try:
                engine.run([own], optimizer.state, None, None)
            except (ValueError, RuntimeError) as error:
                if str(label) in str(error):
                    raise
                raise type(error)(f"{label}: {error}") from error
            # Kernels write unseen by autograd, which must know of it should a backward yet to come need the old value.
            torch.autograd.graph.increment_version(parameter)
            self._updated.add(parameter)
            parameter.grad = None


def _check_model(model: nn.Module, optimizer: APOLLOAdamW) -> None:
    """Raise ValueError unless hooks on the model see whole, final gradients of all of the optimizer's parameters."""
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "layer-wise updates would use gradients before DistributedDataParallel has averaged them, and the ranks "
            "would drift apart; use plain optimizer.step() with it"
        )
    own = set(model.parameters())
    foreign = [str(label) for _, label in labels(optimizer.param_groups) if label.parameter not in own]
    if foreign:
        raise ValueError(
            f"not in the model: {', '.join(foreign)}; give attach_layerwise the whole model that the optimizer trains"
        )


def _check_parameter(label: Label) -> None:
    """Raise ValueError for a shard, whose gradient is not whole in its hook."""
    parameter = label.parameter
    if is_dtensor(parameter):
        raise ValueError(
            f"{label} is a DTensor (FSDP2 or tensor parallel): FSDP2 frees whole gradients already and only shards "
            "remain, so layer-wise updates would gain nothing; use plain optimizer.step()"
        )
    if is_flattened(parameter):
        raise ValueError(
            f"{label} is flattened by FullyShardedDataParallel, which reduces gradients after the hooks; "
            "use plain optimizer.step()"
        )


def _check_group(group: dict[str, Any], number: int) -> None:
    if group["max_grad_norm"] is not None:
        raise ValueError(
            f"parameter group {number}: max_grad_norm={group['max_grad_norm']!r} needs the norm of all gradients, of "
            "which layer-wise updates keep one at a time; use max_grad_norm=None (the norm-growth limiter stays), "
            "or plain optimizer.step()"
        )
    if group["capturable"]:
        raise ValueError(
            f"parameter group {number}: capturable=True captures a whole step, and layer-wise updates run inside "
            "backward; use capturable=False, or plain optimizer.step()"
        )


def _twice(label: Label) -> str:
    return (
        f"{label}: its gradient comes a second time since the last optimizer.step(), and the first part has moved it "
        "already. If it is shared between parts that torch.utils.checkpoint runs, use use_reentrant=False; if "
        "gradients accumulate over several backward(), run all but the last inside `with handle.accumulate():`; "
        "else call optimizer.step() after each backward()"
    )
