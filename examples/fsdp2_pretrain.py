"""Pre-train a small LLaMA with APOLLO under FSDP2, and resume from its checkpoint on another number of ranks.

    torchrun --standalone --nproc-per-node 2 examples/fsdp2_pretrain.py --folder run --steps 60
    torchrun --standalone --nproc-per-node 4 examples/fsdp2_pretrain.py --folder run --steps 120   # from step 60 on
    torchrun --standalone --nproc-per-node 2 examples/fsdp2_pretrain.py --folder small --layerwise --int8 --state-bits 8

CUDA devices communicate over nccl and compute in bfloat16. A machine without them trains on its CPU over gloo. Each
byte of the text is a token.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
from transformers import LlamaConfig, LlamaForCausalLM

from apollo_triton import APOLLOAdamW, attach_layerwise, quantize_model
from apollo_triton.core.files import open_regular
from apollo_triton.tools.checkpoints import first_line


def main() -> None:
    options = parse_options()
    if "RANK" not in os.environ:
        raise SystemExit(
            "this runs under torchrun: torchrun --standalone --nproc-per-node 2 examples/fsdp2_pretrain.py ..."
        )
    on_cuda = torch.cuda.is_available()
    if on_cuda:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    dist.init_process_group("nccl" if on_cuda else "gloo")
    train(options, torch.device("cuda" if on_cuda else "cpu"))
    dist.destroy_process_group()  # not after an error: it would wait for the other ranks


def train(options: argparse.Namespace, device: torch.device) -> None:
    rank, world = dist.get_rank(), dist.get_world_size()
    if options.batch % world:
        raise SystemExit(f"--batch {options.batch} cannot be shared by {world} ranks; use a multiple of {world}")
    model = sharded_model(options, device)
    optimizer = make_optimizer(options, model)
    first = load_newest(options.folder, model, optimizer)
    if rank == 0:
        todo = f"steps {first + 1} to {options.steps}" if first < options.steps else f"step {first} is done already"
        print(f"{world} ranks on {device.type}, {todo}", flush=True)
    for step, tokens in batches(options, first, device):
        for group in optimizer.param_groups:
            group["lr"] = options.lr * learning_rate_factor(step, options.schedule)
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % options.report == 0 or step == options.steps:
            mean = loss.detach().clone()
            dist.all_reduce(mean)
            if rank == 0:
                print(f"step {step:5d}   loss {mean.item() / world:.4f}", flush=True)
        if step % options.save == 0 or step == options.steps:
            save(options.folder, step, model, optimizer)


def sharded_model(options: argparse.Namespace, device: torch.device) -> LlamaForCausalLM:
    """The same LLaMA on every rank, sharded layer by layer. Int8 weights are made before."""
    torch.manual_seed(options.seed)
    config = LlamaConfig(
        vocab_size=256,
        hidden_size=options.hidden,
        intermediate_size=max(64, options.hidden * 8 // 3 // 64 * 64),  # whole blocks of moments on 2, 4 and 8 ranks
        num_hidden_layers=options.layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=options.length,
    )
    model = LlamaForCausalLM(config).to(device)
    if options.int8:
        quantize_model(model)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    # The optimizer sees weights and gradients in float32. Only forward and backward are in bfloat16.
    policy = MixedPrecisionPolicy(param_dtype=torch.bfloat16) if device.type == "cuda" else MixedPrecisionPolicy()
    # Embedding and head too: in the model's own unit they would stay whole from the forward pass to the backward pass.
    for part in (model.model.embed_tokens, *model.model.layers, model.lm_head, model):
        fully_shard(part, mesh=mesh, mp_policy=policy)
    return model


def make_optimizer(options: argparse.Namespace, model: LlamaForCausalLM) -> APOLLOAdamW:
    """After sharding, which replaces the parameters. Layer-wise updates have no norm of all gradients to clip by."""
    if options.mini:
        optimizer = APOLLOAdamW.mini(model, lr=options.lr, state_bits=options.state_bits)
    else:
        clip = None if options.layerwise else 1.0
        rank, bits = options.rank, options.state_bits
        optimizer = APOLLOAdamW.apollo(model, rank=rank, lr=options.lr, max_grad_norm=clip, state_bits=bits)
    if options.layerwise:
        attach_layerwise(model, optimizer)
    return optimizer


def batches(options: argparse.Namespace, first: int, device: torch.device) -> Iterator[tuple[int, torch.Tensor]]:
    """This rank's share of each step's batch. The whole batch is the same on any number of ranks."""
    source = options.text or Path(os.__file__).parent  # the sources of Python's standard library
    try:
        files = sorted(source.glob("*.py")) if source.is_dir() else [source]
        read = b"".join(content(file) for file in files)
    except (OSError, ValueError) as error:
        raise SystemExit(f"--text {source}: {error}") from error
    if len(read) <= options.length:
        raise SystemExit(f"--text {source} has {len(read)} bytes; more than --length {options.length} are needed")
    text = torch.frombuffer(bytearray(read), dtype=torch.uint8)
    for step in range(first + 1, options.steps + 1):
        generator = torch.Generator().manual_seed(1_000_003 * options.seed + step)
        starts = torch.randint(len(text) - options.length, (options.batch,), generator=generator)
        starts_of_rank = starts[dist.get_rank() :: dist.get_world_size()]
        yield step, text[starts_of_rank[:, None] + torch.arange(options.length)].long().to(device)


def content(path: Path) -> bytes:
    with open_regular(path) as file:
        return file.read()


def learning_rate_factor(step: int, steps: int) -> float:
    """A linear warmup over a tenth of the steps, then a cosine down to a tenth."""
    warmup = max(1, steps // 10)
    if step <= warmup:
        return step / warmup
    return 0.55 + 0.45 * math.cos(math.pi * min(1.0, (step - warmup) / max(1, steps - warmup)))


def save(folder: Path, step: int, model: LlamaForCausalLM, optimizer: APOLLOAdamW) -> None:
    """Write the shards of all ranks. The previous checkpoint is deleted only once the new one is complete."""
    unfinished = folder / "unfinished"
    if dist.get_rank() == 0 and unfinished.exists():
        shutil.rmtree(unfinished)
    dist.barrier()
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state}, checkpoint_id=unfinished)
    if dist.get_rank() == 0:
        old = checkpoints(folder)
        unfinished.rename(folder / f"step-{step}")
        for old_step in old:
            if old_step != step:
                shutil.rmtree(folder / f"step-{old_step}")
    dist.barrier()


def load_newest(folder: Path, model: LlamaForCausalLM, optimizer: APOLLOAdamW) -> int:
    """Load the newest checkpoint and return its step, or 0 if there is none."""
    step = max(checkpoints(folder), default=0)
    if step:
        weights, state = get_state_dict(model, optimizer)
        loaded = {"model": weights, "optimizer": state}
        try:
            dcp.load(loaded, checkpoint_id=folder / f"step-{step}")
            set_state_dict(model, optimizer, model_state_dict=loaded["model"], optim_state_dict=loaded["optimizer"])
        except Exception as error:  # of any type: a folder may hold anything
            where = f"{folder / f'step-{step}'} is no checkpoint of this run ({first_line(error)})"
            raise SystemExit(f"{where}; delete it, or give another --folder") from error
    return step


def checkpoints(folder: Path) -> list[int]:
    """The steps that have a complete checkpoint."""
    found = (re.fullmatch(r"step-([1-9]\d{0,17})", path.name) for path in folder.glob("step-*") if path.is_dir())
    return [int(match[1]) for match in found if match]


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True, help="where checkpoints are saved and looked for")
    parser.add_argument("--steps", type=int, default=200, help="train up to this step (%(default)s)")
    parser.add_argument("--schedule", type=int, default=1000, help="steps of the learning rate's cosine (%(default)s)")
    parser.add_argument("--save", type=int, default=100, help="steps between checkpoints (%(default)s)")
    parser.add_argument("--report", type=int, default=10, help="steps between lines (%(default)s)")
    parser.add_argument("--mini", action="store_true", help="APOLLO-Mini instead of APOLLO")
    parser.add_argument("--rank", type=int, help="APOLLO's rank (32)")
    parser.add_argument("--layerwise", action="store_true", help="update each layer within backward, free its gradient")
    parser.add_argument("--int8", action="store_true", help="int8 weights in attention and MLP")
    parser.add_argument("--state-bits", type=int, choices=(8, 32), default=32, help="of the moments (%(default)s)")
    parser.add_argument("--lr", type=float, default=3e-3, help="peak learning rate (%(default)s)")
    parser.add_argument("--batch", type=int, default=24, help="sequences per step, over all ranks (%(default)s)")
    parser.add_argument("--length", type=int, default=128, help="bytes in a sequence (%(default)s)")
    parser.add_argument("--hidden", type=int, default=128, help="hidden size, a multiple of 8 (%(default)s)")
    parser.add_argument("--layers", type=int, default=4, help="(%(default)s)")
    parser.add_argument("--text", type=Path, help="a file, or a folder of .py files (Python's standard library)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches (%(default)s)")
    options = parser.parse_args()
    if options.mini and options.rank not in (None, 1):
        parser.error(f"--rank {options.rank} is APOLLO's, and --mini has rank 1; leave one of them out")
    options.rank = 32 if options.rank is None else options.rank
    for name in ("steps", "schedule", "save", "report", "rank", "batch", "length", "hidden", "layers"):
        if getattr(options, name) < 1:
            parser.error(f"--{name} {getattr(options, name)}: it must be at least 1")
    return options


if __name__ == "__main__":
    main()
