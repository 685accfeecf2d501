"""Weights, gradients and placements that the distributed tests share.

Every rank draws each whole tensor from its name and step. ``torch.chunk`` cuts it into shards here, not
``distribute_tensor``, so that the expected values do not depend on what is tested.
"""

from __future__ import annotations

import os
import signal
import zlib
from collections import Counter
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from distributed_harness import optimizer_class
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode

# What older versions of torch cannot do. Tried with 2.6 and 2.13.
needs_uneven_strides = pytest.mark.skipif(
    torch.__version__ < (2, 13), reason="this torch neither gathers nor saves uneven strided shards"
)
needs_fsdp_on_a_cpu = pytest.mark.skipif(
    not hasattr(torch.cpu.Stream, "record_event"), reason="this torch's FSDP2 needs a GPU"
)

PLACEMENTS = {"0": Shard(0), "1": Shard(1), "2": Shard(2), "r": Replicate(), "p": Partial()}


def drawn(shape: tuple[int, ...], *key: Any) -> torch.Tensor:
    """Normal numbers that depend on ``key`` alone."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(repr(key).encode())))


def gradient_of(name: str, shape: tuple[int, ...], step: int) -> torch.Tensor:
    """A drift and noise of the same size. The sum is about as large as a real gradient."""
    return (drawn(shape, "drift", name) + drawn(shape, "noise", name, step)) * 1e-2


def sharded(full: torch.Tensor, mesh: DeviceMesh | None, cut: str) -> torch.Tensor:
    """``full`` with one placement per mesh dimension: "0r" is Shard(0), Replicate(). "plain" is a plain tensor."""
    if mesh is None or cut == "plain":
        return full.clone()
    local = full
    for dim, letter in enumerate(cut):
        if letter.isdigit():
            chunks = local.chunk(mesh.size(dim), int(letter))
            index = mesh.get_local_rank(dim)
            local = chunks[index] if index < len(chunks) else local.narrow(int(letter), 0, 0)
    placements = [PLACEMENTS[letter] for letter in cut]
    return DTensor.from_local(
        local.clone(memory_format=torch.contiguous_format),
        mesh,
        placements,
        run_check=False,
        shape=full.shape,
        stride=full.stride(),
    )


def tensor_parallel(model: nn.Module, mesh: DeviceMesh) -> nn.Module:
    """A LLaMA: attention and MLP along rows, then along columns; embedding and head along the vocabulary."""
    plan: dict[str, Any] = {
        "model.embed_tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=Replicate()),
        "lm_head": ColwiseParallel(output_layouts=Replicate()),
    }
    for name in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "mlp.gate_proj", "mlp.up_proj"):
        plan[f"model.layers.*.{name}"] = ColwiseParallel()
    for name in ("self_attn.o_proj", "mlp.down_proj"):
        plan[f"model.layers.*.{name}"] = RowwiseParallel()
    return parallelize_module(model, mesh, plan)


def whole(tensor: Any) -> Any:
    """The gathered DTensor (a collective). Anything else as it is."""
    if isinstance(tensor, DTensor):
        return tensor.detach().full_tensor().clone()
    return tensor.detach().clone() if isinstance(tensor, torch.Tensor) else tensor


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


class Weights(nn.Module):
    """Named weights, trained with drawn gradients and without a forward pass. ``cases``: {name: (shape, group, cut)}.

    ``group`` has the weight's group keys, and is empty for a dense weight. Weights with equal keys share a group.
    """

    def __init__(self, cases: dict[str, Any], mesh: DeviceMesh | None = None, **options: Any) -> None:
        super().__init__()
        self.cases, self.mesh = cases, mesh
        for name, (shape, _, cut) in cases.items():
            self.register_parameter(name, nn.Parameter(sharded(drawn(shape, "start", name), mesh, cut)))
        groups: dict[str, Any] = {}
        for name, (_, keys, _) in cases.items():
            group = groups.setdefault(repr(sorted(keys.items())), {"params": [], **keys})
            group["params"].append((name, getattr(self, name)))
        self.optimizer = optimizer_class()(list(groups.values()), **({"lr": 1e-2} | options))
        self.steps = 0

    def set_gradients(self, spoil: Any = None) -> None:
        """Set the next step's gradients. ``spoil(name, step, gradient)`` may write into each before it is sharded."""
        for name, (shape, _, cut) in self.cases.items():
            gradient = gradient_of(name, shape, self.steps + 1).to(getattr(self, name).dtype)
            if spoil:
                spoil(name, self.steps + 1, gradient)
            getattr(self, name).grad = sharded(gradient, self.mesh, cut)

    def train_for(self, steps: int, spoil: Any = None) -> Weights:
        for _ in range(steps):
            self.set_gradients(spoil)
            self.optimizer.step()
            self.steps += 1
        return self

    def weights(self) -> dict[str, torch.Tensor]:
        return {name: whole(parameter) for name, parameter in self.named_parameters()}

    def state(self) -> dict[str, Any]:
        """All state, gathered, as {"name.exp_avg": tensor}."""
        return {
            f"{name}.{key}": whole(value)
            for name, parameter in self.named_parameters()
            for key, value in self.optimizer.state[parameter].items()
        }

    def everything(self) -> dict[str, Any]:
        return self.weights() | self.state()


