"""The table of docs/distributed.md: every saving of memory on every sharding, and a tiny LLaMA that is trained so.

Beside the sharded model each rank keeps a whole one with the same savings, as a single process would train it. That
one computes the loss and the gradient of all ranks' batches, which those of the ranks have to be. Then both make a step
from the *same* gradient, the gathered one of the sharded model. So what a comparison of the weights shows is the
optimizer's alone, and not what a sum in another order does to a moment near 0 or to a value halfway between two codes.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_cases import drawn, tensor_parallel, whole
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel

from apollo_triton import APOLLOAdamW, attach_layerwise, quantize_model

transformers = pytest.importorskip("transformers")

# On one to four ranks each shard has whole rows, whole groups of int8 weights and whole blocks of 256 moments, along
# rows and along columns: every saving applies everywhere.
VOCABULARY, WIDTH, GROUP_SIZE, RANK = 96, 96, 8, 32
ONE_PROCESS = "one process"  # the table's first column


@dataclass(frozen=True)
class Saving:
    """``gradients``: "kept", or those of ``attach_layerwise``. ``embeddings``: that of ``APOLLOAdamW``."""

    gradients: str = "kept"
    int8: bool = False
    state_bits: int = 32
    embeddings: str | None = None


ROWS = {
    "plain": Saving(),
    "layer-wise": Saving("freed"),
    "no gradients": Saving("none"),
    "int8 weights": Saving(int8=True),
    "8-bit moments": Saving(state_bits=8),
    "all of them": Saving("freed", int8=True, state_bits=8),
    "all, no gradients": Saving("none", int8=True, state_bits=8),
}


@dataclass
class Sharding:
    """How a column of the table shards the model. ``data``: the mesh that batches are split over, if any."""

    apply: Callable[[nn.Module], nn.Module]
    data: DeviceMesh | None

    @property
    def readers(self) -> int:
        """How many ranks, or groups of ranks, have batches of their own."""
        return 1 if self.data is None else self.data.size()

    @property
    def reader(self) -> int:
        if self.data is None:
            return 0
        place = self.data.get_coordinate()
        assert place is not None
        return functools.reduce(lambda index, axis: index * self.data.size(axis) + place[axis], range(len(place)), 0)


def fully_sharded(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    return fully_shard(model, mesh=mesh)


def sharding(column: str) -> Sharding:
    """What a column of the table means on the ranks that there are."""
    world = dist.get_world_size()
    if column == ONE_PROCESS:
        return Sharding(lambda model: model, None)
    mesh = functools.partial(init_device_mesh, "cpu")
    if column == "DDP":
        return Sharding(lambda model: DistributedDataParallel(model), mesh((world,)))
    if column == "FSDP2":
        shards = mesh((world,))
        return Sharding(lambda model: fully_sharded(model, shards), shards)
    if column == "HSDP":
        both = mesh((2, world // 2), mesh_dim_names=("replica", "shard"))
        return Sharding(lambda model: fully_sharded(model, both), both)
    if column == "TP":
        ranks = mesh((world,))
        return Sharding(lambda model: tensor_parallel(model, ranks), None)
    assert column == "FSDP2 x TP", column
    both = mesh((world // 2, 2), mesh_dim_names=("data", "tensor"))
    return Sharding(lambda model: fully_sharded(tensor_parallel(model, both["tensor"]), both["data"]), both["data"])


def tiny_llama(saving: Saving) -> nn.Module:
    """The same weights in every process. Int8 weights are rounded to the nearest, so that they can be compared."""
    config = transformers.LlamaConfig(
        hidden_size=WIDTH,
        intermediate_size=2 * WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=4,
        vocab_size=VOCABULARY,
        max_position_embeddings=32,
        attn_implementation="eager",
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(drawn(tuple(parameter.shape), name) * (0.1 if parameter.dim() > 1 else 0.3))
    if saving.int8:
        quantize_model(model, group_size=GROUP_SIZE, stochastic_rounding=False)
    return model


def make_optimizer(model: nn.Module, saving: Saving) -> APOLLOAdamW:
    """Steps across a refresh of the projection, which move int8 weights by several of their codes."""
    options = {"update_proj_gap": 3, "weight_decay": 0.05, "state_bits": saving.state_bits, "min_8bit_size": 256}
    return APOLLOAdamW.apollo(model, rank=RANK, lr=1e-2, embeddings=saving.embeddings, **options)


def batch_of(step: int, reader: int = 0, readers: int = 1) -> Tensor:
    """A share of the step's 12 sequences, which do not depend on the number of ranks."""
    whole_batch = torch.randint(VOCABULARY, (12, 8), generator=torch.Generator().manual_seed(step))
    return whole_batch[reader::readers]


def loss_of(model: nn.Module, batch: Tensor) -> Tensor:
    return model(input_ids=batch, labels=batch).loss


