"""Layer-wise updates: each weight moves as soon as its gradient is known, during backward, and the gradient is freed.

So only one layer's gradients are alive at a time. A hook runs an engine of its own for one parameter. The state stays
in ``optimizer.state``, and the numbers are those of a plain step.
"""

from __future__ import annotations

import gc
import threading
import weakref
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from ..core.geometry import is_flattened
from ..core.implicit_gradient import LIMITER_NORMS, ImplicitGradient, pays
from ..engine.engine import Engine
from ..optimizer import APOLLOAdamW
from ..params.member import Param, params_of
from ..params.sharding import is_dtensor
from .linear import LinearForward, layers_of, owners_of

GRADIENTS = ("freed", "none", "auto")
_attached: weakref.WeakSet[Layerwise] = weakref.WeakSet()


def attach_layerwise(
    model: nn.Module, optimizer: APOLLOAdamW, gradients: str = "freed", limiter_norm: str = "exact"
) -> Layerwise:
    """Update each weight of ``optimizer`` during ``loss.backward()`` and free its gradient at once, or never make it.

    The training loop stays as it is and so do its results, bit for bit: ``optimizer.step()`` updates what still has a
    gradient and ends the step. A parameter that is added or unfrozen later is updated by ``step()`` once, and by its
    hook from then on. All but the last backward of a step go into ``with handle.accumulate():``. Learning rates are
    read during backward, so set them before it.

    Args:
        model: the whole model that the optimizer trains.
        optimizer: an ``APOLLOAdamW``.
        gradients: "freed", or "none": low-rank weights of ``nn.Linear`` and ``Int8Linear`` are updated from the layer's
            input and the gradient of its output, and ``weight.grad`` is never made (docs/no-gradient.md); all other
            parameters as with "freed". "auto" is "none" for batches of few enough tokens that it takes no longer, and
            else "freed", layer by layer.
        limiter_norm: ignored with ``gradients="freed"``. Otherwise which norms the norm-growth limiter gets: "exact"
            are those of the gradient's channels, and cost up to one more matrix product a weight; "sketch" are their
            estimates by the sketch, and cost nothing.

    Returns a handle; ``handle.remove()``, or leaving it as a context manager, brings plain behaviour back.

    Raises:
        ValueError: hooks are attached already, those of another optimizer included, a parameter is not the model's, or
            something needs all gradients at once: ``max_grad_norm``, ``capturable``, DistributedDataParallel, FSDP,
            DTensor. ``GradScaler.step`` raises it later. With ``gradients="none"`` or ``"auto"`` also for tied low-rank
            weights, ``proj="svd"``, ``nn.DataParallel``, and if no weight would gain.
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
    _check_model(model, optimizer)
    _check_groups(optimizer, gradients)
    _check_others(optimizer)
    handle = Layerwise(optimizer, gradients, limiter_norm, {} if gradients == "freed" else layers_of(model))
    if gradients != "freed":
        _check_layers(model, optimizer, handle)
    handle.end_step()
    optimizer._layerwise = handle
    _attached.add(handle)
    return handle


class Layerwise:
    """The hooks of one optimizer, made by ``attach_layerwise``."""

    def __init__(
        self, optimizer: APOLLOAdamW, gradients: str, limiter_norm: str, layers: dict[Tensor, nn.Linear]
    ) -> None:
        self._optimizer = optimizer
        self.gradients, self._limiter_norm = gradients, limiter_norm
        self._layers = layers  # that can do without their weight's gradient
        self._hooks: dict[Tensor, RemovableHandle] = {}
        self._params: dict[Tensor, Param] = {}  # so that no hook looks through all parameters
        self._engines: dict[Tensor, Engine] = {}
        self._updated: set[Tensor] = set()  # since the last step()
        self._accumulating = False
        self._lock = threading.Lock()  # autograd has a thread a device, and the caches are shared

    @contextmanager
    def accumulate(self) -> Iterator[None]:
        """Gradients add up in ``.grad`` as usual; the next backward outside updates with their sum.

        Raises RuntimeError unless ``gradients="freed"``.
        """
        if self.gradients != "freed":
            raise RuntimeError(
                f'gradients="{self.gradients}" has no gradients that could accumulate; use larger batches, with '
                'activation checkpointing if need be, or attach_layerwise(..., gradients="freed")'
            )
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
        for layer in self._layers.values():
            if self._has(layer):
                del layer.__dict__["forward"]
        for engine in self._engines.values():
            self._optimizer._engine.take_over(engine)
        self._engines.clear()
        self._optimizer._layerwise = None

    def __enter__(self) -> Layerwise:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    def check_settings(self) -> None:
        """Raise ValueError if a group has what needs all gradients at once."""
        _check_groups(self._optimizer, self.gradients)

    def refuse_grad_scaler(self) -> None:
        """Raise ValueError: the hooks have moved the weights by gradients that are still multiplied by the scale."""
        raise ValueError(
            "torch.amp.GradScaler scales all gradients, and layer-wise updates have used them by the time it could "
            "unscale them; train in bfloat16, or with GradScaler(enabled=False), or call remove() on the handle"
        )

    def skipped(self) -> list[Tensor]:
        """How many updates the hooks have skipped: int64 scalars to be added up."""
        return [count for engine in self._engines.values() for count in engine.skipped()]

    def forget(self) -> None:
        """Drop what the engines keep between steps, the skips that they have counted included."""
        self._engines.clear()

    def end_step(self) -> None:
        """Start over with all of the optimizer's parameters as they are now: a hook for each that wants a gradient."""
        self._updated.clear()
        params = {param.tensor: param for param in params_of(self._optimizer.param_groups)}
        new = [param for param in params.values() if param.tensor.requires_grad and param.tensor not in self._hooks]
        for param in new:
            _check_parameter(param)
        this = weakref.ref(self)  # a hook lives in C++, where the garbage collector would not see a cycle

        def update(parameter: Tensor) -> None:
            if (handle := this()) is not None:
                handle._update_from_gradient(parameter)

        for param in new:
            self._hooks[param.tensor] = param.tensor.register_post_accumulate_grad_hook(update)
        self._params = params
        for parameter, layer in self._layers.items():
            if self._is_low_rank(parameter) and not self._has(layer):
                layer.__dict__["forward"] = LinearForward(layer, self)

    @property
    def updates(self) -> Collection[Tensor]:
        """The parameters that hooks update; none once it is removed."""
        return self._hooks.keys() if self._optimizer._layerwise is self else ()

    @property
    def without_gradient(self) -> list[str]:
        """The parameters that are updated without a gradient."""
        return [str(param) for parameter, param in self._params.items() if self.takes(parameter)]

    def takes(self, weight: Tensor) -> bool:
        """Whether ``weight`` is updated from its operands: for ``LinearForward``."""
        return self._optimizer._layerwise is self and weight in self._layers and self._is_low_rank(weight)

    def pays(self, weight: Tensor, tokens: int) -> bool:
        """Whether it is also to be for a batch of so many tokens: for ``LinearForward``."""
        rows, columns = weight.shape
        return self.gradients != "auto" or pays(tokens, rows, columns, self._limiter_norm)

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
        if weight.grad is not None:
            raise RuntimeError(
                f"{param} has a gradient of an earlier backward, which this one would be added to, and with "
                f'gradients="{self.gradients}" there is none to add; call optimizer.zero_grad() before backward()'
            )
        if weight in self._updated:
            raise RuntimeError(_twice(param, self.gradients))
        if not ran_once:
            raise RuntimeError(
                f"{param}: its layer ran forward more than once, and each backward would move it by a part of its "
                'gradient; use attach_layerwise(..., gradients="freed"). A forward without training, whose output is '
                "still there, belongs into torch.no_grad()"
            )
        _check_group(self._optimizer.param_groups[param.group], param.group, self.gradients)

    def update(self, weight: Tensor, gradient: ImplicitGradient) -> None:
        """One step of ``weight`` without its gradient: for ``LinearForward``."""
        with self._lock:
            self._step(self._params[weight], {weight: gradient._replace(limiter_norm=self._limiter_norm)})

    def _update_from_gradient(self, parameter: Tensor) -> None:
        """The hook: one step of ``parameter``, whose gradient is complete, and then has none."""
        if self._accumulating or parameter not in self._params or parameter.grad is None:
            return
        param = self._params[parameter]
        with self._lock:
            if parameter in self._updated:
                raise RuntimeError(_twice(param, self.gradients))
            _check_group(self._optimizer.param_groups[param.group], param.group, self.gradients)
            self._step(param, {})
            parameter.grad = None

    @torch.no_grad()
    def _step(self, param: Param, given: dict[Tensor, ImplicitGradient]) -> None:
        """One step of a parameter by an engine of its own."""
        optimizer, parameter = self._optimizer, param.tensor
        engine = self._engines.get(parameter)
        if engine is None:
            engine = self._engines[parameter] = Engine(optimizer._caches, param.group, param.index)
        group = {**optimizer.param_groups[param.group], "params": [parameter], "param_names": [param.name]}
        with _naming(param):
            engine.run([group], optimizer.state, given=given)
        # Kernels write unseen by autograd, which must know of it should a backward yet to come need the old value.
        torch.autograd.graph.increment_version(parameter)
        self._updated.add(parameter)


