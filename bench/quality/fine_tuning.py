"""Does fine-tuning learn as much with less memory, and what does it forget? The study's model goes from Python to C++.

    python -m bench.quality.fine_tuning    # ten minutes of one core; it goes on where it was, and prints the table

The model is that of AdamW with embeddings at four times the rate: a full run with seed 0, at the best rate of short
runs. Its folder, ``runs/quality-checkpoint``, is what ``examples/finetune_sft.py`` takes too, with texts to try:

    python examples/finetune_sft.py --model runs/quality-checkpoint --data runs/quality-checkpoint/cpp.txt \\
        --first-text runs/quality-checkpoint/python.txt --method lora --lr 3e-3

All methods train the matrices that the example trains, or adapters of them, and nothing else. Each has a sweep of
rates, and at its best rate three seeds. A seed decides batches, projections and adapters; the model is always the same.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apollo_triton import APOLLOAdamW
from apollo_triton.core.extras import require
from apollo_triton.tools.demo.corpus import Corpus
from apollo_triton.tools.demo.training import RunConfig

from ..contenders import state_bytes
from ..report_data import mean_and_margin
from ..report_tables import table as markdown
from ..results_file import ROOT, Row, commit, source, version, write_whole
from .methods import ADAMW, APOLLO, FAST_ADAMW, MINI, Method, quarter
from .plan import SEEDS, VOCABULARY, best_rate, index_of, loss_of, next_index, rate_of
from .rows import Rows
from .run import BATCH, PACKAGES, SEQUENCE, Job, StudyRun, set_attention, train
from .text import CPP, PYTHON, corpus, held_out_text, text_versions, tokenizer

CHECKPOINT = ROOT / "runs" / "quality-checkpoint"
EXAMPLE_BYTES = 500_000  # of each text that is written for the example: a minute for it on a CPU
STEPS = 150  # of BATCH sequences: 300,000 tokens, one for each of the model's weights beside embeddings and head
TARGETS = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")  # the example's
LORA = "LoRA, rank width/4"


def _trained(model: nn.Module) -> list[Tensor]:
    return [weight for weight in model.parameters() if weight.requires_grad]


def _freeze_the_rest(model: nn.Module) -> None:
    for name, weight in model.named_parameters():
        weight.requires_grad_(any(target in name for target in TARGETS))


def _adamw(model: nn.Module, rate: float, seed: int) -> torch.optim.Optimizer:
    _freeze_the_rest(model)
    return torch.optim.AdamW(_trained(model), lr=rate, weight_decay=0.0, fused=True)


def _apollo(model: nn.Module, rate: float, seed: int) -> torch.optim.Optimizer:
    _freeze_the_rest(model)
    return APOLLOAdamW.apollo(model, quarter(model), lr=rate, seed=seed, target_modules=TARGETS)


def _mini(model: nn.Module, rate: float, seed: int) -> torch.optim.Optimizer:
    _freeze_the_rest(model)
    return APOLLOAdamW.mini(model, lr=rate, seed=seed, target_modules=TARGETS)


def _lora(model: nn.Module, rate: float, seed: int) -> torch.optim.Optimizer:
    """peft puts the adapters into the model, and freezes all else. Its alpha is twice the rank, as in the example."""
    peft = require("peft", "bench")
    rank = quarter(model)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        peft.get_peft_model(model, peft.LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=list(TARGETS)))
    return torch.optim.AdamW(_trained(model), lr=rate, weight_decay=0.0, fused=True)


METHODS = {
    ADAMW: Method(_adamw, 2e-3),
    LORA: Method(_lora, 4e-3),
    APOLLO: Method(_apollo, 2e-3),
    MINI: Method(_mini, 2e-3),
}


@dataclass(frozen=True)
class Tuning:
    """What determines a run, beside the checkpoint."""

    method: str
    rate: float
    seed: int = 0
    steps: int = STEPS
    batch: int = BATCH
    sequence: int = SEQUENCE

    @property
    def name(self) -> str:
        return f"{self.method}, rate {self.rate:.4g}, seed {self.seed}"


@dataclass(frozen=True)
class Start:
    """A trained model, the text that it knows, and the one that it is to learn. ``fingerprint`` is of the weights."""

    model: str
    weights: Mapping[str, Tensor]
    fingerprint: str
    known: Corpus
    new: Corpus


def make_checkpoint(folder: Path, job: Job) -> None:
    """Train ``job`` and write model, tokenizer and two texts to ``folder``; last ``run.json``, the job's row."""
    transformers = require("transformers", "bench")
    row, run = train(job)
    run.model.save_pretrained(folder)
    bpe = tokenizer(job.vocabulary)._tokenizer
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe).save_pretrained(folder)
    for name, language in ("python.txt", PYTHON), ("cpp.txt", CPP):
        text = held_out_text(language)[:EXAMPLE_BYTES].decode("utf-8", errors="replace")
        write_whole(folder / name, text)
    write_whole(folder / "run.json", json.dumps({"id": job.name, **row}))


