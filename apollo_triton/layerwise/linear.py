"""Linear layers that update their weight in the backward pass, once the input's gradient is made with the old one.

``LinearForward`` takes the place of a module's ``forward`` and hands X and dY to a handle. ``weight.grad`` stays None.
Of a weight that tensor parallel cuts, X and dY are those of this rank's part: their product is the part's gradient.
"""

from __future__ import annotations

import copy
import weakref
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from ..core.dtensors import is_dtensor, local, placed_as
from ..core.implicit_gradient import ImplicitGradient
from ..core.tensor_parallel import cuts_tokens, local_linear
from ..int8.layers import Int8Linear
from ..int8.linear import input_gradient
from ..int8.weight import Int8Weight


class Updater(Protocol):
    """Who updates weights from their operands. ``check`` raises before anything has changed, also if the layer has run
    forward more than once."""

    def takes(self, weight: Tensor) -> bool: ...

    def pays(self, weight: Tensor, tokens: int) -> bool: ...

    def check(self, weight: Tensor, ran_once: bool) -> None: ...

    def update(self, weight: Tensor, gradient: ImplicitGradient) -> None: ...

    def name(self, weight: Tensor) -> str: ...


def layers_of(model: nn.Module) -> dict[Tensor, nn.Linear]:
    """The layers whose forward we know, by their weight: ``nn.Linear`` and ``Int8Linear`` with their own parameter.

    Not among them: other classes' forwards, forwards that something has replaced, weights that are computed from others
    (``torch.nn.utils.parametrize``, ``weight_norm``). Their weights get gradients, and are updated by hooks.
    """
    found: dict[Tensor, nn.Linear] = {}
    for module in model.modules():
        if isinstance(module, nn.Linear) and "weight" in module._parameters and _is_plain(module):
            found[module.weight] = module
    return found


def _is_plain(module: nn.Linear) -> bool:
    known = nn.Linear.forward, Int8Linear.forward
    forward: Any = module.forward  # of the instance, if it has one: copies of layers have their class's there
    if isinstance(forward, LinearForward):
        return forward.updater is None  # left behind
    return getattr(forward, "__func__", None) in known and forward.__self__ is module


def owners_of(model: nn.Module, weight: Tensor) -> list[str]:
    """The names under which modules of the model hold ``weight``."""
    return [name for name, tensor in model.named_parameters(remove_duplicate=False) if tensor is weight]


class LinearForward:
    """The ``forward`` of one linear layer, for as long as the updater takes its weight; else the layer's own.

    An attribute of the instance, so that hooks, names and ``state_dict`` are as they were; copies and pickles of the
    module get the forward of its class.
    """

    def __init__(self, module: nn.Linear, updater: Updater | None) -> None:
        self._module = weakref.ref(module)  # which holds this, and is to go at once when nothing else holds it
        self._updater = None if updater is None else weakref.ref(updater)
        self._waiting: weakref.WeakSet[ForwardUse] = weakref.WeakSet()

    @property
    def updater(self) -> Updater | None:
        """None once it is gone, and for a copy of the layer."""
        return None if self._updater is None else self._updater()

    @torch._disable_dynamo  # a graph break: the backward has side effects. Within __call__ it would be two
    def __call__(self, input: Tensor) -> Tensor:
        return self._forward(input)

    def _forward(self, x: Tensor) -> Tensor:
        module, updater = self._module(), self.updater
        if module is None:
            raise ReferenceError(
                "this forward is that of a linear layer which is gone; keep the layer, or copy it by copy.deepcopy"
            )
        weight: Tensor = module.weight
        bias: Tensor | None = module.bias
        is_trained = torch.is_grad_enabled() and weight.requires_grad
        if updater is None or not is_trained or not updater.takes(weight):
            return type(module).forward(module, x)
        if not updater.pays(weight, x.shape[:-1].numel()):
            return type(module).forward(module, x)
        if cuts_tokens(x, weight):
            raise RuntimeError(
                f"{updater.name(weight)}: its input has placements {x.placements}, so that each rank has a part of the "  # type: ignore[attr-defined]
                'tokens, and the sum over ranks needs a gradient; use attach_layerwise(..., gradients="freed"), or '
                "give the layer all tokens on every rank"
            )
        if torch.amp.is_autocast_available(x.device.type) and torch.is_autocast_enabled(x.device.type):
            dtype = torch.get_autocast_dtype(x.device.type)
            x, bias = x.to(dtype), None if bias is None else bias.to(dtype)
        elif x.dtype != weight.dtype:
            return type(module).forward(module, x)  # which refuses it
        use = ForwardUse(self._waiting, updater, weight)
        # Whatever runs within a backward is a recomputation, whose graph may never be used.
        if torch._C._current_graph_task_id() == -1:
            self._waiting.add(use)
        if is_dtensor(weight):
            return local_linear(x, weight, bias, lambda x, _, bias: _UpdatingLinear.apply(x, weight, bias, use))
        return _UpdatingLinear.apply(x, weight, bias, use)

    def __reduce__(self) -> Any:
        return getattr, (self._module(), "forward")

    def __deepcopy__(self, memo: dict[int, Any]) -> LinearForward:
        module: Any = self._module()
        return LinearForward(copy.deepcopy(module, memo), None)  # a bound method would hold the copy