def _check_model(model: nn.Module, optimizer: APOLLOAdamW) -> None:
    """Raise ValueError unless hooks on the model see whole, final gradients of all of the optimizer's parameters."""
    if any(isinstance(module, nn.parallel.DistributedDataParallel) for module in model.modules()):
        raise ValueError(
            "layer-wise updates would use gradients before DistributedDataParallel has averaged them, and the ranks "
            "would drift apart; use plain optimizer.step() with it"
        )
    in_model = set(model.parameters())
    foreign = [str(param) for param in params_of(optimizer.param_groups) if param.tensor not in in_model]
    if foreign:
        raise ValueError(
            f"not in the model: {', '.join(foreign)}; give attach_layerwise the whole model that the optimizer trains"
        )


def _check_others(optimizer: APOLLOAdamW) -> None:
    """Raise ValueError if hooks of another optimizer update one of this one's parameters: they would come first."""
    params = [*params_of(optimizer.param_groups)]

    def updated_by_others() -> list[Param]:
        hooks = [handle.updates for handle in _attached]
        return [param for param in params if any(param.tensor in updates for updates in hooks)]

    if updated_by_others():
        gc.collect()  # an optimizer and its handle hold each other, and outlive their last name
        for param in updated_by_others():
            raise ValueError(
                f"{param} has layer-wise updates of another optimizer, whose hooks would move it first; call remove() "
                "on the handle that attach_layerwise returned for it"
            )


