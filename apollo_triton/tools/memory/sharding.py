"""How a Hugging Face model is sharded over cards, and the same model in fake tensors."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from ...int8.weight import Int8Weight

SHARDINGS = ("fsdp2", "hsdp", "tp")
_HEADS = ("num_attention_heads", "num_key_value_heads")


def check_cards(model: Any, gpus: int, how: str) -> None:
    """Raise ValueError unless ``model`` can be sharded over so many cards."""
    if how not in SHARDINGS:
        raise ValueError(f"shard={how!r} (allowed: {', '.join(SHARDINGS)})")
    least, step = (4, 2) if how == "hsdp" else (2, 1)
    if gpus < least or gpus % step:
        allowed = f"{least} or more" + (", an even number, for two replicas of shards" if step > 1 else "")
        raise ValueError(f"{gpus} GPUs with {how} (allowed: {allowed})")
    if how != "tp" and not hasattr(torch.cpu.Stream, "record_event"):
        raise ValueError(f"torch {torch.__version__}: its FSDP2 runs on GPUs alone, and so cannot be followed; use 2.7")
    if how == "tp":
        plan = _tensor_parallel_plan(model)
        for name in _HEADS:
            heads = getattr(model.config, name, None)
            if any("self_attn" in key for key in plan) and heads is not None and heads % gpus:
                raise ValueError(f"{name}={heads} is no multiple of {gpus} GPUs: with tp each has whole heads")


def shard(model: Any, how: str, mesh: Any) -> None:
    """Shard ``model``: by ``fully_shard`` of each unit and of what is left, or with "tp" by the model's own plan."""
    if how == "tp":
        from torch.distributed.tensor.parallel import parallelize_module

        embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
        are_tied = _are_tied(model)
        parallelize_module(model, mesh, _tensor_parallel_plan(model))
        if are_tied and getattr(head.weight, "placements", 0) == getattr(embedding.weight, "placements", 1):
            head.weight = embedding.weight  # they were cut one by one
        return
    from torch.distributed.fsdp import fully_shard

    for module in units(model):
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def units(model: Any) -> list[nn.Module]:
    """The modules that FSDP2 gathers one after the other: decoder layers, and embedding and head unless they share a
    weight. Left in the root, both would stay unsharded from forward to backward."""
    kinds = {*(model._no_split_modules or ())}  # by which Accelerate finds the layers, too
    layers = [module for module in model.modules() if type(module).__name__ in kinds]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or embedding is None or _are_tied(model):
        return layers
    return [embedding, *layers, head]


def _are_tied(model: Any) -> bool:
    """Whether embedding and head have one weight."""
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    return head is not None and embedding is not None and embedding.weight is head.weight


def _tensor_parallel_plan(model: Any) -> dict[str, Any]:
    """The plan that transformers has for the model, in PyTorch's styles.

    Raises ValueError for a model without one, and for a style that PyTorch has not.
    """
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel

    styles: dict[str, Callable[[], Any]] = {
        "colwise": ColwiseParallel,
        "rowwise": RowwiseParallel,
        "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
        "colwise_rep": lambda: ColwiseParallel(output_layouts=Replicate()),  # of older transformers
        "embedding_rowwise": lambda: RowwiseParallel(input_layouts=Replicate()),
    }
    plan = dict(getattr(model, "_tp_plan", None) or {})
    if not plan:
        raise ValueError(f"transformers has no tensor parallel plan for a {type(model).__name__}; use fsdp2")
    for name, style in plan.items():
        if style not in styles:
            raise ValueError(f"{name} is {style!r} in the tensor parallel plan of a {type(model).__name__}; use fsdp2")
    return {name: styles[style]() for name, style in plan.items()}


def fake_of(model: nn.Module) -> nn.Module:
    """The model with fake tensors on the CPU in place of those of the meta device. Call it within a fake mode.

    FSDP2 does not run on the meta device.
    """
    made: dict[nn.Parameter, nn.Parameter] = {}  # tied ones once

    def fake(tensor: Tensor) -> Tensor:
        if isinstance(tensor, Int8Weight):
            return tensor.with_parts(fake)
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if parameter not in made:
                    made[parameter] = nn.Parameter(fake(parameter), parameter.requires_grad)
                module._parameters[name] = made[parameter]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer)
    return model