class Collectives(TorchDispatchMode):
    """Counts the operations of c10d and of its functional twin by group, and the bytes that they fill on this rank.

    ``at_first`` is called before the first one.
    """

    def __init__(self, at_first: Any = None) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.filled: Counter[str] = Counter()
        self.at_first = at_first

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # DTensor calls again with plain tensors
        communicates = function.namespace in ("c10d", "_c10d_functional", "_c10d_functional_autograd")
        if communicates and "wait" not in function.__name__ and "_wrap" not in function.__name__:
            if self.at_first is not None and not self.counts:
                self.at_first()
            group = _group_of([*args, *(kwargs or {}).values()])
            self.counts[group] += 1
            self.filled[group] += args[0].nbytes if isinstance(args[0], torch.Tensor) else 0
        return function(*args, **(kwargs or {}))

    @property
    def total(self) -> int:
        return sum(self.counts.values())


def _group_of(arguments: list[Any]) -> str:
    """The name of the process group among the arguments of a collective."""
    for argument in arguments:
        if isinstance(argument, torch.ScriptObject):
            try:
                return torch.distributed.ProcessGroup.unbox(argument).group_name
            except RuntimeError:  # for example a reduction operation
                continue
    return next((argument for argument in reversed(arguments) if isinstance(argument, str)), "?")


def assert_same_bits(ours: dict[str, Any], theirs: dict[str, Any], what: str) -> None:
    assert ours.keys() == theirs.keys(), what
    for name, value in ours.items():
        other = theirs[name]
        same = torch.equal(value, other) if isinstance(value, torch.Tensor) else value == other
        assert same, f"{what}: {name} differs: {_short(value)} against {_short(other)}"


def _short(value: Any) -> str:
    return " ".join(str(value).split())[:80]


def assert_close(ours: dict[str, Any], theirs: dict[str, Any], tolerance: float, what: str) -> None:
    """Every tensor is within ``tolerance`` of its twin, in the 2-norm relative to the twin. All else is equal."""
    assert ours.keys() == theirs.keys(), what
    for name, value in ours.items():
        other = theirs[name]
        if not isinstance(value, torch.Tensor):
            assert value == other, f"{what}: {name}"
            continue
        assert value.shape == other.shape, f"{what}: {name} has shape {tuple(value.shape)}"
        error = float((value.double() - other.double()).norm() / other.double().norm().clamp(min=1e-30))
        assert error <= tolerance, f"{what}: {name} is off by {error:.1e}"


def assert_ranks_agree(results: list[dict[str, Any]]) -> None:
    for rank, result in enumerate(results[1:], 1):
        assert_same_bits(result, results[0], f"rank {rank} against rank 0")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class DyingWriter(dcp.FileSystemWriter):
    """Dies on rank 1 when its turn to write has come, the others having begun."""

    def write_data(self, plan: Any, planner: Any) -> Any:
        if dist.get_rank() == 1:
            die()
        return super().write_data(plan, planner)