def _check_layers(model: nn.Module, optimizer: APOLLOAdamW, handle: Layerwise) -> None:
    """Raise ValueError for a low-rank weight that several modules hold, or if no layer could do without a gradient."""
    if any(isinstance(module, nn.DataParallel) for module in model.modules()):
        raise ValueError(
            f'gradients="{handle.gradients}" would update the weights from each part of a batch that nn.DataParallel '
            'cuts; use one device, or gradients="freed"'
        )
    groups = optimizer.param_groups
    low_rank = [param for param in params_of(groups) if groups[param.group].get("rank")]
    for param in low_rank:
        names = owners_of(model, param.tensor)
        if len(names) > 1:
            raise ValueError(
                f"{param} is tied: {' and '.join(names)} are one weight, whose gradient comes in parts, and "
                f'gradients="{handle.gradients}" would move it by each; untie them, put it into a group without '
                "'rank', or use gradients=\"freed\""
            )
    if not any(param.tensor in handle._layers for param in low_rank):
        raise ValueError(
            f"gradients=\"{handle.gradients}\": no weight of a group with a 'rank' is that of a plain nn.Linear or "
            'Int8Linear, so nothing would be gained; use gradients="freed"'
        )


def _check_parameter(param: Param) -> None:
    """Raise ValueError for a shard, whose gradient is not whole in its hook."""
    parameter = param.tensor
    if is_dtensor(parameter):
        raise ValueError(
            f"{param} is a DTensor (FSDP2 or tensor parallel): FSDP2 frees whole gradients already and only shards "
            "remain, so layer-wise updates would gain nothing; use plain optimizer.step()"
        )
    if is_flattened(parameter):
        raise ValueError(
            f"{param} is flattened by FullyShardedDataParallel, which reduces gradients after the hooks; "
            "use plain optimizer.step()"
        )


def _check_groups(optimizer: APOLLOAdamW, gradients: str) -> None:
    for index, group in enumerate(optimizer.param_groups):
        _check_group(group, index, gradients)


def _check_group(group: dict[str, Any], index: int, gradients: str) -> None:
    if gradients != "freed" and group.get("rank") is not None and group["proj"] == "svd":
        raise ValueError(
            f"parameter group {index}: proj='svd' takes singular vectors of a gradient, which "
            f'gradients="{gradients}" does not make; use proj="random", or gradients="freed"'
        )
    if group["max_grad_norm"] is not None:
        raise ValueError(
            f"parameter group {index}: max_grad_norm={group['max_grad_norm']!r} needs the norm of all gradients, of "
            "which layer-wise updates keep one at a time; use max_grad_norm=None (the norm-growth limiter stays), "
            "or plain optimizer.step()"
        )
    if group["capturable"]:
        raise ValueError(
            f"parameter group {index}: capturable=True captures a whole step, and layer-wise updates run inside "
            "backward; use capturable=False, or plain optimizer.step()"
        )


@contextmanager
def _naming(param: Param) -> Iterator[None]:
    """Errors begin with the parameter, unless they name it already."""
    try:
        yield
    except (ValueError, RuntimeError) as error:
        if str(param) in str(error):
            raise
        raise type(error)(f"{param}: {error}") from error


def _twice(param: Param, gradients: str) -> str:
    if gradients != "freed":
        return (
            f"{param}: backward comes by it a second time since the last optimizer.step(), and the first has moved it "
            f'already. Gradients do not accumulate with gradients="{gradients}": call optimizer.step() after each '
            'backward(), or use attach_layerwise(..., gradients="freed"), also for a layer that is used twice'
        )
    return (
        f"{param}: its gradient comes a second time since the last optimizer.step(), and the first part has moved it "
        "already. If it is shared between parts that torch.utils.checkpoint runs, use use_reentrant=False; if "
        "gradients accumulate over several backward(), run all but the last inside `with handle.accumulate():`; "
        "else call optimizer.step() after each backward()"
    )
