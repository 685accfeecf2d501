"""Linear layers with int8 weights, and the conversion of a model to them and back."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from ..core.coverage import NARROWEST
from ..core.dtensors import is_dtensor, placed_as
from ..core.messages import warn
from ..core.spelling import explaining_unknown_options
from ..core.targets import DEFAULT_TARGETS, Targets
from ..core.tensor_parallel import local_linear
from .convertible import check_convertible, check_targets
from .coverage import float_note, idle_notes, no_match, targeted
from .replaced import REPLACED_BY, mark_replaced
from .saved import PARTS, assembled, checked, entries, part_here
from .weight import Int8Weight, int8_weight_of


class Int8Linear(nn.Linear):
    """``nn.Linear`` with an ``Int8Weight``; made by ``quantize_model``.

    Its ``state_dict`` holds plain tensors, which safetensors and ``torch.load(weights_only=True)`` accept: ``weight_q``
    (uint8), ``weight_scale`` (float32) and ``weight_zero`` (uint8). It loads these three, also from several files, or a
    float ``weight``, which it rounds to the nearest. It also loads what was saved when the codes were called
    ``weight``.
    """

    weight: nn.Parameter
    # Of a weight that lies in several files of a checkpoint: what has been read before the rest comes. Never changed in
    # place.
    _read: Mapping[str, Tensor] = MappingProxyType({})

    def __init__(self, linear: nn.Linear, weight: nn.Parameter) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = weight, linear.bias
        _take_over(linear, self)

    def forward(self, input: Tensor) -> Tensor:
        weight = self.weight
        if is_dtensor(weight):  # whose operations know no int8 weight
            return local_linear(input, weight, self.bias, nn.functional.linear)
        return nn.functional.linear(input, weight, self.bias)

    def __getattr__(self, name: str) -> Any:
        """Keys of the ``state_dict`` are attributes too, since torch.distributed.checkpoint looks them up as such."""
        if name in PARTS and int8_weight_of(self.weight) is not None:
            return entries(self.weight)[name]
        return super().__getattr__(name)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if int8_weight_of(self.weight) is not None:  # else someone has put a float weight in its place
            del destination[f"{prefix}weight"]
            destination.update({f"{prefix}{key}": part for key, part in entries(self.weight).items()})

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        arguments = local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        if int8_weight_of(self.weight) is None:
            super()._load_from_state_dict(state_dict, prefix, *arguments)
            return
        name, faults = f"{prefix}weight", len(error_msgs)
        keys = [key for key in ("weight", *PARTS) if f"{prefix}{key}" in state_dict]
        found = {key: state_dict.pop(f"{prefix}{key}") for key in keys}
        found = checked(found, prefix, error_msgs, is_dtensor(self.weight))
        value = self._gathered(found, prefix, bool(local_metadata.get("assign_to_params_buffers")), error_msgs)
        if value is not None:
            state_dict[name] = value
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        if name in missing_keys:
            missing_keys.remove(name)
            if len(error_msgs) == faults:
                missing_keys.extend(f"{prefix}{key}" for key in PARTS if key not in found)

    def _gathered(self, found: dict[str, Tensor], prefix: str, assign: bool, errors: list[str]) -> Tensor | None:
        """What the weight is to become; None if the checkpoint's file, and those before it, do not have all of it."""
        weight = int8_weight_of(self.weight)
        assert weight is not None
        if "weight" in found or not found:
            self._read = {} if found else self._read
            value = found.get("weight")
            if value is None or value.shape != self.weight.shape:
                return value
            if is_dtensor(self.weight):
                value = part_here(value, self.weight)
            if assign and not isinstance(value, Int8Weight):
                value = Int8Weight.of(value, weight.group_size, weight.stochastic_rounding)
            return placed_as(self.weight, value)
        again = self._read.keys() & found.keys()  # another checkpoint has begun
        self._read = found if again else {**self._read, **found}
        if self._read.keys() != PARTS.keys():
            return None
        value = assembled(self._read, prefix, self.weight, errors)
        self._read = {}
        if value is not None and value.group_size != weight.group_size and not assign:
            warn(
                f"the checkpoint's int8 weights have groups of {value.group_size} and the model's {weight.group_size}, "
                f"so they are rounded once more; quantize_model(group_size={value.group_size}) loads them as they are"
            )
        return None if value is None else placed_as(self.weight, value)

    def extra_repr(self) -> str:
        weight = int8_weight_of(self.weight)
        return super().extra_repr() + ("" if weight is None else f", int8, group_size={weight.group_size}")


