"""Pretrain LLaMA-7B on one card of 12 GB: int8 weights whose gradients are never made, APOLLO-Mini with 8-bit moments,
layer-wise updates, activation checkpointing. Needs the extras demo and int8.

    python examples/pretrain_7b_12gb.py --config examples/pretrain_7b_12gb.json  # on a CUDA device, held to 12 GB
    python examples/pretrain_7b_12gb.py --size 60M --steps 20                    # on a CPU, of a size that it can train

It prints what each part will take, activations too, before anything is allocated, and on CUDA what the allocator says
of it. Each byte of the text is a token; weights are random.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from transformers.models.llama.modeling_llama import LlamaForCausalLM, LlamaRotaryEmbedding

from apollo_triton import APOLLOAdamW, attach_layerwise, quantize_model, single_card
from apollo_triton.int8 import Int8Weight
from apollo_triton.llama import meta_model, named_sizes

GB = 1e9


def main() -> None:
    options = parse_options()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda":
        total = torch.cuda.get_device_properties(device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, options.cap * GB / total))
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32  # CPUs are slow in bfloat16
    model: LlamaForCausalLM = quantize_model(meta_model(options.size, dtype))
    predicted = single_card.count(options.size, options.batch, options.sequence, dtype)
    show_predicted(predicted)
    fill(model.to_empty(device=device), options.seed)
    report("weights", device)
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    model.train()
    optimizer = APOLLOAdamW.mini(model, lr=options.lr, stochastic_rounding=True, **single_card.OPTIONS)
    attach_layerwise(model, optimizer, gradients="none")
    started = time.perf_counter()
    for step, tokens in enumerate(batches(options, device), 1):
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()  # moves the weights, one by one
        optimizer.step()
        if step == 1:
            report("weights and optimizer state, after a step", device)
        if step % options.report == 0 or step == options.steps:
            rate = step * options.batch * options.sequence / (time.perf_counter() - started)
            print(f"step {step:5d}   loss {loss.item():.4f}   {rate:.0f} tokens/s", flush=True)
    if device.type == "cuda":
        measured, expected = torch.cuda.max_memory_allocated(device), predicted.total
        print(f"peak: {measured / GB:.2f} GB, predicted {expected / GB:.2f} GB ({measured / expected - 1:+.1%})")


def show_predicted(predicted: single_card.SingleCard) -> None:
    """What training will take at its peak, part by part."""
    for name, _, gigabytes in single_card.rows(predicted):
        print(f"{name:32s} {gigabytes:>7s} GB")


def fill(model: LlamaForCausalLM, seed: int) -> None:
    """Random weights, one tensor at a time, and what a model on the meta device had no memory for."""
    torch.manual_seed(seed)
    deviation = model.config.initializer_range
    with torch.no_grad():
        for parameter in model.parameters():
            if isinstance(parameter, Int8Weight):
                parameter.assign(torch.randn(parameter.shape, device=parameter.device) * deviation)
            elif parameter.dim() > 1:
                parameter.normal_(std=deviation)
            else:
                parameter.fill_(1.0)
    model.model.rotary_emb = LlamaRotaryEmbedding(model.config).to(model.device)


def batches(options: argparse.Namespace, device: torch.device) -> Iterator[torch.Tensor]:
    source = options.text or Path(os.__file__).parent  # the sources of Python's standard library
    files = sorted(source.glob("*.py")) if source.is_dir() else [source]
    text = torch.frombuffer(bytearray(b"".join(file.read_bytes() for file in files)), dtype=torch.uint8)
    for step in range(options.steps):
        generator = torch.Generator().manual_seed(1_000_003 * options.seed + step)
        starts = torch.randint(len(text) - options.sequence, (options.batch,), generator=generator)
        yield text[starts[:, None] + torch.arange(options.sequence)].long().to(device)


def report(what: str, device: torch.device) -> None:
    if device.type == "cuda":
        print(f"allocated for {what}: {torch.cuda.memory_allocated(device) / GB:.2f} GB")


def parse_options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, help="a JSON file of these options; others given go before it")
    parser.add_argument("--size", choices=named_sizes(), default="7B", help="of the paper's LLaMA (%(default)s)")
    parser.add_argument("--cap", type=float, default=12.0, help="GB that a CUDA device may use (%(default)s)")
    parser.add_argument("--steps", type=int, default=100, help="(%(default)s)")
    parser.add_argument("--batch", type=int, default=1, help="sequences a step (%(default)s)")
    parser.add_argument("--sequence", type=int, default=256, help="tokens a sequence (%(default)s)")
    parser.add_argument("--lr", type=float, default=3e-3, help="learning rate (%(default)s)")
    parser.add_argument("--report", type=int, default=10, help="steps between lines (%(default)s)")
    parser.add_argument("--text", type=Path, help="a file, or a folder of .py files (Python's standard library)")
    parser.add_argument("--seed", type=int, default=0, help="of the weights and the batches (%(default)s)")
    given = parser.parse_args().config
    if given is not None:
        config = json.loads(given.read_text())
        unknown = config.keys() - vars(parser.parse_args([])).keys()
        if unknown:
            parser.error(f"{given}: unknown options {', '.join(sorted(unknown))}")
        parser.set_defaults(**config)
    return parser.parse_args()


if __name__ == "__main__":
    main()