def read_checkpoint(folder: Path) -> Start:
    """The model of ``make_checkpoint``, and both texts as tokens of its tokenizer."""
    transformers = require("transformers", "bench")
    row = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    weights = transformers.AutoModelForCausalLM.from_pretrained(folder).state_dict()
    digest = hashlib.sha256()
    for name in sorted(weights):
        digest.update(name.encode() + weights[name].numpy().tobytes())
    known, new = corpus(row["vocabulary"]), corpus(row["vocabulary"], CPP)
    return Start(row["model"], weights, digest.hexdigest()[:12], known, new)


def fine_tuned(job: Tuning, start: Start) -> Row:
    """Fine-tune. ``held_out_loss`` is of the new text, ``known_loss`` of the one that the model knew; a run that
    diverges has neither. Bytes are of tensors that are there after the last backward pass."""
    started = time.perf_counter()
    settings = (start.model, job.steps, job.batch, job.sequence, job.seed, "cpu", start.new.fingerprint)

    def build(config: RunConfig, model: nn.Module) -> Any:
        model.load_state_dict(start.weights)
        set_attention(model)
        return METHODS[job.method].build(model, job.rate, job.seed)

    run = StudyRun(RunConfig(job.method, job.rate, None, *settings), start.new, build)
    known = start.known.held_out_windows(job.sequence + 1)
    run.evaluate()
    known_before = run.mean_loss(known)
    while not run.finished:
        run.advance()
        if run.has_diverged:
            break
    if not run.has_diverged:
        run.evaluate()
    loss = run.history.held_out_loss.get(job.steps, math.nan)  # NaN too if the last step diverged
    has_loss = math.isfinite(loss)
    return {
        **asdict(job),
        "model": start.model,
        "checkpoint": start.fingerprint,
        "held_out_loss_before": run.history.held_out_loss[0],
        "held_out_loss": loss if has_loss else None,
        "known_loss_before": known_before,
        "known_loss": run.mean_loss(known) if has_loss else None,
        "trained_weights": sum(weight.numel() for weight in _trained(run.model)),
        "weight_bytes": sum(weight.nbytes for weight in run.model.parameters()),
        "gradient_bytes": sum(weight.grad.nbytes for weight in run.model.parameters() if weight.grad is not None),
        "state_bytes": state_bytes(run.optimizer)[0],
        "seconds": round(time.perf_counter() - started, 1),
        "texts": {PYTHON: start.known.fingerprint, CPP: start.new.fingerprint} | text_versions(),
        "versions": {package: version(package) for package in (*PACKAGES, "peft")},
        "source": source(),
        "commit": commit(),
    }


def next_job(rows: Iterable[Row]) -> Tuning | None:
    """The next run of the sweeps, or of the seeds at the best rates; None if all are there."""
    rows = list(rows)
    for method, made in METHODS.items():
        index = next_index(_sweep(rows, method))
        if index is not None:
            return Tuning(method, rate_of(made.first_rate, index), SEEDS[0])
        rate, runs = best_runs(rows, method)
        for seed in SEEDS:
            if seed not in runs:
                return Tuning(method, rate, seed)
    return None


def best_runs(rows: Iterable[Row], method: str) -> tuple[float, dict[int, Row]]:
    """The best rate of a method so far, and its runs by seed."""
    rows = list(rows)
    sweep = _sweep(rows, method)
    rate = rate_of(METHODS[method].first_rate, min(sweep, key=lambda index: sweep[index]))
    return rate, {row["seed"]: row for row in rows if row["method"] == method and row["rate"] == rate}


