"""What keeps linear layers from being converted to int8. All of it is found before anything changes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.parallel import DistributedDataParallel

from ..core.dtensors import is_dtensor
from .weight import check_group_size, is_finite

# What leaves its own entry in a layer whose weight it computes, and how to end that.
_COMPUTED_BY = {
    "_mask": "torch.nn.utils.prune; torch.nn.utils.prune.remove(module, {name!r}) makes it permanent",
    "_g": "torch.nn.utils.weight_norm; torch.nn.utils.remove_weight_norm(module) makes it a parameter again",
    "_u": "torch.nn.utils.spectral_norm; torch.nn.utils.remove_spectral_norm(module) makes it a parameter again",
}


def check_targets(modules: Mapping[str, nn.Module]) -> None:
    """Raise ValueError if a targeted module will be an ``nn.Linear`` only later, and would then stay float."""
    for name, module in modules.items():
        if isinstance(module, nn.LazyLinear):
            raise ValueError(f"{name} is a LazyLinear without weights; run a batch through the model first")


def check_convertible(model: nn.Module, layers: Mapping[str, nn.Linear], group_size: int) -> None:
    """Raise ValueError, with the layer's name and what to do, unless all ``layers`` of ``model`` can become int8."""
    for name, module in model.named_modules():
        if isinstance(module, DistributedDataParallel):
            raise ValueError(
                f"{name or 'the model'} is a DistributedDataParallel, which would not send the gradients of new "
                "parameters; call quantize_model before wrapping"
            )
    if "" in layers:
        raise ValueError(
            "the model is itself an nn.Linear, which cannot be replaced in place; put it into a module, such as "
            "nn.ModuleDict({'layer': linear})"
        )
    for name, layer in layers.items():
        if obstacle := _obstacle(layer):
            raise ValueError(f"{name} cannot become int8: {obstacle}, or leave the layer out of target_modules")
        check_group_size(layer.weight, group_size, f"{name}.weight")
    _check_sharing(model, {id(layer) for layer in layers.values()})
    # At last, since this reads the weights.
    for name, layer in layers.items():
        if not is_finite(layer.weight):
            raise ValueError(f"{name}.weight has NaN or infinite values, which int8 weights cannot hold")


def _obstacle(layer: nn.Linear) -> str | None:
    """Why this layer cannot be converted, with what to do about it; None if it can."""
    fields = vars(layer)
    if fields.get("_is_fsdp_managed_module"):
        return "FSDP has sharded the model; call quantize_model before fully_shard"
    if "_hf_hook" in fields:
        return (
            "accelerate runs its forward; call quantize_model before the model is dispatched, or "
            "accelerate.hooks.remove_hook_from_module(model, recurse=True)"
        )
    if "forward" in fields:
        return (
            f"its forward was replaced by a {type(fields['forward']).__name__}, which would be lost; call "
            "quantize_model before what replaces it, such as attach_layerwise"
        )
    for name in ("weight", "bias"):
        if name not in layer._parameters or layer._parameters["weight"] is None:
            for ending, how in _COMPUTED_BY.items():
                if f"{name}{ending}" in layer._parameters.keys() | layer._buffers.keys():
                    return f"its {name} is computed by " + how.format(name=name)
            return f"its {name} is no parameter of its own; make it one"
    more = [*layer._parameters.keys() - {"weight", "bias"}, *layer._buffers, *layer._modules]
    if more:
        return f"it holds {', '.join(sorted(more))} beside weight and bias, which would be lost; remove that"
    weight = layer.weight
    if is_dtensor(weight):
        return "its weight is sharded, a DTensor; call quantize_model before parallelize_module or distribute_tensor"
    if type(weight) is not nn.Parameter and not isinstance(weight, FakeTensor):
        return (
            f"its weight is a {type(weight).__name__}, and int8 weights are made of plain parameters; convert it to one"
        )
    if weight.layout != torch.strided:
        return f"its weight has layout {weight.layout}; use weight.to_dense()"
    if weight._backward_hooks or weight._post_accumulate_grad_hooks:
        return (
            "its weight has gradient hooks, which would be lost; call quantize_model before what registers them, such "
            "as attach_layerwise"
        )
    if _shares_elements(weight):
        return f"its weight has strides {weight.stride()}, so that elements share memory; use weight.clone()"
    return None


def _shares_elements(weight: Tensor) -> bool:
    if weight.dim() != 2 or weight.is_contiguous():
        return False
    (inner, count), (outer, _) = sorted(zip(weight.stride(), weight.shape, strict=True))
    return weight.numel() > 0 and (inner == 0 or outer <= inner * (count - 1))


def _check_sharing(model: nn.Module, chosen: set[int]) -> None:
    """Raise ValueError if a weight that is to be converted belongs to a module that is not, or if another tensor of the
    model shares its memory."""
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
    tensors = [*model.named_parameters(), *model.named_buffers()]
    for one, other in _overlapping((name, tensor) for name, tensor in tensors if _has_memory(tensor)):
        if {id(one[1]), id(other[1])} & converted.keys():
            raise ValueError(
                f"{one[0]} and {other[0]} share memory and are two tensors, so that they would part; tie them as one "
                "parameter (module.weight = other.weight), or give one a copy (weight.detach().clone())"
            )


def _has_memory(tensor: Tensor) -> bool:
    plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout == torch.strided
    return plain and not tensor.is_meta and tensor.numel() > 0


def _overlapping(tensors: Iterable[tuple[str, Tensor]]) -> Iterator[tuple[tuple[str, Tensor], tuple[str, Tensor]]]:
    """Pairs of tensors, of which one begins before the other ends."""
    ranges = []
    for position, (name, tensor) in enumerate(tensors):
        elements = 1 + sum(stride * (size - 1) for stride, size in zip(tensor.stride(), tensor.shape, strict=True))
        start = tensor.data_ptr()
        end = start + elements * tensor.element_size()
        ranges.append((str(tensor.device), start, end, position, (name, tensor)))
    ranges.sort(key=lambda each: each[:4])
    last = None
    for each in ranges:
        if last is not None and each[0] == last[0] and each[1] < last[2]:
            yield last[4], each[4]
        if last is None or each[0] != last[0] or each[2] > last[2]:
            last = each
