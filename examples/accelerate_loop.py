"""Train a small LLaMA with Hugging Face Accelerate: mixed precision, gradient accumulation, several processes, resume.

    python examples/accelerate_loop.py --steps 40
    accelerate launch --multi_gpu --num_processes 2 examples/accelerate_loop.py --steps 80  # continues from step 40
    ACCELERATE_USE_CPU=true torchrun --standalone --nproc-per-node 2 examples/accelerate_loop.py

The optimizer is prepared, stepped, saved and loaded like any other. Only the line that makes it differs from AdamW's.
The text is the source of Python's os module, and each byte of it is a token.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import torch
from accelerate import Accelerator
from transformers import LlamaConfig, LlamaForCausalLM

from apollo_triton import APOLLOAdamW
from apollo_triton.tools.checkpoints import first_line

SIZES = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 2, "num_attention_heads": 4}
SEQUENCE, BATCH, ACCUMULATE = 64, 8, 2


class Bytes(torch.utils.data.Dataset):
    """Sequences of the text of Python's os module. The index decides where one begins, and each byte is a token."""

    text = torch.frombuffer(bytearray(Path(os.__file__).read_bytes()), dtype=torch.uint8).long()

    def __len__(self) -> int:
        return 1_000_000

    def __getitem__(self, index: int) -> torch.Tensor:
        start = index * 7919 % (len(self.text) - SEQUENCE)
        return self.text[start : start + SEQUENCE]


class Progress:
    """How many batches a process has seen. Accelerate saves and loads it together with the model and the optimizer."""

    batches = 0

    def state_dict(self) -> dict[str, int]:
        return {"batches": self.batches}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.batches = state["batches"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="train up to this step (%(default)s)")
    parser.add_argument("--precision", choices=("no", "bf16"), default="bf16", help="(%(default)s)")
    parser.add_argument("--folder", type=Path, default=Path("accelerate_loop"), help="the checkpoint (%(default)s)")
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps {options.steps}: it must be at least 1")

    accelerator = Accelerator(mixed_precision=options.precision, gradient_accumulation_steps=ACCUMULATE)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **SIZES))
    # max_grad_norm clips inside the step. accelerator.clip_grad_norm_ would read and write all gradients once more.
    optimizer = APOLLOAdamW.apollo(model, rank=32, lr=3e-3, max_grad_norm=1.0)  # was: torch.optim.AdamW(...)
    warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
    data = torch.utils.data.DataLoader(Bytes(), batch_size=BATCH)
    model, optimizer, warmup, data = accelerator.prepare(model, optimizer, warmup, data)
    progress = Progress()
    accelerator.register_for_checkpointing(progress)
    if options.folder.exists():
        try:
            accelerator.load_state(str(options.folder))
        except Exception as error:  # of any type: a folder may hold anything
            reason = f"holds no checkpoint of this program ({first_line(error)})"
            raise SystemExit(f"--folder {options.folder} {reason}; give another --folder") from error
    if progress.batches >= options.steps * ACCUMULATE:
        accelerator.print(f"step {progress.batches // ACCUMULATE} of {options.folder} is done already")

    for tokens in accelerator.skip_first_batches(data, progress.batches):
        if progress.batches >= options.steps * ACCUMULATE:
            break
        progress.batches += 1
        with accelerator.accumulate(model):
            loss = model(input_ids=tokens, labels=tokens).loss
            accelerator.backward(loss)
            optimizer.step()
            warmup.step()
            optimizer.zero_grad()
        if progress.batches % (10 * ACCUMULATE) == 0:
            mean = accelerator.reduce(loss.detach(), "mean").item()
            accelerator.print(f"step {progress.batches // ACCUMULATE:4d}   loss {mean:.4f}", flush=True)
    accelerator.save_state(str(options.folder))
    accelerator.end_training()


if __name__ == "__main__":
    main()
