"""Train a small LLaMA with PyTorch Lightning. configure_optimizers returns APOLLOAdamW, and the Trainer does the rest.

    python examples/lightning_module.py --steps 40
    python examples/lightning_module.py --steps 80  # continues from the checkpoint of step 40

Precision, accumulation, clipping and checkpoints are the Trainer's, as with any optimizer. The text is the source of
Python's os module, and each byte of it is a token.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import lightning
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from apollo_triton import APOLLOAdamW
from apollo_triton.core.files import open_regular
from apollo_triton.tools.checkpoints import first_line

SIZES = {"hidden_size": 128, "intermediate_size": 344, "num_hidden_layers": 2, "num_attention_heads": 4}
SEQUENCE, BATCH = 64, 8


class Batches:
    """Batches of the text of Python's os module. Each byte is a token.

    Lightning saves and loads the index of the current batch. This class has a length, so Lightning fetches no batch
    ahead of time. A DataLoader would start the epoch again when training resumes in the middle of it.
    """

    text = torch.frombuffer(bytearray(Path(os.__file__).read_bytes()), dtype=torch.uint8).long()
    index = 0

    def __len__(self) -> int:
        return 1_000_000

    def __iter__(self) -> Iterator[torch.Tensor]:
        while True:
            self.index += 1
            generator = torch.Generator().manual_seed(self.index)
            starts = torch.randint(len(self.text) - SEQUENCE, (BATCH, 1), generator=generator)
            yield self.text[starts + torch.arange(SEQUENCE)]

    def state_dict(self) -> dict[str, int]:
        return {"index": self.index}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.index = state["index"]


class Llama(lightning.LightningModule):
    """A small LLaMA that learns to continue a text."""

    def __init__(self) -> None:
        super().__init__()
        self.model = LlamaForCausalLM(LlamaConfig(vocab_size=256, **SIZES))

    def training_step(self, tokens: torch.Tensor, batch_idx: int) -> torch.Tensor:
        loss = self.model(input_ids=tokens, labels=tokens).loss
        self.log("loss", loss, prog_bar=True)
        return loss

    def configure_optimizers(self) -> dict[str, Any]:
        optimizer = APOLLOAdamW.apollo(self, rank=32, lr=3e-3)  # was: torch.optim.AdamW(self.parameters(), lr=3e-3)
        warmup = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / 10))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": warmup, "interval": "step"}}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=40, help="train up to this step (%(default)s)")
    parser.add_argument("--precision", choices=("32-true", "bf16-mixed", "bf16-true"), default="bf16-mixed")
    parser.add_argument("--folder", type=Path, default=Path("lightning_module"), help="the checkpoint (%(default)s)")
    options = parser.parse_args()
    if options.steps < 1:
        parser.error(f"--steps {options.steps}: it must be at least 1")

    lightning.seed_everything(0, verbose=False)
    trainer = lightning.Trainer(
        max_steps=options.steps,
        precision=options.precision,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,  # max_grad_norm of APOLLOAdamW clips without reading the gradients once more
        logger=False,
        enable_model_summary=False,
        enable_checkpointing=False,  # the one checkpoint is saved at the end, below
        default_root_dir=options.folder,
    )
    newest = options.folder / "last.ckpt"
    saved = {}
    if newest.exists():
        try:
            with open_regular(newest) as file:
                saved = torch.load(file, map_location="cpu", weights_only=True)
            done = int(saved["global_step"])
        except Exception as error:  # of any type: a file may hold anything
            reason = f"is no checkpoint of this program ({first_line(error)})"
            raise SystemExit(f"{newest} {reason}; delete it, or give another --folder") from error
        if done >= options.steps:
            print(f"step {done} of {newest} is done already; give more --steps, or another --folder")
            return
    trainer.fit(Llama(), Batches(), ckpt_path=newest if saved else None, weights_only=True)
    trainer.save_checkpoint(newest)
    print(f"step {trainer.global_step:4d}   loss {trainer.callback_metrics['loss'].item():.4f}")


if __name__ == "__main__":
    main()
