"""Does AdamW's learning rate carry over to APOLLO with ``scale="auto"``? Sweeps of LLaMAs of four widths.

    python -m bench.rates                   # about two hours on two cores; rows that the results file has are kept
    python -m bench.rates --widths 64 128   # a part of it

For each width it trains AdamW and APOLLO at rank 1 (Mini), 8 and a quarter of the width, at rates that differ by a
factor of 2, until the best of a method has a worse one on both sides. APOLLO's sweep starts at AdamW's best rate. A
method's loss at a rate is the mean over seeds. ``bench/rates_report.py`` makes docs/options.md's table and picture.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from apollo_triton import APOLLOAdamW
from apollo_triton.tools.demo.corpus import load_corpus
from apollo_triton.tools.demo.training import SIZES, Run, RunConfig, Size

from .results_file import Results

WIDTHS = (64, 128, 256, 512)
# A step has 512 bytes. With 1,024 and 200 steps the best rates at a width of 128 were the same.
STEPS, BATCH, SEQUENCE = 150, 8, 64
FIRST_RATE = 5e-3  # where AdamW's sweep starts; the others are this times powers of 2
VARIANTS: Mapping[str, Mapping[str, Any]] = {
    "": {},
    "no limiter": {"disable_nl": True},
    "Rademacher": {"distribution": "rademacher"},
}
STEPS_BETWEEN_NORMS = 10


@dataclass(frozen=True)
class Method:
    """An optimizer at one width. ``rank`` is None for AdamW; ``variant`` is a key of ``VARIANTS``."""

    width: int
    rank: int | None = None
    variant: str = ""

    @property
    def name(self) -> str:
        """What tables call it, whatever the width."""
        if self.rank is None:
            return "AdamW"
        rank = "Mini" if self.rank == 1 else "rank 8" if self.rank == 8 else "rank width/4"
        return f"{rank}, {self.variant}" if self.variant else rank

    @property
    def seeds(self) -> tuple[int, ...]:
        """One seed where a run takes minutes and the variant is not the main one."""
        return (0,) if self.variant and self.width > 256 else (0, 1, 2)

    def optimizer(self, model: nn.Module, rate: float, seed: int) -> torch.optim.Optimizer:
        if self.rank is None:
            return torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
        options: dict[str, Any] = {"lr": rate, "seed": seed, "scale": "auto", **VARIANTS[self.variant]}
        if self.rank == 1:
            return APOLLOAdamW.mini(model, **options)
        return APOLLOAdamW.apollo(model, rank=self.rank, **options)


def methods(width: int) -> list[Method]:
    """AdamW, and every rank and variant."""
    ranks = (1, 8, width // 4)
    return [Method(width), *(Method(width, rank, variant) for variant in VARIANTS for rank in ranks)]


Losses = Mapping[tuple[Method, int, int], float]  # by method, index of the rate and seed


def rate_at(index: int) -> float:
    return FIRST_RATE * 2.0**index


def identity(method: Method, index: int, seed: int) -> str:
    return f"width {method.width}, {method.name}, rate {rate_at(index):g}, seed {seed}"


def means(losses: Losses, method: Method) -> dict[int, float]:
    """The loss of a method at each rate that all seeds have run, by the index of the rate."""
    indices = {index for known, index, _ in losses if known == method}
    every = {index: [losses.get((method, index, seed), math.nan) for seed in method.seeds] for index in sorted(indices)}
    return {index: sum(values) / len(values) for index, values in every.items() if not math.isnan(sum(values))}


def best(found: Mapping[int, float]) -> int | None:
    """The index of the best rate; None while it has no worse one on each side.

    >>> best({-1: 2.3, 0: 2.1, 1: 2.2}), best({0: 2.1, 1: 2.2})
    (0, None)
    """
    index = min(found, key=lambda index: found[index], default=None)
    return index if index is not None and {index - 1, index + 1} <= found.keys() else None


def missing(losses: Losses, widths: Iterable[int]) -> list[tuple[Method, int, int]]:
    """The runs that the sweeps need next."""
    wanted: list[tuple[Method, int, int]] = []
    for width in widths:
        start = best(means(losses, Method(width)))
        for method in methods(width) if start is not None else [Method(width)]:
            found = means(losses, method)
            if best(found) is None:
                at = min(found, key=lambda index: found[index]) if found else start or 0
                indices = [index for index in (at, at - 1, at + 1) if index not in found]
                wanted += [(method, index, seed) for index in indices for seed in method.seeds]
    return [run for run in wanted if run not in losses]


def vertex(found: Mapping[int, float]) -> float:
    """The best rate, between the rates that were run: where the parabola through the best and its neighbours in the
    logarithm of the rate is lowest.

    >>> round(vertex({-1: 2.0, 0: 1.0, 1: 1.5}) / FIRST_RATE, 2)
    1.12
    """
    index = best(found)
    if index is None:
        raise ValueError("no rate has a worse one on both sides")
    below, at, above = (found[index + step] for step in (-1, 0, 1))
    return FIRST_RATE * 2.0 ** (index + 0.5 * (below - above) / (below - 2 * at + above))


def measure(run: tuple[Method, int, int]) -> tuple[tuple[Method, int, int], dict[str, float]]:
    """Train to the end. Returns the held-out loss, in nats a byte, and the root mean square of the matrices' updates,
    divided by the rate."""
    torch.set_num_threads(1)
    method, index, seed = run
    corpus = load_corpus(None, SEQUENCE + 1)
    model = f"width {method.width}"
    SIZES[model] = Size(method.width, 11 * method.width // 4, layers=2, heads=method.width // 32)
    config = RunConfig(
        "adamw", rate_at(index), None, model, STEPS, BATCH, SEQUENCE, seed, "cpu", data=corpus.fingerprint
    )
    training = Run(config, corpus, lambda config, model: method.optimizer(model, config.learning_rate, seed))
    squares: list[float] = []
    while not training.finished:
        counts = training.step % STEPS_BETWEEN_NORMS == 0
        before = [weight.detach().clone() for weight in _matrices(training.model)] if counts else []
        training.advance()
        if before:
            squares.append(
                _mean_square(before, _matrices(training.model)) / config.learning_rate_at(training.step) ** 2
            )
    training.evaluate()
    loss = training.history.held_out_loss[STEPS]
    return run, {"held_out_loss": loss, "update_rms": math.sqrt(sum(squares) / len(squares))}


def _matrices(model: nn.Module) -> Iterator[Tensor]:
    return (weight for name, weight in model.named_parameters() if "attn" in name or "mlp" in name)


def _mean_square(before: list[Tensor], after: Iterable[Tensor]) -> float:
    differences = [(new.detach() - old).flatten() for old, new in zip(before, after, strict=True)]
    return torch.cat(differences).square().mean().item()


def losses_of(rows: Iterable[Mapping[str, Any]]) -> dict[tuple[Method, int, int], float]:
    """The losses of a results file. One that is not finite counts as worse than any other."""
    found = {}
    for row in rows:
        method = Method(row["width"], row["rank"], row["variant"])
        index = round(math.log2(row["rate"] / FIRST_RATE))
        loss = row["held_out_loss"]
        found[method, index, row["seed"]] = loss if math.isfinite(loss) else math.inf
    return found


def main() -> None:
    """Run what is missing, round by round, and write each row."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--widths", type=int, nargs="+", default=WIDTHS, choices=WIDTHS, metavar="W")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time (default: one a core)")
    options = parser.parse_args()
    data = load_corpus(None, SEQUENCE + 1).fingerprint
    settings = {"steps": STEPS, "batch": BATCH, "sequence": SEQUENCE, "data": data, "threads": 1}
    results = Results("rates", "cpu", settings=settings)
    with multiprocessing.get_context("spawn").Pool(options.workers) as pool:
        while wanted := missing(losses_of(results.rows.values()), options.widths):
            for (method, index, seed), figures in pool.imap_unordered(measure, wanted):
                key = identity(method, index, seed)
                described = {"width": method.width, "rank": method.rank, "variant": method.variant}
                results.add(key, **described, rate=rate_at(index), seed=seed, **figures)
                print(f"{key}: {figures['held_out_loss']:.3f}", flush=True)


if __name__ == "__main__":
    main()
