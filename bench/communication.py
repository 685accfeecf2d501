"""What a step sends and what each GPU holds, for models of 7B to 405B on 8 to 1024 GPUs: counted, not timed.

The optimizer steps on shards without memory (on the meta device) under fully_shard and tensor parallelism. The process
group sends nothing. ``python -m bench.communication`` counts, and ``--write`` puts the table into docs/distributed.md.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
from typing import Any
from unittest.mock import patch

import torch
import torch.distributed._tools.fake_collectives  # collectives on the meta device
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from apollo_triton import APOLLOAdamW
from apollo_triton.tools.llama import meta_model
from apollo_triton.tools.memory.fake_world import fake_mesh

from .marked_part import MarkedPart
from .report_tables import table
from .results_file import ROOT, Results, Row

sys.path.insert(0, str(ROOT / "tests" / "support"))
from distributed_cases import Collectives

TABLE = MarkedPart(
    ROOT / "docs" / "distributed.md",
    "<!-- communication: python -m bench.communication --write -->",
    "<!-- end of communication -->",
)
SIZES = ("7B", "70B", "405B")
# GPUs along the mesh dimension of FSDP2, and along that of tensor parallelism.
MESHES = ((8, 1), (64, 1), (1024, 1), (128, 8))
METHODS = {"APOLLO": {"rank": 256}, "APOLLO-Mini": {}}
# FSDP2's own bytes per parameter and step: weights gathered in bfloat16 for each pass, gradients reduced in float32.
FSDP_BYTES = 2 + 2 + 4


def shard(model: Any, mesh: Any) -> None:
    """Shard the model as users do: tensor parallel within layers if the mesh has it, then fully_shard."""
    if mesh["tensor"].size() > 1:
        plan = {f"self_attn.{name}_proj": ColwiseParallel() for name in "qkv"}
        plan |= {"mlp.gate_proj": ColwiseParallel(), "mlp.up_proj": ColwiseParallel()}
        plan |= {"self_attn.o_proj": RowwiseParallel(), "mlp.down_proj": RowwiseParallel()}
        for layer in model.model.layers:
            parallelize_module(layer, mesh["tensor"], plan)
        plan = {"model.embed_tokens": RowwiseParallel(input_layouts=Replicate()), "lm_head": ColwiseParallel()}
        parallelize_module(model, mesh["tensor"], plan)
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh["data"])
    fully_shard(model, mesh=mesh["data"])


def give_gradients(model: nn.Module) -> None:
    for parameter in model.parameters():
        assert isinstance(parameter, DTensor)
        gradient = torch.empty_like(parameter.to_local())
        parameter.grad = DTensor.from_local(
            gradient,
            parameter.device_mesh,
            parameter.placements,
            run_check=False,
            shape=parameter.shape,
            stride=parameter.stride(),
        )


def counted(size: str, gpus: tuple[int, int], method: str) -> Row:
    """The collectives of one step, the bytes that arrive at the first GPU, and the bytes of state that it holds."""
    with (
        fake_mesh(data=gpus[0], tensor=gpus[1]) as mesh,
        # Without values the ranks cannot compare theirs, and the meta device has no autocast.
        patch("apollo_triton.engine.agreement.Agreement.check"),
        patch("apollo_triton.engine.engine._no_autocast", lambda plan: contextlib.nullcontext()),
    ):
        model = meta_model(size, torch.float32)  # the dtype in which the optimizer sees FSDP2's weights
        shard(model, mesh)
        give_gradients(model)
        make = APOLLOAdamW.apollo if method == "APOLLO" else APOLLOAdamW.mini
        optimizer = make(model, **METHODS[method])
        with Collectives() as collectives:
            optimizer.step()
        sizes = {mesh.get_group(index).group_name: mesh.size(index) for index in range(mesh.ndim)}
        tensors = [value for state in optimizer.state.values() for value in state.values() if _is_moment(value)]
        held = sum(parameter.to_local().numel() for parameter in model.parameters())
        return {
            "collectives": max(collectives.counts.values(), default=0),
            "groups": len(collectives.counts),
            "received": sum(_from_others(filled, sizes[group]) for group, filled in collectives.filled.items()),
            "fsdp": FSDP_BYTES * held * (gpus[0] - 1),
            "state": sum(tensor.to_local().nbytes for tensor in tensors),
            "adamw_state": 8 * held,
        }


def _from_others(filled: int, ranks: int) -> int:
    """The bytes that a collective brings from other ranks: all that it fills, except the rank's own part."""
    return filled * (ranks - 1) // ranks


def _is_moment(value: Any) -> bool:
    return isinstance(value, DTensor) and value.dim() > 0


def identity_of(size: str, gpus: tuple[int, int], method: str) -> str:
    return f"{method}, {size} on {gpus[0]} x {gpus[1]}"


def document(rows: dict[str, Row]) -> str:
    """The table of docs/distributed.md."""
    lines = []
    for size in SIZES:
        for gpus in MESHES:
            by_method = {method: rows[identity_of(size, gpus, method)] for method in METHODS}
            first = by_method["APOLLO"]
            lines.append(
                [
                    size,
                    f"{gpus[0]}" if gpus[1] == 1 else f"{gpus[0]} x {gpus[1]}",
                    *(_bytes(by_method[method]["received"]) for method in METHODS),
                    _bytes(first["fsdp"]),
                    " / ".join(str(by_method[method]["collectives"]) for method in METHODS),
                    *(_bytes(by_method[method]["state"]) for method in METHODS),
                    _bytes(first["adamw_state"]),
                ]
            )
    heads = ["", "GPUs", "APOLLO receives", "Mini receives", "FSDP2 itself receives", "collectives a mesh dimension"]
    return table([*heads, "APOLLO's state", "Mini's state", "AdamW's state"], lines)


def _bytes(count: int) -> str:
    """
    >>> _bytes(0), _bytes(1_234), _bytes(26_950_000_000)
    ('0', '1.2 kB', '27 GB')
    """
    for unit, size in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= size:
            return f"{count / size:.2g} {unit}" if count < 100 * size else f"{count / size:.0f} {unit}"
    return str(count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the table into docs/distributed.md")
    options = parser.parse_args()
    results = Results("communication", None)
    for size in SIZES:
        for gpus in MESHES:
            for method in METHODS:
                identity = identity_of(size, gpus, method)
                if identity not in results:
                    results.add(identity, **counted(size, gpus, method))
                    print(identity, results.rows[identity], flush=True)
    text = document(results.rows)
    print(text)
    if options.write:
        TABLE.write(text)


if __name__ == "__main__":
    main()
