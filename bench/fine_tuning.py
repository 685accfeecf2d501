"""What do a few steps at a learning rate do to weights that are trained already?

    python -m bench.fine_tuning            # six minutes on one core; prints docs/options.md's table

It trains the demo's model with AdamW to the end. From those weights each optimizer, fresh, goes on at a constant rate
without warm-up, on further batches of the same text. That is the hardest case: nothing is left of the state, and the
first step has the full rate.
"""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from apollo_triton import APOLLOAdamW
from apollo_triton.tools.demo.corpus import Corpus, load_corpus
from apollo_triton.tools.demo.training import Run, RunConfig, make_model
from apollo_triton.tools.options import BATCH, SEQUENCE, STEPS

from .report_tables import table
from .results_file import Results

RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2)
AFTER = (5, 20)  # steps, at which the held-out loss is measured
PRETRAINING_RATE = 3e-3
METHODS = {
    "AdamW": lambda model, lr: torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=0.0),
    "APOLLO, rank 48": lambda model, lr: APOLLOAdamW.apollo(model, rank=48, lr=lr),
    "Mini": lambda model, lr: APOLLOAdamW.mini(model, lr=lr),
    "Mini, scale 128": lambda model, lr: APOLLOAdamW.mini(model, scale=128, lr=lr),
}


def fine_tuned(weights: Mapping[str, Tensor], corpus: Corpus, method: str, rate: float) -> dict[int, float]:
    """The held-out loss after each of ``AFTER`` steps."""
    model = make_model("1M", SEQUENCE, seed=0)
    model.load_state_dict(weights)
    optimizer = METHODS[method](model, rate)
    losses = {}
    for step in range(1, max(AFTER) + 1):
        optimizer.zero_grad()
        _loss(model, corpus.batch(0, STEPS + step, BATCH, SEQUENCE + 1)).backward()
        optimizer.step()
        if step in AFTER:
            losses[step] = held_out(model, corpus)
    return losses


@torch.no_grad()
def held_out(model: nn.Module, corpus: Corpus) -> float:
    """The mean loss on the held-out text, in nats a byte."""
    losses = [_loss(model, windows).item() for windows in corpus.held_out_windows(SEQUENCE + 1).split(32)]
    return sum(losses) / len(losses)


def _loss(model: nn.Module, windows: Tensor) -> Tensor:
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())


def as_table(rows: Mapping[str, Mapping[str, Any]]) -> str:
    """A row for each optimizer and a column for each rate: the losses after each of ``AFTER`` steps."""
    cells = [
        [method, *(", ".join(f"{rows[f'{method}, {rate:g}'][str(step)]:.3f}" for step in AFTER) for rate in RATES)]
        for method in METHODS
    ]
    return table(["learning rate", *(f"{rate:g}" for rate in RATES)], cells)


def main() -> None:
    argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0]).parse_args()
    torch.set_num_threads(1)
    corpus = load_corpus(None, SEQUENCE + 1)
    settings = {"after": AFTER, "batch": BATCH, "sequence": SEQUENCE, "data": corpus.fingerprint, "threads": 1}
    results = Results("fine_tuning", "cpu", settings=settings)
    config = RunConfig("adamw", PRETRAINING_RATE, None, "1M", STEPS, BATCH, SEQUENCE, 0, "cpu", data=corpus.fingerprint)
    run = Run(config, corpus)
    while not run.finished:
        run.advance()
    results.add("before", held_out_loss=held_out(run.model, corpus))
    for method in METHODS:
        for rate in RATES:
            losses = fine_tuned(run.model.state_dict(), corpus, method, rate)
            results.add(f"{method}, {rate:g}", **{str(step): loss for step, loss in losses.items()})
    print(f"before: {results.rows['before']['held_out_loss']:.3f}\n{as_table(results.rows)}")


if __name__ == "__main__":
    main()
