"""Do the optimizers train alike? Each trains a LLaMA on text from disk, with the same batches and initial weights.

    python -m bench.pretrain                                      # sized down: 20 minutes on two CPU cores
    python -m bench.pretrain --stage pretrain-int8                # int8 weights against float ones
    python -m bench.pretrain --model 60M --sequence 256 --batch 128 --steps 1000 --vocabulary 32000 --dtype bfloat16

A run is one variant with one seed. On a CPU each run has one process and one thread. Runs that the results file holds
are not run again. A seed decides the weights, the batches and the projections.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from apollo_triton import APOLLOAdamW, apollo_param_groups, quantize_model
from apollo_triton.tools.demo.corpus import Corpus
from apollo_triton.tools.demo.training import SIZES, OptimizerMaker, Plan, Run

from .contenders import apollo_torch, state_bytes
from .parameter_sets import Weights
from .pretrain_data import load_tokens
from .results_file import Results, Row, default_device

# The best rates of a sweep with the small model and one seed (results/*/pretrain_sweep.json).
LEARNING_RATES = {"AdamW": 5e-3, "APOLLO": 2e-2, "Mini": 1e-2}


def _adamw(plan: Plan, model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=plan.learning_rate, weight_decay=0.0, fused=True)


def _quarter(plan: Plan) -> int:
    """The paper's rank: a quarter of the width."""
    return SIZES[plan.model].hidden // 4


def _apollo(**options: Any) -> OptimizerMaker:
    return lambda plan, model: APOLLOAdamW.apollo(
        model, _quarter(plan), lr=plan.learning_rate, seed=plan.seed, **options
    )


def _mini(**options: Any) -> OptimizerMaker:
    return lambda plan, model: APOLLOAdamW.mini(model, lr=plan.learning_rate, seed=plan.seed, **options)


def _int8(build: OptimizerMaker, stochastic_rounding: bool = True) -> OptimizerMaker:
    """Q-APOLLO: the same optimizer on int8 attention and MLP weights."""

    def quantized(plan: Plan, model: nn.Module) -> torch.optim.Optimizer:
        return build(plan, quantize_model(model, stochastic_rounding=stochastic_rounding))

    return quantized


def _official(mini: bool) -> OptimizerMaker:
    def build(plan: Plan, model: nn.Module) -> torch.optim.Optimizer:
        rank = 1 if mini else _quarter(plan)
        weights = Weights(*(group["params"] for group in apollo_param_groups(model, rank)))
        return apollo_torch(mini, weights, rank, plan.learning_rate)

    return build


@dataclass(frozen=True)
class Variant:
    """An optimizer, and the entry of the learning rates that it takes."""

    build: OptimizerMaker
    rate: str


VARIANTS = {
    "AdamW": Variant(_adamw, "AdamW"),
    "apollo-torch": Variant(_official(mini=False), "APOLLO"),
    "APOLLO": Variant(_apollo(), "APOLLO"),
    "APOLLO, a seed per matrix": Variant(_apollo(seed_per_param=True), "APOLLO"),
    "APOLLO, Rademacher": Variant(_apollo(distribution="rademacher"), "APOLLO"),
    "APOLLO, bf16 moments": Variant(_apollo(state_dtype=torch.bfloat16), "APOLLO"),
    "apollo-torch Mini": Variant(_official(mini=True), "Mini"),
    "Mini": Variant(_mini(), "Mini"),
    "Mini, a seed per matrix": Variant(_mini(seed_per_param=True), "Mini"),
    "Mini, Rademacher": Variant(_mini(distribution="rademacher"), "Mini"),
    "Mini, bf16 moments": Variant(_mini(state_dtype=torch.bfloat16), "Mini"),
    "Q-APOLLO": Variant(_int8(_apollo()), "APOLLO"),
    "Q-APOLLO, to the nearest": Variant(_int8(_apollo(), stochastic_rounding=False), "APOLLO"),
    "Q-Mini": Variant(_int8(_mini()), "Mini"),
    "Q-Mini, to the nearest": Variant(_int8(_mini(), stochastic_rounding=False), "Mini"),
    "Q-Mini, 8-bit moments": Variant(_int8(_mini(state_bits=8)), "Mini"),
}
# The stages: all optimizers with float weights, and int8 weights beside float ones.
STAGES = {
    "pretrain": [name for name in VARIANTS if not name.startswith("Q-")],
    "pretrain-int8": ["APOLLO", "Mini", *(name for name in VARIANTS if name.startswith("Q-"))],
}

_corpus: Corpus | None = None


def _use(corpus: Corpus) -> None:
    """Set up a process: the text, and one thread."""
    global _corpus
    _corpus = corpus
    torch.set_num_threads(1)


