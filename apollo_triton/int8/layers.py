"""Linear layers with int8 weights, and the conversion of a model to them and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from torch import nn

from ..core.targets import Targets
from .replaced import mark_replaced
from .weight import Int8Weight, check_group_size


class Int8Linear(nn.Linear):
    """``nn.Linear`` with an ``Int8Weight``; made by ``quantize_model``.

    Its ``state_dict`` holds plain tensors, which safetensors and ``torch.load(weights_only=True)`` accept: ``weight``
    (uint8), ``weight_scale`` (float32) and ``weight_zero`` (uint8). It loads these three, or a float ``weight``, which
    it rounds to the nearest.
    """

    weight: nn.Parameter

    def __init__(self, linear: nn.Linear, weight: nn.Parameter) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = weight, linear.bias
        _take_over(linear, self)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        weight = self.weight
        assert isinstance(weight, Int8Weight)
        destination[f"{prefix}weight"] = weight.q
        destination[f"{prefix}weight_scale"], destination[f"{prefix}weight_zero"] = weight.scale, weight.zero

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *arguments: Any) -> None:
        name, weight = f"{prefix}weight", self.weight
        assert isinstance(weight, Int8Weight)
        if state_dict.keys() >= {name, f"{name}_scale", f"{name}_zero"}:
            q, scale, zero = state_dict[name], state_dict.pop(f"{name}_scale"), state_dict.pop(f"{name}_zero")
            whole = scale.numel() and q.numel() % scale.numel() == 0
            if not whole or zero.shape != scale.shape or not scale.is_floating_point():
                *_, errors = arguments
                errors.append(
                    f"{name} has {q.numel()} entries, and {name}_scale is {scale.dtype} of shape {tuple(scale.shape)}, "
                    f"{name}_zero of shape {tuple(zero.shape)}: every group needs one float scale and one zero"
                )
                del state_dict[name]
            else:
                group_size = q.numel() // scale.numel()
                state_dict[name] = Int8Weight(q, scale, zero, group_size, weight.dtype, weight.stochastic_rounding)
        elif name in state_dict and not state_dict[name].is_floating_point():
            *_, errors = arguments
            errors.append(f"{name} is {state_dict.pop(name).dtype}, without the {name}_scale and {name}_zero it needs")
        super()._load_from_state_dict(state_dict, prefix, *arguments)

    def extra_repr(self) -> str:
        assert isinstance(self.weight, Int8Weight)
        return f"{super().extra_repr()}, int8, group_size={self.weight.group_size}"


def quantize_model(
    model: nn.Module,
    target_modules: str | Iterable[str] = ("attn", "mlp"),
    group_size: int = 128,
    stochastic_rounding: bool = True,
) -> nn.Module:
    """Replace linear layers of ``model`` by ``Int8Linear`` in place, one at a time, and return the model.

    The weights are those of Q-APOLLO (arXiv 2412.05270).

    Args:
        model: any module. Quantise it before you make the optimizer, which needs the int8 parameters.
        target_modules: as in ``apollo_param_groups``. Layers that it does not name, and modules other than
            ``nn.Linear``, stay as they are.
        group_size: how many consecutive weights share a scale and a zero point. It must divide the number of elements
            of every weight.
        stochastic_rounding: whether the optimizer rounds updates stochastically. Rounding to the nearest would lose
            small updates.

    A model on the meta device becomes an int8 model there. ``to_empty`` and ``load_state_dict`` then fill it. Layers
    that share a weight share the int8 weight. Frozen weights stay frozen.

    Raises ValueError, before anything changes, if no layer matches, if the group size does not divide a weight, or if a
    weight is shared with something that is not converted.

    >>> model = quantize_model(nn.ModuleDict({"mlp": nn.Linear(256, 64)}))
    >>> model["mlp"].weight
    Int8Weight(shape=(64, 256), dtype=torch.float32, device=cpu, group_size=128)
    """
    targets = Targets(model, target_modules)
    matching = {id(module) for name, module in _linears(model) if targets.match(name, module)}
    chosen = {name: module for name, module in _linears(model) if id(module) in matching}  # under each name
    if not chosen:
        raise ValueError(f"target_modules={targets.given!r}: no nn.Linear of the model matches")
    for name, module in chosen.items():
        check_group_size(module.weight, group_size, f"{name}.weight")
    _check_sharing(model, matching)
    weights: dict[int, nn.Parameter] = {}
    layers: dict[int, Int8Linear] = {}
    for name in list(chosen):
        module = chosen.pop(name)
        if id(module) not in layers:
            key = id(module.weight)
            if key not in weights:
                weight = Int8Weight.of(module.weight, group_size, stochastic_rounding)
                weights[key] = nn.Parameter(weight, requires_grad=module.weight.requires_grad)
                mark_replaced(module.weight, "quantize_model")
            layers[id(module)] = Int8Linear(module, weights[key])
        _replace(model, name, layers[id(module)])
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
    weights: dict[int, nn.Parameter] = {}
    layers: dict[int, nn.Linear] = {}
    for name in names:
        module = model.get_submodule(name)
        assert isinstance(module, Int8Linear)
        if id(module) not in layers:
            key = id(module.weight)
            if key not in weights:
                weights[key] = nn.Parameter(module.weight.dequantize(), requires_grad=module.weight.requires_grad)
                mark_replaced(module.weight, "dequantize_model")
            linear = nn.Linear(module.in_features, module.out_features, module.bias is not None, device="meta")
            linear.weight, linear.bias = weights[key], module.bias
            _take_over(module, linear)
            layers[id(module)] = linear
        _replace(model, name, layers[id(module)])
    return model


def _linears(model: nn.Module) -> Iterator[tuple[str, nn.Linear]]:
    for name, module in model.named_modules(remove_duplicate=False):
        if type(module) is nn.Linear:
            yield name, module


def _take_over(old: nn.Linear, new: nn.Linear) -> None:
    """Give ``new`` the mode and the hooks of the layer that it replaces. The hooks' handles can still remove them."""
    new.training = old.training
    vars(new).update({name: value for name, value in vars(old).items() if "_hook" in name})


def _check_sharing(model: nn.Module, chosen: set[int]) -> None:
    """Raise ValueError if a weight that is to be converted also belongs to a module that is not."""
    converted: dict[int, str] = {}
    others: dict[int, str] = {}
    for module_name, module in model.named_modules():
        for name, parameter in module.named_parameters(recurse=False):
            full_name = f"{module_name}.{name}" if module_name else name
            (converted if id(module) in chosen and name == "weight" else others)[id(parameter)] = full_name
    for key in converted.keys() & others.keys():
        raise ValueError(
            f"{converted[key]} is shared with {others[key]}, which is not converted; leave it out of target_modules, "
            "or untie them"
        )


def _replace(model: nn.Module, name: str, new: nn.Module) -> None:
    parent, _, last = name.rpartition(".")
    owner = model.get_submodule(parent)
    setattr(owner, last, new)