class ForwardUse:
    """One forward of a layer whose backward is to come; it lives as long as the graph does."""

    def __init__(self, waiting: weakref.WeakSet[ForwardUse], updater: Updater, weight: Tensor) -> None:
        self._waiting, self.updater, self.weight = waiting, updater, weight

    def ends(self) -> bool:
        """Wait no longer; whether no other forward of the layer does."""
        self._waiting.discard(self)
        return not self._waiting


class _UpdatingLinear(torch.autograd.Function):
    """X, the bias and the result are plain tensors. The weight is the parameter itself, also if it is a ``DTensor``, so
    that autograd can be asked whether its gradient is wanted."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, use: ForwardUse) -> Tensor:
        ctx.use = use
        here = local(weight)
        if isinstance(here, Int8Weight) or here.dtype == x.dtype:
            ctx.save_for_backward(x, weight)
            return nn.functional.linear(x, here, bias)
        rounded = here.to(x.dtype)  # by autocast; kept, as autocast's own is
        ctx.save_for_backward(x, weight, rounded)
        return nn.functional.linear(x, rounded, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None, None]:
        x, weight, *rounded = ctx.saved_tensors
        needs_x, _, needs_bias, _ = ctx.needs_input_grad
        # The parameter itself: what was saved is another tensor of its memory where a checkpoint recomputed it.
        updater, parameter = ctx.use.updater, ctx.use.weight
        accumulate, _ = ctx.next_functions[1]
        # torch.autograd.grad comes by here, and moves nothing: for other tensors the weight is not wanted, and for the
        # weight itself the question is an error.
        try:
            is_wanted = torch._C._will_engine_execute_node(accumulate)
            is_updated = is_wanted and updater.takes(parameter)  # it may have been removed since the forward
        except RuntimeError:
            is_wanted, is_updated = True, False
        if is_wanted and torch.is_grad_enabled():
            raise NotImplementedError(
                "create_graph=True through a weight that the backward pass updates, so that the old one is gone; use "
                'attach_layerwise(..., gradients="freed"), or plain optimizer.step()'
            )
        ran_once = ctx.use.ends()
        if is_updated:
            updater.check(parameter, ran_once)
        here = local(weight)
        tokens = x.shape[:-1].numel()  # in so many words: an empty part has no length that could be told from others
        X, dY = (factor.reshape(tokens, factor.shape[-1]).contiguous() for factor in (x, gradient))
        of_x = of_weight = None
        # Autocast, which does not know the meta device, would round P and the moments.
        with torch.autocast("cpu" if x.is_meta else x.device.type, enabled=False):
            if needs_x and isinstance(here, Int8Weight):
                of_x = input_gradient(dY, here).view(x.shape)
            elif needs_x:
                of_x = (dY @ (rounded[0] if rounded else here)).view(x.shape)
            of_bias = dY.sum(0) if needs_bias else None
            if is_updated:
                updater.update(parameter, ImplicitGradient(X, dY))
            elif is_wanted:
                of_weight = placed_as(weight, dY.mT @ X)
        return of_x, of_weight, of_bias, None
