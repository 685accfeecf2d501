"""Layer-wise updates: each weight moves as soon as its gradient is known, during backward, and the gradient is freed.

So only one layer's gradients are alive at a time. Each unit of parameters has an engine of its own (``units.py``). The
state stays in ``optimizer.state``, and the numbers are those of a plain step.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..core.implicit_gradient import LIMITER_NORMS, ImplicitGradient, pays
from ..core.messages import warn
from ..core.spelling import explaining_unknown_options
from ..core.tensor_parallel import largest_part
from ..optimizer import APOLLOAdamW
from ..params.member import Param, params_of
from .attached import attached, check_others
from .checks import (
    check_group,
    check_groups,
    check_layers,
    check_model,
    check_operands,
    check_parameter,
    twice,
    warn_of_replicas,
)
from .clipping import warn_of_useless_clipping
from .fsdp2 import wait_for_offloaded
from .linear import LinearForward, layers_of
from .units import SameUpdates, Unit, Units

GRADIENTS = ("freed", "none", "auto")
_GONE = (
    "the optimizer of these layer-wise updates is gone, and optimizer.step() is still needed; keep it in a variable "
    "for as long as you train"
)


@explaining_unknown_options
def attach_layerwise(
    model: nn.Module, optimizer: APOLLOAdamW, gradients: str = "freed", limiter_norm: str = "exact"
) -> Layerwise:
    """Update each weight of ``optimizer`` during ``loss.backward()`` and free its gradient at once, or never make it.

    The training loop stays as it is and so do its results, bit for bit: ``optimizer.step()`` updates what still has a
    gradient and ends the step. A parameter that is added or unfrozen later is updated by ``step()`` once, and by its
    hook from then on. All but the last backward of a step go into ``with handle.accumulate():``. Learning rates are
    read during backward, so set them before it. ``clip_grad_norm_`` finds no gradients and does nothing. A warning says
    so at the first ``step()`` if it is in sight. What ``fully_shard`` has sharded moves module by module, once reduced.

    Args:
        model: the whole model that the optimizer trains, sharded already if it is to be.
        optimizer: an ``APOLLOAdamW``.
        gradients: "freed", or "none": low-rank weights of ``nn.Linear`` and ``Int8Linear`` are updated from the layer's
            input and the gradient of its output, and ``weight.grad`` is never made (docs/no-gradient.md); all other
            parameters as with "freed". "auto" is "none" for batches of few enough tokens that it takes no longer, and
            else "freed", layer by layer.
        limiter_norm: ignored with ``gradients="freed"``. Otherwise which norms the norm-growth limiter gets: "exact"
            are those of the gradient's channels, and cost up to one more matrix product a weight; "sketch" are their
            estimates by the sketch, and cost nothing.

    Returns a handle; ``handle.remove()``, or leaving it as a context manager, brings plain behaviour back. The handle
    does not keep the optimizer alive.

    Raises:
        ValueError: hooks are attached already, those of another optimizer included, a parameter is not the model's, or
            something needs all gradients at once: ``max_grad_norm``, ``capturable``, DistributedDataParallel, FSDP1.
            ``GradScaler.step`` raises it later. With ``gradients="none"`` or ``"auto"`` also for tied low-rank weights,
            ``proj="svd"``, ``nn.DataParallel``, what ``fully_shard`` manages, and if no weight would gain.
        RuntimeError: from ``backward()``, for a weight whose gradient comes twice before ``optimizer.step()``: by
            reentrant checkpointing of a shared weight, or by accumulation outside ``accumulate()``. With
            ``gradients="none"`` or ``"auto"`` also from ``accumulate()`` itself, and from ``backward()`` for a layer
            that ran forward twice.

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
    for name, value, allowed in (("gradients", gradients, GRADIENTS), ("limiter_norm", limiter_norm, LIMITER_NORMS)):
        if value not in allowed:
            raise ValueError(f"{name}={value!r} (allowed: {' or '.join(repr(option) for option in allowed)})")
    check_model(model, optimizer)
    check_groups(optimizer.param_groups, gradients)
    check_others(optimizer)
    layers = {} if gradients == "freed" else layers_of(model)
    if gradients != "freed":
        check_layers(model, optimizer, layers, gradients)
    warn_of_replicas(optimizer)
    handle = Layerwise(model, optimizer, gradients, limiter_norm, layers)
    handle.end_step()
    optimizer._layerwise = handle
    attached.add(handle)
    return handle


