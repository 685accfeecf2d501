"""One training run of the demo: a small LLaMA, an optimizer, the loss curve so far, and its checkpoint on disk."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.extras import require
from ...layerwise.handle import attach_layerwise
from ...optimizer import APOLLOAdamW
from ..llama import paper_figures
from .corpus import VOCABULARY, Corpus

EVALUATIONS = 20


class Size(NamedTuple):
    """The shape of a LLaMA."""

    hidden: int
    intermediate: int
    layers: int
    heads: int


# Two for CPUs, and the paper's (its table 11, the vocabulary apart).
SIZES = {"tiny": Size(32, 88, 2, 2), "1M": Size(192, 528, 2, 6)} | {
    name: Size(shape["hidden"], shape["intermediate"], shape["layers"], shape["heads"])
    for name, shape in paper_figures()["llama"].items()
}

OptimizerMaker = Callable[["Plan", torch.nn.Module], torch.optim.Optimizer]
LABELS = {"adamw": "AdamW", "apollo": "APOLLO", "mini": "APOLLO-Mini"}

# Of APOLLO and Mini: kept until the step, freed within backward, never made.
GRADIENTS = ("stored", "freed", "none")


@dataclass(frozen=True)
class Plan:
    """What decides a run's numbers. Two runs of one plan are equal bit for bit on one CPU; ``data`` is the text's
    fingerprint, ``scale`` is Mini's and None for the others. ``gradients`` is one of ``GRADIENTS``."""

    method: str
    learning_rate: float
    scale: float | None
    model: str
    steps: int
    batch: int
    sequence: int
    seed: int
    device: str
    data: str
    dtype: str = "float32"
    gradients: str = "stored"

    @property
    def evaluation_gap(self) -> int:
        return max(1, self.steps // EVALUATIONS)

    def learning_rate_at(self, step: int) -> float:
        """Linear warm-up over the first tenth of the steps, then a cosine down to a tenth (step is 1, 2, ...)."""
        warm_up = max(1, self.steps // 10)
        if step <= warm_up:
            return self.learning_rate * step / warm_up
        progress = (step - warm_up) / max(1, self.steps - warm_up)
        return self.learning_rate * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)


@dataclass
class History:
    """What a run has measured. ``training_loss`` has an entry a step; ``held_out_loss`` maps a step to the loss then;
    the seconds, an entry a step, are wall time and so not reproducible."""

    training_loss: list[float] = field(default_factory=list)
    held_out_loss: dict[int, float] = field(default_factory=dict)
    optimizer_seconds: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)