class Cell:
    """A cell of the table on this rank: the sharded model that it trains, and its optimizer with its savings."""

    def __init__(self, column: str, saving: Saving) -> None:
        self.saving, self.sharding = saving, sharding(column)
        self.bare = tiny_llama(saving)
        self.model = self.sharding.apply(self.bare)
        self.optimizer = make_optimizer(self.bare, saving)
        self.gradients: dict[str, Tensor] = {}
        for name, parameter in self.bare.named_parameters():
            # Before layer-wise updates, whose hooks free the gradient.
            parameter.register_post_accumulate_grad_hook(functools.partial(self._record, name))
        self.handle = None
        if saving.gradients != "kept":
            self.handle = attach_layerwise(self.model, self.optimizer, gradients=saving.gradients)

    def _record(self, name: str, parameter: Tensor) -> None:
        if parameter.grad is not None:  # else the weight was updated without one
            self.gradients[name] = parameter.grad.detach().clone()

    def backward(self, step: int) -> Tensor:
        """The mean loss over all ranks. With layer-wise updates the weights have moved."""
        self.gradients.clear()
        loss = loss_of(self.model, batch_of(step, self.sharding.reader, self.sharding.readers))
        loss.backward()
        return mean_over_readers(loss.detach(), self.sharding)

    def end_step(self) -> None:
        """The gradients that the step used are gone afterwards, layer-wise or not."""
        if isinstance(self.model, DistributedDataParallel):  # the hooks ran before the sum over the ranks
            self.gradients = {name: each.grad.clone() for name, each in self.bare.named_parameters()}
        self.optimizer.step()
        self.optimizer.zero_grad()

    def train(self, steps: range) -> Cell:
        for step in steps:
            self.backward(step)
            self.end_step()
        return self

    def held(self) -> dict[str, Any]:
        return held(self.bare, self.optimizer)


def mean_over_readers(loss: Tensor, sharded: Sharding) -> Tensor:
    if sharded.data is None:
        return loss
    total = loss / sharded.readers
    for axis in range(sharded.data.ndim):
        dist.all_reduce(total, group=sharded.data.get_group(axis))
    return total


def held(model: nn.Module, optimizer: APOLLOAdamW) -> dict[str, Any]:
    """Weights as the model saves them and state, gathered, as {"name.exp_avg": tensor}."""
    found = {name: whole(value) for name, value in model.state_dict().items()}
    for name, parameter in model.named_parameters():
        found |= {f"{name}.{key}": whole(value) for key, value in optimizer.state[parameter].items()}
    return found


def beside_one_process(column: str, saving: Saving, steps: int) -> dict[str, Any]:
    """Trains the cell and a single process beside it, and returns what both hold at the end."""
    cell = Cell(column, saving)
    alone = tiny_llama(saving)
    optimizer = make_optimizer(alone, saving)
    without = saving.gradients == "none"
    if without:  # there is no gradient that both could get
        attach_layerwise(alone, optimizer, gradients="none")
    parameters = dict(alone.named_parameters())
    start, losses, apart, kept = held(alone, optimizer), [], [], 0
    for step in range(steps):
        loss = cell.backward(step)
        expected = loss_of(alone, batch_of(step))
        expected.backward()
        losses.append((loss.item(), expected.item()))
        kept = max(kept, sum(each.grad is not None for each in cell.bare.parameters()))
        cell.end_step()
        if not without:
            assert cell.gradients.keys() == parameters.keys()
            for name, gradient in cell.gradients.items():
                found = whole(gradient)
                apart.append((float((found - parameters[name].grad).norm() / parameters[name].grad.norm()), name))
                parameters[name].grad = found
        optimizer.step()
        optimizer.zero_grad()
    return {
        "ours": cell.held(),
        "theirs": held(alone, optimizer),
        "start": start,
        "losses": losses,
        "gradients": max(apart, default=(0.0, "")),
        "kept": kept,
        "sharded": is_sharded(cell.bare),
    }


def is_sharded(model: nn.Module) -> bool:
    """Whether no matrix of the blocks is whole on this rank."""
    names = [name for name, each in model.named_parameters() if each.dim() == 2]
    cut = [name for name, each in model.named_parameters() if isinstance(each, DTensor) and _is_cut(each)]
    return isinstance(model, FSDPModule) or (bool(names) and {*names} <= {*cut})


def _is_cut(parameter: DTensor) -> bool:
    return any(placement.is_shard() for placement in parameter.placements)


def save(cell: Cell, folder: str, writer: type[dcp.FileSystemWriter] = dcp.FileSystemWriter) -> None:
    weights, state = get_state_dict(cell.bare, cell.optimizer)
    dcp.save({"model": weights, "optimizer": state}, storage_writer=writer(folder))


def load(cell: Cell, folder: str) -> None:
    weights, state = get_state_dict(cell.bare, cell.optimizer)
    saved = {"model": weights, "optimizer": state}
    dcp.load(saved, checkpoint_id=folder)
    set_state_dict(cell.bare, cell.optimizer, model_state_dict=saved["model"], optim_state_dict=saved["optimizer"])
