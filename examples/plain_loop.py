"""Train a small LLaMA with a plain PyTorch loop: autocast, gradient accumulation, a checkpoint, exact resume.

    python examples/plain_loop.py --steps 40
    python examples/plain_loop.py --steps 80     # continues from the checkpoint of step 40
    python examples/plain_loop.py --in-backward --checkpoint in_backward.pt  # like torchtune's optimizer_in_bwd

No training framework is needed. Only the line that makes the optimizer differs from AdamW's. With --in-backward each
weight is updated during the backward pass, and its gradient is freed at once; with --accumulate too gradients are kept
until the last batch of a step. The text is the source of Python's os
module, and each byte of it is a token.
"""

from __future__ import annotations

import argparse
import os
from contextlib import nullcontext
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from apollo_triton import APOLLOAdamW, attach_layerwise
from apollo_triton.tools.checkpoints import first_line, load, save  # torch.load and torch.save, with a checksum

SIZES = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 2, "num_attention_heads": 4}
SEQUENCE, BATCH, WARMUP = 64, 8, 10
TEXT = torch.frombuffer(bytearray(Path(os.__file__).read_bytes()), dtype=torch.uint8).long()  # each byte is a token


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="train up to this step (%(default)s)")
    parser.add_argument("--accumulate", type=int, help="batches per step (2; 1 with --in-backward)")
    parser.add_argument("--in-backward", action="store_true", help="update each weight during the backward pass")
    parser.add_argument("--checkpoint", type=Path, default=Path("plain_loop.pt"), help="(%(default)s)")
    options = parser.parse_args()
    if options.accumulate is None:
        options.accumulate = 1 if options.in_backward else 2
    if min(options.steps, options.accumulate) < 1:
        parser.error(f"--steps {options.steps}, --accumulate {options.accumulate}: each must be at least 1")
    if not options.checkpoint.parent.is_dir():
        parser.error(f"--checkpoint {options.checkpoint}: there is no folder {options.checkpoint.parent}")

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **SIZES)).to(device)
    optimizer = APOLLOAdamW.apollo(model, rank=32, lr=3e-3)  # was: torch.optim.AdamW(model.parameters(), lr=3e-3)
    layerwise = attach_layerwise(model, optimizer) if options.in_backward else None
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARMUP))

    first = 0
    if options.checkpoint.exists():
        try:
            saved = load(options.checkpoint, {"model": dict, "accumulate": int, "step": int}, "give another", device)
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            scheduler.load_state_dict(saved["scheduler"])
        except Exception as error:  # of any type: a file may hold anything
            raise SystemExit(f"--checkpoint {options.checkpoint}: {first_line(error)}") from error
        first = saved["step"]
        if saved["accumulate"] != options.accumulate:
            raise SystemExit(
                f"--checkpoint {options.checkpoint} is of a run with --accumulate {saved['accumulate']}; give that, or "
                "another --checkpoint to begin anew"
            )
    if first >= options.steps:
        print(f"step {first} of {options.checkpoint} is done already; give more --steps, or another --checkpoint")

    for step in range(first, options.steps):
        for micro_step in range(options.accumulate):
            tokens = batch(step * options.accumulate + micro_step).to(device)
            with torch.autocast(device.type, dtype=torch.bfloat16):
                loss = model(input_ids=tokens, labels=tokens).loss / options.accumulate
            is_last = micro_step == options.accumulate - 1
            with nullcontext() if layerwise is None or is_last else layerwise.accumulate():
                loss.backward()
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
        if (step + 1) % 10 == 0:
            print(f"step {step + 1:4d}   loss {loss.item() * options.accumulate:.4f}", flush=True)

    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "scheduler": scheduler.state_dict()}
    try:
        save(options.checkpoint, state | {"accumulate": options.accumulate, "step": max(first, options.steps)})
    except OSError as error:
        raise SystemExit(f"--checkpoint {options.checkpoint}: {error}") from error


def batch(index: int) -> torch.Tensor:
    """The batch with this index, ``[BATCH, SEQUENCE]`` tokens. It is the same in every run."""
    starts = torch.randint(len(TEXT) - SEQUENCE, (BATCH, 1), generator=torch.Generator().manual_seed(index))
    return TEXT[starts + torch.arange(SEQUENCE)]


if __name__ == "__main__":
    main()