class Layerwise:
    """The hooks of one optimizer, made by ``attach_layerwise``.

    The optimizer holds its handle. The handle holds neither the optimizer nor the model, and of parameters only those
    that were in a group at the last ``step()``. So whatever else is gone is freed at once.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: APOLLOAdamW,
        gradients: str,
        limiter_norm: str,
        layers: Mapping[Tensor, nn.Linear],
    ) -> None:
        this = weakref.ref(self)

        def drop(_: object) -> None:
            if (handle := this()) is not None:
                handle._drop()

        self._reference = weakref.ref(optimizer, drop)
        self.gradients, self._limiter_norm = gradients, limiter_norm
        # Layers that can do without their weight's gradient, and the weight that each had.
        self._layers = weakref.WeakKeyDictionary({layer: weakref.ref(weight) for weight, layer in layers.items()})
        self._without: set[Tensor] = set()  # those of these weights that are in a group
        self._hooks: dict[Tensor, RemovableHandle] = {}
        self._params: dict[Tensor, Param] = {}  # so that no hook looks through all parameters
        self._units = Units(model)
        self._same_updates = SameUpdates()
        self._left: list[RemovableHandle] = []  # hooks that have outlived the optimizer
        self._updated: set[Tensor] = set()  # since the last step()
        self._steps: list[bool] = []  # not empty once there was a step()
        self._accumulating: list[Callable[[], bool]] = []  # the conditions of all ``accumulate()`` that are open
        self._looked_for_clipping = False
        self._lock = threading.Lock()  # autograd has a thread a device, and the caches are shared

    def __repr__(self) -> str:
        if not self.is_attached:
            return "Layerwise(removed)"
        implicit = len(self.without_gradient)
        return f"Layerwise(gradients={self.gradients!r}, {len(self._hooks)} parameters, {implicit} without gradient)"

    @property
    def _optimizer(self) -> APOLLOAdamW:
        optimizer = self._reference()
        if optimizer is None:
            raise RuntimeError(f"{_GONE}, or call remove() on the handle of attach_layerwise")
        return optimizer

    @property
    def is_attached(self) -> bool:
        """Whether the hooks update weights: until ``remove()``, and while the optimizer exists."""
        optimizer = self._reference()
        return optimizer is not None and optimizer._layerwise is self

    @contextmanager
    def accumulate(self, when: Callable[[], bool] = lambda: True) -> Iterator[None]:
        """Gradients add up in ``.grad`` as usual; the next backward outside updates with their sum.

        ``when`` is asked at each gradient whether it is to be kept. So one ``with`` may be around a whole loop that
        knows by itself which backward ends a step: ``handle.accumulate(lambda: not accelerator.sync_gradients)``.

        Raises RuntimeError unless ``gradients="freed"``.
        """
        if self.gradients != "freed":
            raise RuntimeError(
                f'gradients="{self.gradients}" has no gradients that could accumulate; use larger batches, with '
                'activation checkpointing if need be, or attach_layerwise(..., gradients="freed")'
            )
        self._accumulating.append(when)
        try:
            yield
        finally:
            self._accumulating.remove(when)

    def remove(self) -> None:
        """Take the hooks away: from now on ``optimizer.step()`` updates everything. May be called again."""
        self._regroup({})
        for layer in self._layers:
            if self._has(layer):
                del layer.__dict__["forward"]
        for hook in self._left:
            hook.remove()
        if self.is_attached:
            self._optimizer._layerwise = None
        self._drop()

    def _drop(self) -> None:
        """Let go of all parameters and of what is kept for them."""
        self._left = [*self._hooks.values()]
        self._units.regroup(())
        for kept in (self._hooks, self._params, self._without, self._updated):
            kept.clear()

    def _regroup(self, params: dict[Tensor, Param]) -> None:
        """Drop the hooks and engines of all but ``params``. The optimizer's own engine takes over their skips."""
        for parameter in self._hooks.keys() - params.keys():
            self._hooks.pop(parameter).remove()
        dropped, optimizer = self._units.regroup(params.keys()), self._reference()
        for engine in dropped:
            if optimizer is not None:
                optimizer._engine.take_over(engine)
        self._params = params

    def __enter__(self) -> Layerwise:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def check_settings(self, groups: list[dict[str, Any]]) -> None:
        """Raise ValueError if a group has what needs all gradients at once."""
        check_groups(groups, self.gradients)

    def check_step(self) -> None:
        """Raise ValueError for what needs all gradients at once, or if ranks moved others. Warn once of clipping."""
        check_groups(self._optimizer.param_groups, self.gradients)
        self._same_updates.check(self._updated, self._params.values(), self._optimizer)
        self._steps[:] = [True]
        if self._updated and not self._looked_for_clipping:
            self._looked_for_clipping = True
            warn_of_useless_clipping()

    def refuse_grad_scaler(self) -> None:
        """Raise ValueError: the hooks have moved the weights by gradients that are still multiplied by the scale."""
        raise ValueError(
            "torch.amp.GradScaler scales all gradients, and layer-wise updates have used them by the time it could "
            "unscale them; train in bfloat16, or with GradScaler(enabled=False), or call remove() on the handle"
        )

    def skipped(self) -> list[Tensor]:
        """How many updates the hooks have skipped: int64 scalars to be added up."""
        return [count for engine in self._units.engines for count in engine.skipped()]

    def forget(self) -> None:
        """Drop what the engines keep between steps, the skips that they have counted included."""
        self._units.forget()

    def updated(self) -> Collection[Tensor]:
        """The parameters that hooks have updated since the last step."""
        return self._updated

    def end_step(self) -> None:
        """Start over with all of the optimizer's parameters as they are now: a hook for each that wants a gradient, and
        none for those that are in no group any more."""
        self._updated.clear()
        params = {param.tensor: param for param in params_of(self._optimizer.param_groups)}
        new = [param for param in params.values() if param.tensor.requires_grad and param.tensor not in self._hooks]
        for param in new:
            check_parameter(param)
        this = weakref.ref(self)  # a hook lives in C++, where the garbage collector would not see a cycle
        steps = self._steps

        def update(parameter: Tensor) -> None:
            if (handle := this()) is not None:
                handle._update_from_gradient(parameter)
            elif not steps:  # attach_layerwise(model, APOLLOAdamW(...)): nothing holds either
                steps.append(True)
                warn(f"{_GONE}. No weight moves")

        for param in new:
            self._hooks[param.tensor] = param.tensor.register_post_accumulate_grad_hook(update)
        self._regroup(params)
        held = {layer: weight() for layer, weight in self._layers.items()}
        self._without = {weight for weight in held.values() if weight in params}
        for layer, weight in held.items():
            if weight in self._without and self._is_low_rank(weight) and not self._has(layer):
                layer.__dict__["forward"] = LinearForward(layer, self)

    @property
    def updates(self) -> Collection[Tensor]:
        """The parameters that hooks update; none once it is removed."""
        return self._hooks.keys() if self.is_attached else ()

    @property
    def without_gradient(self) -> list[str]:
        """The parameters that are updated without a gradient."""
        return [str(param) for parameter, param in self._params.items() if self.takes(parameter)]

    def takes(self, weight: Tensor) -> bool:
        """Whether ``weight`` is updated from its operands: for ``LinearForward``."""
        return self.is_attached and weight in self._without and self._is_low_rank(weight)

    def pays(self, weight: Tensor, tokens: int) -> bool:
        """Whether it is also to be for a batch of so many tokens: for ``LinearForward``."""
        rows, columns = largest_part(weight)
        return self.gradients != "auto" or pays(tokens, rows, columns, self._limiter_norm)

    def name(self, weight: Tensor) -> str:
        """What an error calls ``weight``: for ``LinearForward``."""
        return str(self._params[weight])

    def _has(self, layer: nn.Linear) -> bool:
        """Whether the layer's forward is this handle's."""
        forward = layer.__dict__.get("forward")
        return isinstance(forward, LinearForward) and forward.updater is self

    def _is_low_rank(self, parameter: Tensor) -> bool:
        param = self._params.get(parameter)
        return param is not None and self._optimizer.param_groups[param.group].get("rank") is not None

    def check(self, weight: Tensor, ran_once: bool) -> None:
        """Raise RuntimeError or ValueError unless ``weight`` may be updated now: for ``LinearForward``."""
        param = self._params[weight]
        check_operands(param, self.gradients, weight in self._updated, ran_once)
        check_group(self._optimizer.param_groups[param.group], param.group, self.gradients)

    def update(self, weight: Tensor, gradient: ImplicitGradient) -> None:
        """One step of ``weight`` without its gradient: for ``LinearForward``."""
        with self._lock:
            self._same_updates.begin(weight, self._params.values(), self._optimizer)
            self._step(self._units[weight], [weight], {weight: gradient._replace(limiter_norm=self._limiter_norm)})

    def _update_from_gradient(self, parameter: Tensor) -> None:
        """The hook: the gradient of ``parameter`` is complete. One step of whatever has waited for it."""
        optimizer = self._optimizer
        if parameter not in self._params or parameter.grad is None or any(when() for when in self._accumulating):
            return
        param = self._params[parameter]
        wait_for_offloaded(parameter)
        with self._lock:
            if parameter in self._updated or self._units.is_waiting(parameter):
                raise RuntimeError(twice(param, self.gradients))
            check_group(optimizer.param_groups[param.group], param.group, self.gradients)
            self._same_updates.begin(parameter, self._params.values(), optimizer)
            self._move(self._units.arrive(parameter, self._update_what_is_left))

    def _update_what_is_left(self) -> None:
        """At the end of a backward, for a module of which some parameters got no gradient in it."""
        if self.is_attached:
            with self._lock:
                self._move(self._units.left())

    def _move(self, units: Iterator[tuple[Unit, list[Tensor]]]) -> None:
        """One step of each unit, whose gradients are freed."""
        for unit, parameters in units:
            self._step(unit, parameters, {})
            for parameter in parameters:
                parameter.grad = None
            self._units.moved(unit)

    @torch.no_grad()
    def _step(self, unit: Unit, parameters: list[Tensor], given: dict[Tensor, ImplicitGradient]) -> None:
        """One step of parameters of a unit."""
        optimizer, params = self._optimizer, [self._params[parameter] for parameter in parameters]
        unit.step(params, optimizer.param_groups, optimizer.state, optimizer._caches, given)
        self._updated.update(parameters)
