"""Do the optimizers train alike? Each trains a LLaMA on text from disk, with the same batches and initial weights.

    python -m bench.pretrain                                      # sized down: 20 minutes on two CPU cores
    python -m bench.pretrain --stage pretrain-int8                # int8 weights against float ones
    python -m bench.pretrain --model 60M --sequence 256 --batch 128 --steps 1000 --vocabulary 32000 --dtype bfloat16
    python -m bench.pretrain --vocabulary 256                     # bytes of the standard library, without tokenizers

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
from apollo_triton.tools.demo.corpus import VOCABULARY, Corpus, load_corpus
from apollo_triton.tools.demo.training import SIZES, OptimizerMaker, Run, RunConfig

from .contenders import apollo_torch, state_bytes
from .parameter_sets import Weights
from .pretrain_data import load_tokens
from .results_file import Results, Row, default_device

START_METHOD = "spawn"  # of processes; CUDA does not survive a fork
# The best rates of a sweep with the small model and one seed (results/*/pretrain_sweep.json), at the paper's scales,
# since apollo-torch has no others.
SCALE, MINI_SCALE = 1.0, 128.0
LEARNING_RATES = {"AdamW": 5e-3, "APOLLO": 2e-2, "Mini": 1e-2}


def _adamw(config: RunConfig, model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.0, fused=True)


def _quarter(config: RunConfig) -> int:
    """The paper's rank: a quarter of the width."""
    return SIZES[config.model].hidden // 4


def _apollo(**options: Any) -> OptimizerMaker:
    return lambda config, model: APOLLOAdamW.apollo(
        model, _quarter(config), lr=config.learning_rate, scale=SCALE, seed=config.seed, **options
    )


def _mini(**options: Any) -> OptimizerMaker:
    return lambda config, model: APOLLOAdamW.mini(
        model, lr=config.learning_rate, scale=MINI_SCALE, seed=config.seed, **options
    )


def _int8(build: OptimizerMaker, stochastic_rounding: bool = True) -> OptimizerMaker:
    """Q-APOLLO: the same optimizer on int8 attention and MLP weights."""

    def quantized(config: RunConfig, model: nn.Module) -> torch.optim.Optimizer:
        return build(config, quantize_model(model, stochastic_rounding=stochastic_rounding))

    return quantized


def _official(mini: bool) -> OptimizerMaker:
    def build(config: RunConfig, model: nn.Module) -> torch.optim.Optimizer:
        rank = 1 if mini else _quarter(config)
        low_rank, *dense = apollo_param_groups(model, rank)
        weights = Weights(low_rank["params"], [weight for group in dense for weight in group["params"]])
        return apollo_torch(mini, weights, rank, config.learning_rate)

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


def train(config: RunConfig) -> Row:
    """Train ``config``, whose method is a name of ``VARIANTS``, to its end. Returns its row."""
    assert _corpus is not None
    started = time.perf_counter()
    run = Run(config, _corpus, VARIANTS[config.method].build)
    run.evaluate()
    while not run.finished:
        run.advance()
        # Half as often as the demo: there are many runs, and an evaluation on 128 windows takes as long as five steps.
        if run.finished or run.step % (2 * config.evaluation_gap) == 0:
            run.evaluate()
    tenth = max(1, config.steps // 10)
    return {
        "variant": config.method,
        "seed": config.seed,
        "learning_rate": config.learning_rate,
        "parameters": sum(parameter.numel() for parameter in run.model.parameters()),
        "held_out_loss": run.history.held_out_loss[config.steps],
        "training_loss_last_tenth": sum(run.history.training_loss[-tenth:]) / tenth,
        "curve": {str(step): round(loss, 5) for step, loss in run.history.held_out_loss.items()},
        "state_bytes": state_bytes(run.optimizer)[0],
        "seconds": round(time.perf_counter() - started, 1),
    }


def results_of(configs: list[RunConfig], corpus: Corpus, workers: int) -> Iterator[tuple[RunConfig, Row]]:
    """The row of every config as soon as its run ends. Several run at a time. A failed run has a row that says why."""
    context = multiprocessing.get_context(START_METHOD)
    with ProcessPoolExecutor(workers, context, initializer=_use, initargs=(corpus,)) as pool:
        futures = {pool.submit(train, config): config for config in configs}
        for future in as_completed(futures):
            config = futures[future]
            row: Row = {"variant": config.method, "seed": config.seed}
            try:
                yield config, future.result()
            except BrokenProcessPool:
                yield config, row | {"skipped": "its process was killed, most likely because memory ran out"}
            except Exception as error:
                yield config, row | {"skipped": f"{type(error).__name__}: {str(error).partition(chr(10))[0]}"}


def learning_rates(given: list[str]) -> dict[str, float]:
    """The default learning rates, some of them replaced by ``NAME=NUMBER``."""
    rates = dict(LEARNING_RATES)
    for text in given:
        name, _, number = text.partition("=")
        if name not in rates:
            raise SystemExit(f"--lr {text}: give NAME=NUMBER, where NAME is one of {', '.join(rates)}")
        rates[name] = float(number)
    return rates


def main(arguments: list[str] | None = None) -> None:
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
    options = parser.parse_args(arguments)
    rates = learning_rates(options.lr)
    if options.vocabulary == VOCABULARY:
        corpus = load_corpus(options.data, options.sequence + 1)
    else:
        corpus = load_tokens(options.data, options.vocabulary, options.megabytes)
    size, length = (options.batch, options.sequence)
    configs = [
        RunConfig(method, rates[VARIANTS[method].rate], None, options.model, options.steps, size, length, seed, *rest)
        for seed in range(options.seeds)
        for method in options.variants or STAGES[options.stage]
        for rest in [(options.device, corpus.fingerprint, options.dtype)]
    ]
    common = asdict(configs[0])
    for varying in ("method", "learning_rate", "scale", "seed", "device"):
        del common[varying]
    about = {"text": corpus.name, "vocabulary": corpus.vocabulary, "tokens": len(corpus.train)}
    results = Results(options.name or options.stage, options.device, fresh=options.fresh, settings=common | about)
    missing = [config for config in configs if identity(config) not in results]
    workers = options.workers or (1 if options.device.startswith("cuda") else os.cpu_count() or 1)
    print(f"{len(missing)} of {len(configs)} runs, {workers} at a time; {about}", flush=True)
    for config, row in results_of(missing, corpus, workers):
        results.add(identity(config), **row)
        figure = row.get("skipped") or f"held-out loss {row['held_out_loss']:.4f}, {row['seconds']} s"
        print(f"{identity(config):44s} {figure}", flush=True)
    print(f"written to {results.path}")


def identity(config: RunConfig) -> str:
    return f"{config.method}, lr {config.learning_rate:g}, seed {config.seed}"


if __name__ == "__main__":
    main()
