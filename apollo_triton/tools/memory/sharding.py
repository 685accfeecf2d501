"""How a Hugging Face model is sharded, and what it is made of without memory."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ...int8.weight import Int8Weight


def shard(model: Any, how: str, mesh: Any) -> None:
    """Shard ``model`` as ``how`` says: FSDP2 and HSDP by ``fully_shard`` of each decoder layer, of embedding and head,
    and of what is left; tensor parallelism by the plan that the model has."""
    if how == "tp":
        parallelize(model, mesh)
        return
    from torch.distributed.fsdp import fully_shard

    for module in units(model):
        fully_shard(module, mesh=mesh)
    fully_shard(model, mesh=mesh)


def units(model: Any) -> list[nn.Module]:
    """The modules that are gathered one after the other. Embedding and head are units unless they share a weight."""
    kinds = set(model._no_split_modules or ())
    layers = [module for module in model.modules() if type(module).__name__ in kinds]
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    if head is None or embedding is None or embedding.weight is head.weight:
        return layers
    return [embedding, *layers, head]


def parallelize(model: Any, mesh: Any) -> None:
    from torch.distributed.tensor import Replicate
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    styles = {
        "colwise": lambda: ColwiseParallel(),
        "rowwise": lambda: RowwiseParallel(),
        "colwise_gather_output": lambda: ColwiseParallel(output_layouts=Replicate()),
        "colwise_rep": lambda: ColwiseParallel(output_layouts=Replicate()),  # transformers before 5
        "embedding_rowwise": lambda: RowwiseParallel(input_layouts=Replicate()),
    }
    plan = {name: styles[style]() for name, style in model._tp_plan.items()}
    parallelize_module(model, mesh, plan)


def fake_of(model: nn.Module) -> nn.Module:
    """The model with fake tensors on the CPU instead of those of the meta device. Call it within a fake mode."""
    made: dict[int, Tensor] = {}

    def fake(tensor: Tensor) -> Tensor:
        if isinstance(tensor, Int8Weight):
            parts = (fake(part) for part in (tensor.q, tensor.scale, tensor.zero))
            return Int8Weight(*parts, tensor.group_size, tensor.dtype, tensor.stochastic_rounding)
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")

    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in made:
                    made[id(parameter)] = nn.Parameter(fake(parameter), parameter.requires_grad)
                module._parameters[name] = made[id(parameter)]  # type: ignore[assignment]
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = fake(buffer)
    return model