@explaining_unknown_options
def quantize_model(
    model: nn.Module,
    target_modules: str | Iterable[str] = DEFAULT_TARGETS,
    group_size: int = 128,
    stochastic_rounding: bool = True,
) -> nn.Module:
    """Replace linear layers of ``model`` by ``Int8Linear`` in place, one at a time, and return the model.

    The weights are those of Q-APOLLO (arXiv 2412.05270).

    Args:
        model: any module. Quantise it before you make the optimizer, which needs the int8 parameters.
        target_modules: as in ``apollo_param_groups``. Layers that it does not name, and modules other than
            ``nn.Linear``, such as experts in one tensor, stay as they are.
        group_size: how many consecutive weights share a scale and a zero point. It must divide the number of elements
            of every weight.
        stochastic_rounding: whether the optimizer rounds updates stochastically. Rounding to the nearest would lose
            small updates.

    "auto" and "all-linear" leave out layers narrower than 8, which ``apollo_param_groups`` leaves dense,
    except where there are no others.
    A model on the meta device becomes an int8 model there. ``to_empty`` and ``load_state_dict`` then fill it. Layers
    that share a weight share the int8 weight. Frozen weights stay frozen. A second call converts what it names and is
    not int8 yet.

    Raises ValueError, before anything changes: if nothing is left that matches; if the group size does not divide a
    weight; if a layer has more than a weight and a bias of its own, a weight that something computes, holds or updates
    (pruning, weight norm, a hook, FSDP, accelerate), or values that are not finite; and if a weight is shared with
    something that is not converted. Warns if "auto", "all-linear", or modules that ``target_modules`` names, leave
    over a tenth of the matrices in floats, such as fused experts. Warns of an entry of a list that makes nothing int8.

    >>> model = quantize_model(nn.ModuleDict({"mlp": nn.Linear(256, 64)}))
    >>> model["mlp"].weight
    Int8Weight(shape=(64, 256), dtype=torch.float32, device=cpu, group_size=128)
    """
    if not isinstance(model, nn.Module):
        raise TypeError(f"quantize_model needs the model itself, an nn.Module, not {type(model).__name__}")
    targets = Targets(model, target_modules)
    modules = targeted(model, targets)
    check_targets(modules)
    matching = {id(module) for module in modules.values()}
    named = model.named_modules(remove_duplicate=False)  # a layer under each of its names
    chosen = {name: module for name, module in named if type(module) is nn.Linear and id(module) in matching}
    if not targets.is_choice:  # what apollo_param_groups leaves dense at every rank, such as a gate of one output
        chosen = {name: module for name, module in chosen.items() if not _is_narrow(module.weight)} or chosen
    if not chosen:
        raise ValueError(no_match(model, targets))
    check_convertible(model, chosen, group_size)
    weights: dict[int, nn.Parameter] = {}
    layers: dict[int, Int8Linear] = {}
    for name in list(chosen):
        module = chosen.pop(name)
        if id(module) not in layers:
            key = id(module.weight)
            if key not in weights:
                with torch.inference_mode(False):  # whose tensors no optimizer could update
                    weight = Int8Weight.of(module.weight, group_size, stochastic_rounding)
                    weight.name = f"{name}.weight"
                    weights[key] = _in_place_of(module.weight, weight, "quantize_model")
            layers[id(module)] = Int8Linear(module, weights[key])
        _replace(model, name, layers[id(module)])
    for note in filter(None, [*idle_notes(model, targets), float_note(model, targets)]):
        warn(note)
    return model


def dequantize_model(model: nn.Module) -> nn.Module:
    """Replace every ``Int8Linear`` of ``model`` by ``nn.Linear`` in place, one at a time, and return the model.

    The float weights have the dtype of activations, ``Int8Weight.dtype``.

    >>> model = quantize_model(nn.ModuleDict({"mlp": nn.Linear(256, 64)}))
    >>> dequantize_model(model)["mlp"]
    Linear(in_features=256, out_features=64, bias=True)
    """
    named = model.named_modules(remove_duplicate=False)
    names = [name for name, module in named if isinstance(module, Int8Linear)]
    if "" in names:
        raise ValueError(
            "the model is itself an Int8Linear, which cannot be replaced in place; use model.weight.dequantize()"
        )
    for name in names:
        if is_dtensor(model.get_parameter(f"{name}.weight")):
            raise ValueError(
                f"{name} is sharded, and what shards it would keep its int8 weight; save the model with "
                "torch.distributed.checkpoint, and load it into an int8 model that is not sharded to turn into floats"
            )
    weights: dict[int, nn.Parameter] = {}
    layers: dict[int, nn.Linear] = {}
    for name in names:
        module = model.get_submodule(name)
        assert isinstance(module, Int8Linear)
        if id(module) not in layers:
            old = module.weight
            if isinstance(old, Int8Weight) and id(old) not in weights:
                with torch.inference_mode(False):
                    weights[id(old)] = _in_place_of(old, old.dequantize(), "dequantize_model")
            linear = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
            linear.weight, linear.bias = weights.get(id(old), old), module.bias
            _take_over(module, linear)
            layers[id(module)] = linear
        _replace(model, name, layers[id(module)])
    return model


def _is_narrow(weight: Tensor) -> bool:
    return weight.dim() == 2 and 0 < min(weight.shape) < NARROWEST  # not what ZeRO has emptied or FSDP flattened


def _in_place_of(old: Tensor, value: Tensor, conversion: str) -> nn.Parameter:
    """A parameter of ``value`` with the gradient of ``old`` and what its user has set on it."""
    new = nn.Parameter(value, requires_grad=old.requires_grad)
    new.grad, old.grad = old.grad, None  # one tensor of both would grow, and an old optimizer would step by it
    ours = {*Int8Weight.__annotations__, "_is_param", REPLACED_BY}
    vars(new).update({name: each for name, each in vars(old).items() if name not in ours})
    mark_replaced(old, conversion)
    return new


def _take_over(old: nn.Linear, new: nn.Linear) -> None:
    """Give ``new`` the mode, hooks and further attributes of the layer that it replaces. The hooks' handles can still
    remove them. Not among them: a forward of the old layer itself."""
    new.training = old.training
    for name, value in vars(old).items():
        if ("_hook" in name or name not in vars(new)) and name not in _OF_ONE_LAYER:
            vars(new)[name] = value


# Bound to the layer that had it: replaced forwards of this package, accelerate and ``Module.compile``, and ``_read``.
_OF_ONE_LAYER = {"forward", "_old_forward", "_hf_hook", "_compiled_call_impl", "_read"}


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    owner = model.get_submodule(parent)
    setattr(owner, last, new)
