"""Linear layers with int8 weights, and the conversion of a model to them and back."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .backends import choose
from .int8 import Int8Weight, check_group_size
from .param_groups import is_target

_KERNEL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Int8Linear(nn.Linear):
    """``nn.Linear`` with an ``Int8Weight``; made by ``quantize_model``.

    Its ``state_dict`` holds plain tensors, ``weight`` (uint8), ``weight_scale`` and ``weight_zero``, which safetensors
    and ``torch.load(weights_only=True)`` take. It loads those, or a float ``weight``, which it rounds to the nearest.
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
                    f"{name}_zero of shape {tuple(zero.shape)}: one of each is needed for every group of entries"
                )
                del state_dict[name]
            else:
                own = q.numel() // scale.numel(), weight.dtype, weight.stochastic_rounding
                state_dict[name] = Int8Weight(q, scale, zero, *own)
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
    """Replace linear layers of ``model`` by ``Int8Linear`` in place, one by one, and return it: Q-APOLLO's weights.

    Args:
        model: any module. Do this before making the optimizer, whose parameters are then the int8 ones.
        target_modules: as in ``apollo_param_groups``. Layers it does not name, and all that is not ``nn.Linear``, stay.
        group_size: consecutive weights that share a scale and a zero point; must divide every weight.
        stochastic_rounding: how the optimizer rounds updates; to the nearest, small ones would be lost.

    A model on the meta device becomes an int8 one there, which ``to_empty`` and ``load_state_dict`` then fill.
    Layers that share a weight share the int8 one; frozen ones stay frozen.

    Raises ValueError, before anything changes, if nothing matches, the group size does not divide a weight, or a weight
    is shared with something that is not converted.

    >>> model = quantize_model(nn.ModuleDict({"mlp": nn.Linear(256, 64)}))
    >>> model["mlp"].weight
    Int8Weight(shape=(64, 256), dtype=torch.float32, device=cpu, group_size=128)
    """
    targets = target_modules if isinstance(target_modules, str) else list(target_modules)
    matching = {id(module) for name, module in _linears(model) if is_target(targets, name, module)}
    chosen = {name: module for name, module in _linears(model) if id(module) in matching}  # under all its names
    if not chosen:
        raise ValueError(f"target_modules={targets!r}: no nn.Linear of the model matches")
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
            layers[id(module)] = Int8Linear(module, weights[key])
        _replace(model, name, layers[id(module)])
    return model


def dequantize_model(model: nn.Module) -> nn.Module:
    """Replace every ``Int8Linear`` of ``model`` by ``nn.Linear`` in place, one by one, and return it."""
    names = [name for name, each in model.named_modules(remove_duplicate=False) if isinstance(each, Int8Linear)]
    weights: dict[int, nn.Parameter] = {}
    layers: dict[int, nn.Linear] = {}
    for name in names:
        module = model.get_submodule(name)
        assert isinstance(module, Int8Linear)
        if id(module) not in layers:
            key = id(module.weight)
            if key not in weights:
                weights[key] = nn.Parameter(module.weight.dequantize(), requires_grad=module.weight.requires_grad)
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
    """The mode and the hooks of the layer that ``new`` replaces; handles of hooks go on to remove them."""
    new.training = old.training
    vars(new).update({name: value for name, value in vars(old).items() if "_hook" in name})


def _check_sharing(model: nn.Module, chosen: set[int]) -> None:
    """Raise ValueError if a weight that is to be converted is also some other module's."""
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


def linear(x: Tensor, weight: Int8Weight, bias: Tensor | None = None) -> Tensor:
    """``torch.nn.functional.linear`` with an int8 weight: x ``[..., in]`` -> ``[..., out]`` in the dtype of x."""
    if torch.is_autocast_enabled(x.device.type):
        dtype = torch.get_autocast_dtype(x.device.type)
        x = x.to(dtype)
        bias = None if bias is None else bias.to(dtype)
    elif x.dtype != weight.dtype:
        raise RuntimeError(
            f"the input has dtype {x.dtype}, and the int8 weight stands for {weight.dtype}: model.to(...)"
        )
    return _Linear.apply(x, weight, bias)


class _Linear(torch.autograd.Function):
    """Weights are dequantised a tile at a time in the kernels, a block of rows at a time by PyTorch; their gradient is
    a float tensor like any other."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Int8Weight, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        if _has_kernels(x, weight):
            from . import int8_matmul

            return int8_matmul.forward(x, weight, bias)
        y = x.new_empty(*x.shape[:-1], weight.shape[0])
        for rows, W in _blocks(weight, x.dtype):
            y[..., rows] = x @ W.mT
        return y if bias is None else y.add_(bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        if needs_weight and torch.is_grad_enabled():
            raise NotImplementedError(
                "create_graph=True through an int8 weight that is trained: the gradient of its input depends on it, "
                "which is not followed; freeze the weight, or train a float one (dequantize_model)"
            )
        flat = gradient.reshape(-1, gradient.shape[-1])
        of_x = input_gradient(gradient, weight) if needs_x else None
        of_weight = of_bias = None
        if needs_weight:
            of_weight = flat.mT @ x.reshape(-1, x.shape[-1])
        if needs_bias:
            of_bias = flat.sum(0)
        return of_x, of_weight, of_bias


def input_gradient(gradient: Tensor, weight: Int8Weight) -> Tensor:
    """dY ``[..., out]`` -> dY W ``[..., in]`` in the dtype of dY."""
    # With create_graph not by the kernels: what they compute cannot be differentiated again.
    if _has_kernels(gradient, weight) and not torch.is_grad_enabled():
        from . import int8_matmul

        return int8_matmul.input_gradient(gradient, weight)
    total = torch.zeros(*gradient.shape[:-1], weight.shape[1], dtype=torch.float32, device=gradient.device)
    for rows, W in _blocks(weight, gradient.dtype):
        total += gradient[..., rows] @ W
    return total.to(gradient.dtype)


def _has_kernels(activations: Tensor, weight: Int8Weight) -> bool:
    kernels_take_it = activations.dtype in _KERNEL_DTYPES and activations.device == weight.device
    return kernels_take_it and choose(weight, "auto").name == "triton"


def _blocks(weight: Int8Weight, dtype: torch.dtype) -> Iterator[tuple[slice, Tensor]]:
    for rows in weight.blocks():
        yield rows, weight.floats(rows).to(dtype)