def train(plan: Plan) -> Row:
    """Train ``plan``, whose method is a name of ``VARIANTS``, to its end. Returns its row."""
    assert _corpus is not None
    started = time.perf_counter()
    run = Run(plan, _corpus, VARIANTS[plan.method].build)
    run.evaluate()
    while not run.finished:
        run.advance()
        # Half as often as the demo: there are many runs, and an evaluation on 128 windows takes as long as five steps.
        if run.finished or run.step % (2 * plan.evaluation_gap) == 0:
            run.evaluate()
    tenth = max(1, plan.steps // 10)
    return {
        "variant": plan.method,
        "seed": plan.seed,
        "learning_rate": plan.learning_rate,
        "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
        "held_out_loss": run.history.held_out_loss[plan.steps],
        "training_loss_last_tenth": sum(run.history.training_loss[-tenth:]) / tenth,
        "curve": {str(step): round(loss, 5) for step, loss in run.history.held_out_loss.items()},
        "state_bytes": state_bytes(run.optimizer)[0],
        "seconds": round(time.perf_counter() - started, 1),
    }


def results_of(plans: list[Plan], corpus: Corpus, workers: int) -> Iterator[tuple[Plan, Row]]:
    """The row of every plan as soon as its run ends. Several run at a time. A failed run has a row that says why."""
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(workers, context, initializer=_use, initargs=(corpus,)) as pool:
        futures = {pool.submit(train, plan): plan for plan in plans}
        for future in as_completed(futures):
            plan = futures[future]
            row: Row = {"variant": plan.method, "seed": plan.seed}
            try:
                yield plan, future.result()
            except BrokenProcessPool:
                yield plan, row | {"skipped": "its process was killed, most likely because memory ran out"}
            except Exception as error:
                yield plan, row | {"skipped": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}


def learning_rates(given: list[str]) -> dict[str, float]:
    """The default learning rates, some of them replaced by ``NAME=NUMBER``."""
    rates = dict(LEARNING_RATES)
    for text in given:
        name, _, number = text.partition("=")
        if name not in rates:
            raise SystemExit(f"--lr {text}: give NAME=NUMBER, where NAME is one of {', '.join(rates)}")
        rates[name] = float(number)
    return rates


def main() -> None:
    """Run what is missing. After each run its row is written to the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="1M", choices=SIZES, help="a LLaMA's size (%(default)s)")
    parser.add_argument("--stage", default="pretrain", choices=STAGES, help="which variants (%(default)s)")
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, metavar="NAME", help="instead of the stage's")
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds (%(default)s)")
    parser.add_argument("--steps", type=int, default=320, help="steps of a run (%(default)s)")
    parser.add_argument("--batch", type=int, default=8, help="sequences per step (%(default)s)")
    parser.add_argument("--sequence", type=int, default=128, help="tokens in each (%(default)s)")
    parser.add_argument("--vocabulary", type=int, default=1024, help="tokens of the byte-level BPE (%(default)s)")
    parser.add_argument("--dtype", default="float32", choices=("float32", "bfloat16"), help="of weights (%(default)s)")
    parser.add_argument("--lr", nargs="*", default=[], metavar="NAME=NUMBER", help=f"for {', '.join(LEARNING_RATES)}")
    parser.add_argument("--data", type=Path, help="a file, or a folder of text files (default: Python sources here)")
    parser.add_argument("--megabytes", type=float, default=12, help="megabytes of text (%(default)s)")
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--workers", type=int, help="runs at a time (default: one a core, one on a GPU)")
    parser.add_argument("--name", help="name of the results file (default: the stage's)")
    parser.add_argument("--fresh", action="store_true", help="measure everything anew")
    options = parser.parse_args()
    rates = learning_rates(options.lr)
    corpus = load_tokens(options.data, options.vocabulary, options.megabytes)
    size, length = (options.batch, options.sequence)
    plans = [
        Plan(method, rates[VARIANTS[method].rate], None, options.model, options.steps, size, length, seed, *rest)
        for seed in range(options.seeds)
        for method in options.variants or STAGES[options.stage]
        for rest in [(options.device, corpus.fingerprint, options.dtype)]
    ]
    common = asdict(plans[0])
    for varying in ("method", "learning_rate", "scale", "seed", "device"):
        del common[varying]
    about = {"text": corpus.name, "vocabulary": corpus.vocabulary, "tokens": len(corpus.train)}
    results = Results(options.name or options.stage, options.device, fresh=options.fresh, settings=common | about)
    missing = [plan for plan in plans if identity(plan) not in results]
    workers = options.workers or (1 if options.device.startswith("cuda") else os.cpu_count() or 1)
    print(f"{len(missing)} of {len(plans)} runs, {workers} at a time; {about}", flush=True)
    for plan, row in results_of(missing, corpus, workers):
        results.add(identity(plan), **row)
        figure = row.get("skipped") or f"held-out loss {row['held_out_loss']:.4f}, {row['seconds']} s"
        print(f"{identity(plan):44s} {figure}", flush=True)
    print(f"written to {results.path}")


def identity(plan: Plan) -> str:
    return f"{plan.method}, lr {plan.learning_rate:g}, seed {plan.seed}"


if __name__ == "__main__":
    main()