class Run:
    """A model being trained by ``plan`` on ``corpus``, with the optimizer that ``build`` makes of plan and model."""

    def __init__(self, plan: Plan, corpus: Corpus, build: OptimizerMaker | None = None) -> None:
        self.plan, self.corpus = plan, corpus
        self.step = 0
        self.history = History()
        model = make_model(plan.model, plan.sequence, plan.seed, corpus.vocabulary)
        self.model = model.to(plan.device, getattr(torch, plan.dtype))
        self.optimizer = (build or make_optimizer)(plan, self.model)
        if plan.gradients != "stored" and isinstance(self.optimizer, APOLLOAdamW):
            attach_layerwise(self.model, self.optimizer, gradients=plan.gradients)
        self._held_out = corpus.held_out_windows(plan.sequence + 1).to(plan.device)

    @property
    def finished(self) -> bool:
        return self.step >= self.plan.steps

    @property
    def evaluation_due(self) -> bool:
        """Whether the loss on the held-out text belongs to this step and is not known yet."""
        due = self.step % self.plan.evaluation_gap == 0 or self.finished
        return due and self.step not in self.history.held_out_loss

    def advance(self) -> None:
        """One step of training."""
        plan, started = self.plan, time.perf_counter()
        windows = self.corpus.batch(plan.seed, self.step, plan.batch, plan.sequence + 1).to(plan.device)
        for group in self.optimizer.param_groups:
            group["lr"] = plan.learning_rate_at(self.step + 1)
        self.optimizer.zero_grad()
        loss = self._loss(windows)
        loss.backward()
        self.history.training_loss.append(loss.item())
        self._wait()
        before = time.perf_counter()
        self.optimizer.step()
        self._wait()
        now = time.perf_counter()
        self.history.optimizer_seconds.append(now - before)
        self.history.step_seconds.append(now - started)
        self.step += 1

    @torch.no_grad()
    def evaluate(self) -> None:
        """Add the mean loss on the held-out text, in nats a token, to the history."""
        losses = [self._loss(windows).item() for windows in self._held_out.split(32)]
        self.history.held_out_loss[self.step] = sum(losses) / len(losses)

    def state_bytes(self) -> int:
        """Bytes of all tensors in the optimizer's state."""
        states = self.optimizer.state.values()
        return sum(value.nbytes for state in states for value in state.values() if isinstance(value, Tensor))

    def save(self, path: Path) -> None:
        """Write a checkpoint; whatever happens meanwhile, ``path`` holds the old one or the new one, whole."""
        unfinished = path.with_suffix(".tmp")
        torch.save(
            {
                "plan": asdict(self.plan),
                "step": self.step,
                "history": asdict(self.history),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            },
            unfinished,
        )
        os.replace(unfinished, path)

    def load(self, path: Path) -> None:
        """Continue from the checkpoint at ``path``; raises what ``read_checkpoint`` does."""
        saved = read_checkpoint(path, self.plan)
        self.step, self.history = saved["step"], History(**saved["history"])
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])

    def _loss(self, windows: Tensor) -> Tensor:
        logits = self.model(input_ids=windows[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())

    def _wait(self) -> None:
        if self.plan.device.startswith("cuda"):
            torch.cuda.synchronize()


def read_checkpoint(path: Path, plan: Plan) -> dict[str, Any]:
    """What ``Run.save`` wrote to ``path``.

    Raises ValueError if it cannot be read, or, naming what differs, if it is from another plan than ``plan``.
    """
    try:
        saved = torch.load(path, map_location=plan.device, weights_only=True)
    except OSError:
        raise
    except Exception as error:  # which one depends on the bytes: UnpicklingError, RuntimeError, EOFError, KeyError...
        raise ValueError(f"{path} is not a whole checkpoint; delete it, or leave --resume away") from error
    for name, value in asdict(plan).items():
        was = saved["plan"].get(name, getattr(Plan, name, None))  # a checkpoint may be older than an option
        if was != value:
            raise ValueError(
                f"{path} was made with {name.replace('_', ' ')} {was!r}, not {value!r}: "
                "resume with the same options, or leave --resume away to start anew, or choose another --out"
            )
    return saved


def make_model(name: str, sequence: int, seed: int, vocabulary: int = VOCABULARY) -> torch.nn.Module:
    """transformers' LLaMA of size ``name``, float32; the same weights whenever ``seed`` is the same."""
    # Nothing is downloaded; this keeps the library from so much as trying.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers = require("transformers", "demo")
    transformers.logging.set_verbosity_error()
    size = SIZES[name]
    config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=sequence,
        bos_token_id=None,
        eos_token_id=None,
        # The usual 0.02 suits widths of thousands. A narrow model then spends these few steps on a plateau: AdamW's
        # held-out loss after 200 steps was 2.56, and 2.15 with 0.06 (hidden 160, 3 layers).
        initializer_range=size.hidden**-0.5,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(config)


def make_optimizer(plan: Plan, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer of ``plan.method``: the paper's settings, without weight decay."""
    if plan.method == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=plan.learning_rate, weight_decay=0.0)
    options: dict[str, Any] = {"lr": plan.learning_rate, "update_proj_gap": 200, "seed": plan.seed}
    if plan.method == "apollo":
        return APOLLOAdamW.apollo(model, rank=SIZES[plan.model].hidden // 4, **options)
    return APOLLOAdamW.mini(model, scale=plan.scale, **options)