def _sweep(rows: Iterable[Row], method: str) -> dict[float, float]:
    return {
        index_of(METHODS[method].first_rate, row["rate"]): loss_of(row)
        for row in rows
        if row["method"] == method and row["seed"] == SEEDS[0]
    }


HEADS = ["best rate", "loss on C++", "against AdamW, %", "Python's loss rose by"]
HEADS += ["weights that have gradients", "gradients, bytes", "state, bytes", "both and all weights, bytes"]


def table(rows: Iterable[Row]) -> str:
    """Methods at their best rates: means over seeds with 95 % intervals, differences between equal seeds, exact bytes.

    A method without runs has no line. A run that diverged has no loss, and its method no mean.
    """
    rows = list(rows)
    lines = []
    for method in METHODS:
        if not _sweep(rows, method):
            continue
        rate, runs = best_runs(rows, method)
        losses = {seed: row["held_out_loss"] for seed, row in runs.items()}
        if None in losses.values():
            cells = ["diverged", "", ""]
        else:
            against = [] if method == ADAMW else _against_adamw(rows, losses)
            rises = [row["known_loss"] - row["known_loss_before"] for row in runs.values()]
            cells = [_shown(list(losses.values()), ".3f"), _shown(against, "+.2f"), _shown(rises, "+.3f")]
        row = next(iter(runs.values()))
        together = row["weight_bytes"] + row["gradient_bytes"] + row["state_bytes"]
        sizes = (row["trained_weights"], row["gradient_bytes"], row["state_bytes"], together)
        lines.append([method, f"{rate:g}", *cells, *(f"{size:,}" for size in sizes)])
    return markdown(["", *HEADS], lines)


def _against_adamw(rows: list[Row], losses: Mapping[int, float]) -> list[float]:
    """How far losses lie above AdamW's of the same seeds, in percent."""
    if not _sweep(rows, ADAMW):
        return []
    others = {seed: row["held_out_loss"] for seed, row in best_runs(rows, ADAMW)[1].items()}
    return [100 * (loss / others[seed] - 1) for seed, loss in losses.items() if others.get(seed)]


def _shown(values: list[float], form: str) -> str:
    """A mean and the half-width of its interval; "" without values."""
    if not values:
        return ""
    mean, margin = mean_and_margin(values)
    few = "" if len(values) == len(SEEDS) else f" ({len(values)} of {len(SEEDS)} seeds)"
    return f"{mean:{form}}" + ("" if margin is None else f" ± {margin:{form.lstrip('+')}}") + few


def main() -> None:
    argparse.ArgumentParser(
        "python -m bench.quality.fine_tuning", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    ).parse_args()
    torch.set_num_threads(1)
    if not (CHECKPOINT / "run.json").exists():
        rate = best_rate(Rows().all(), FAST_ADAMW, Job("", 0.0))
        if rate is None:
            raise SystemExit(
                f"the sweep of {FAST_ADAMW} is not finished in {Rows().path}: python -m bench.quality --stages sweep"
            )
        make_checkpoint(CHECKPOINT, Job(FAST_ADAMW, rate, vocabulary=VOCABULARY))
    start, rows = read_checkpoint(CHECKPOINT), Rows(file="quality_fine_tuning")
    others = {row["checkpoint"] for row in rows.all()} - {start.fingerprint}
    if others:
        raise SystemExit(
            f"{rows.path} has runs from the weights {', '.join(sorted(others))}, and those of {CHECKPOINT} are "
            f"{start.fingerprint}: move one of them away, since their losses do not compare"
        )
    while job := next_job(rows.all()):
        row = fine_tuned(job, start)
        rows.add(job, row)
        loss, known = row["held_out_loss"], row["known_loss"]
        shown = "diverged" if loss is None else f"{CPP} {loss:.4f}, {PYTHON} {known:.4f}"
        print(f"{job.name}: {shown} in {row['seconds']:.0f} s", flush=True)
    print(f"written to {rows.path}\n{table(rows.all())}")


if __name__ == "__main__":
    main()
