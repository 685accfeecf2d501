"""One run of the study: a LLaMA trained from random weights by one optimizer at one rate, and its row.

Products are in bfloat16 (autocast), weights in float32. On a CPU a run has one thread, and the loss is compiled, which
makes it twice as fast. Seed, batches and initial weights are the same for all methods.
"""

from __future__ import annotations

import functools
import math
import time
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apollo_triton.tools.demo.corpus import Corpus
from apollo_triton.tools.demo.training import Run, RunConfig, make_model

from ..contenders import state_bytes
from ..pretrain_data import load_tokens
from ..results_file import Row, commit, source, version
from .methods import RATE_FACTOR
from .text import corpus, text_versions
from .variants import VARIANTS

# The model that two cores can train to 20 tokens a weight: 0.305 million weights beside embeddings and head.
SMALL = "0.3M"
SEQUENCE = 128
BATCH = 16  # sequences of SEQUENCE tokens; the paper's sizes take the batch of the command line
TOKENS_A_WEIGHT = 20
PACKAGES = ("torch", "apollo-triton", "transformers", "apollo-torch", "galore-torch", "bitsandbytes")
LARGEST_DATA = 4000.0  # megabytes of ``--data`` that are read
LENGTHS = {"full": 1.0, "half": 0.5, "fifth": 0.2, "tenth": 0.1}  # shares of TOKENS_A_WEIGHT


@dataclass(frozen=True)
class Job:
    """What determines a run. ``length`` is a key of ``LENGTHS``."""

    method: str
    rate: float
    length: str = "full"
    seed: int = 0
    vocabulary: int = 2048
    model: str = SMALL
    batch: int = BATCH
    sequence: int = SEQUENCE
    tokens_a_weight: float = TOKENS_A_WEIGHT
    data: str = ""  # a file or folder of text, in place of ``text.py``'s

    @property
    def name(self) -> str:
        """What ``--row`` takes. It says what differs from the usual model and batches."""
        name = f"{self.method}, rate {self.rate:.4g}, {self.length} run, vocabulary {self.vocabulary}, seed {self.seed}"
        usual = {field.name: field.default for field in fields(Job)}
        kept = ("model", "batch", "sequence", "tokens_a_weight", "data")
        return name + "".join(f", {key} {value}" for key in kept if (value := getattr(self, key)) != usual[key])

    @property
    def steps(self) -> int:
        """Enough for ``tokens_a_weight`` of ``length`` for each weight beside embeddings and head."""
        tokens = body_weights(self.model) * self.tokens_a_weight * LENGTHS[self.length]
        return max(1, round(tokens / (self.batch * self.sequence)))


@functools.cache
def body_weights(model: str) -> int:
    """The weights of a model beside embeddings and head."""
    with torch.device("meta"):
        made = make_model(model, SEQUENCE, 0)
    return sum(weight.numel() for name, weight in made.named_parameters() if "embed" not in name and "head" not in name)


class StudyRun(Run):
    """The demo's run with products in bfloat16, compiled on a CPU, and with groups whose rates are a factor apart."""

    def _set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate * group.get(RATE_FACTOR, 1.0)

    def _loss(self, windows: Tensor) -> Tensor:
        device = windows.device.type
        with torch.autocast(device, torch.bfloat16):
            return (_compiled if device == "cpu" else _loss)(self.model, windows)

    @property
    def has_diverged(self) -> bool:
        return not math.isfinite(self.history.training_loss[-1])


def _loss(model: nn.Module, windows: Tensor) -> Tensor:
    logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


_compiled = torch.compile(_loss)


@functools.cache
def _corpus(vocabulary: int, data: str) -> Corpus:
    return load_tokens(Path(data), vocabulary, LARGEST_DATA) if data else corpus(vocabulary)


def train(job: Job, device: str = "cpu") -> tuple[Row, Run]:
    """Train to the end. Returns the row, and the run with the trained model. A run that diverges has no loss."""
    if device == "cpu":
        torch.set_num_threads(1)
    text = _corpus(job.vocabulary, job.data)
    settings = (job.model, job.steps, job.batch, job.sequence, job.seed, device, text.fingerprint)
    config = RunConfig(job.method, job.rate, None, *settings)
    started = time.perf_counter()
    run = StudyRun(config, text, lambda config, model: _prepared(job, model))
    while not run.finished:
        run.advance()
        if run.has_diverged:
            break
        if run.evaluation_due:
            run.evaluate()
    losses = {step: loss for step, loss in run.history.held_out_loss.items() if math.isfinite(loss)}
    row: Row = {
        **asdict(job),
        "steps": job.steps,
        "tokens": (tokens := job.steps * job.batch * job.sequence),
        "epochs": round(tokens / len(text.train), 3),
        "held_out_loss": losses.get(job.steps),
        "curve": {str(step): round(loss, 5) for step, loss in losses.items()},
        "state_bytes": state_bytes(run.optimizer)[0],
        "seconds": round(time.perf_counter() - started, 1),
        "text": {"fingerprint": text.fingerprint, "tokens": len(text.train)} | ({} if job.data else text_versions()),
        "versions": {package: version(package) for package in PACKAGES},
        "source": source(),
        "commit": commit(),
    }
    return row, run


def row_of(job: Job, device: str) -> Row:
    """The row of ``train``."""
    return train(job, device)[0]


def set_attention(model: nn.Module) -> None:
    """Plain products are 1.5 times as fast as PyTorch's fused attention for so short sequences on a CPU."""
    if not next(model.parameters()).is_cuda:
        model.config._attn_implementation = "eager"  # type: ignore[union-attr]


def _prepared(job: Job, model: nn.Module) -> Any:
    set_attention(model)
    return VARIANTS[job.method].build(model, job.rate, job.seed)
