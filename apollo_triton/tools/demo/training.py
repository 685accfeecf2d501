"""One training run of the demo: a small LLaMA, an optimizer, the loss curve so far, and its checkpoint on disk."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ...core.extras import require
from ...core.messages import shown
from ...layerwise.handle import attach_layerwise
from ...optimizer import APOLLOAdamW
from .. import checkpoints
from ..llama import paper_figures
from .corpus import VOCABULARY, Corpus

EVALUATIONS = 20
REMEDY = "delete it, or leave --resume away, which begins anew"


class Size(NamedTuple):
    """The shape of a LLaMA."""

    hidden: int
    intermediate: int
    layers: int
    heads: int


# Three sizes for CPUs, and the paper's (its table 11, except the vocabulary).
SIZES = {"tiny": Size(32, 88, 2, 2), "0.3M": Size(96, 224, 3, 3), "1M": Size(192, 528, 2, 6)} | {
    name: Size(shape["hidden"], shape["intermediate"], shape["layers"], shape["heads"])
    for name, shape in paper_figures()["llama"].items()
}

OptimizerMaker = Callable[["RunConfig", torch.nn.Module], torch.optim.Optimizer]
LABELS = {"adamw": "AdamW", "apollo": "APOLLO", "mini": "APOLLO-Mini"}

# Gradients of APOLLO and Mini: kept until the step, freed within backward, or never formed.
GRADIENTS = ("stored", "freed", "none")


@dataclass(frozen=True)
class RunConfig:
    """Everything that determines a run's results. Two runs of one config on one CPU are equal bit for bit.

    ``data`` is the text's fingerprint. ``scale`` is APOLLO's and Mini's, and None for AdamW. ``gradients`` is one of
    ``GRADIENTS``.
    """

    method: str
    learning_rate: float
    scale: float | str | None
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
        """The learning rate of ``step`` (1, 2, ...): linear warm-up over a tenth of the steps, then a cosine to a
        tenth."""
        warm_up = max(1, self.steps // 10)
        if step <= warm_up:
            return self.learning_rate * step / warm_up
        progress = (step - warm_up) / max(1, self.steps - warm_up)
        return self.learning_rate * (0.1 + 0.9 * (1 + math.cos(math.pi * progress)) / 2)


@dataclass
class History:
    """What a run has measured. ``training_loss`` and the seconds have one entry per step; ``held_out_loss`` maps a step
    to the loss then. Losses are in nats per token. Seconds are wall time, so they are not reproducible."""

    training_loss: list[float] = field(default_factory=list)
    held_out_loss: dict[int, float] = field(default_factory=dict)
    optimizer_seconds: list[float] = field(default_factory=list)
    step_seconds: list[float] = field(default_factory=list)


class Run:
    """A model being trained by ``config`` on ``corpus``, with the optimizer that ``build`` makes of config and
    model."""

    def __init__(self, config: RunConfig, corpus: Corpus, build: OptimizerMaker | None = None) -> None:
        self.config, self.corpus = config, corpus
        self.step = 0
        self.history = History()
        model = make_model(config.model, config.sequence, config.seed, corpus.vocabulary)
        self.model = model.to(config.device, getattr(torch, config.dtype))
        self.optimizer = (build or make_optimizer)(config, self.model)
        if config.gradients != "stored" and isinstance(self.optimizer, APOLLOAdamW):
            attach_layerwise(self.model, self.optimizer, gradients=config.gradients)
        self._held_out = corpus.held_out_windows(config.sequence + 1).to(config.device)

    @property
    def finished(self) -> bool:
        return self.step >= self.config.steps

    @property
    def evaluation_due(self) -> bool:
        """Whether the loss on the held-out text is to be measured at this step, and has not been yet."""
        due = self.step % self.config.evaluation_gap == 0 or self.finished
        return due and self.step not in self.history.held_out_loss

    def advance(self) -> None:
        """One step of training."""
        config, started = self.config, time.perf_counter()
        windows = self.corpus.batch(config.seed, self.step, config.batch, config.sequence + 1).to(config.device)
        self._set_rate(config.learning_rate_at(self.step + 1))
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

    def evaluate(self) -> None:
        """Add the mean loss on the held-out text, in nats a token, to the history."""
        self.history.held_out_loss[self.step] = self.mean_loss(self._held_out)

    @torch.no_grad()
    def mean_loss(self, windows: Tensor) -> float:
        """The mean loss on ``windows [count, length]`` of a text, in nats a token."""
        losses = [self._loss(part).item() for part in windows.split(32)]
        return sum(losses) / len(losses)

    def state_bytes(self) -> int:
        """Bytes of all tensors in the optimizer's state."""
        states = self.optimizer.state.values()
        return sum(value.nbytes for state in states for value in state.values() if isinstance(value, Tensor))

    def save(self, path: Path) -> None:
        """Write a checkpoint. If the program dies meanwhile, ``path`` still holds the whole old one or the whole new
        one."""
        checkpoints.save(
            path,
            {
                "config": asdict(self.config),
                "step": self.step,
                "history": asdict(self.history),
                "model": self.model.state_dict(),
                "optimizer": self.optimizer.state_dict(),
            },
        )

    def load(self, path: Path) -> None:
        """Continue from the checkpoint at ``path``. Raises ValueError as ``read_checkpoint`` does, and if its weights
        or its state do not fit."""
        saved = read_checkpoint(path, self.config)
        try:
            self.model.load_state_dict(saved["model"])
            self.optimizer.load_state_dict(saved["optimizer"])
        except Exception as error:  # of any type, since the dictionaries may hold anything
            raise ValueError(f"{path} does not fit this run ({checkpoints.first_line(error)}); {REMEDY}") from error
        self.step, self.history = saved["step"], History(**saved["history"])

    def _set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = rate

    def _loss(self, windows: Tensor) -> Tensor:
        logits = self.model(input_ids=windows[:, :-1], use_cache=False).logits
        return torch.nn.functional.cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())

    def _wait(self) -> None:
        if self.config.device.startswith("cuda"):
            torch.cuda.synchronize()


def read_checkpoint(path: Path, config: RunConfig) -> dict[str, Any]:
    """What ``Run.save`` wrote to ``path``.

    Raises ValueError if it is damaged or no checkpoint of the demo, and if its config is not ``config``. The text, one
    line, names the file and what differs.
    """
    kinds = {"config": dict, "step": int, "history": dict, "model": dict, "optimizer": dict}
    saved = checkpoints.load(path, kinds, REMEDY, config.device)
    for name, value in asdict(config).items():
        was = saved["config"].get(name, getattr(RunConfig, name, None))  # an older checkpoint may lack an option
        if type(was) is not type(value) or was != value:
            raise ValueError(
                f"{path} was made with {name.replace('_', ' ')} {shown(was)}, not {value!r}: "
                "resume with the same options, or leave --resume away to start anew, or choose another --out"
            )
    if not 0 <= saved["step"] <= config.steps or not _is_history(saved["history"], saved["step"]):
        raise ValueError(
            f"{path} is no checkpoint of the demo: its losses are not those of {saved['step']} steps; {REMEDY}"
        )
    return saved


def _is_history(saved: dict[str, Any], step: int) -> bool:
    """Whether ``saved`` is a ``History`` of so many steps."""
    evaluated = saved.get("held_out_loss")
    if saved.keys() != {each.name for each in fields(History)} or not isinstance(evaluated, dict):
        return False
    curves = [saved[name] for name in saved.keys() - {"held_out_loss"}]
    return (
        all(isinstance(curve, list) and len(curve) == step for curve in curves)
        and all(type(value) is float for curve in [*curves, evaluated.values()] for value in curve)
        and all(type(at) is int and 0 <= at <= step for at in evaluated)
    )


def make_model(name: str, sequence: int, seed: int, vocabulary: int = VOCABULARY) -> torch.nn.Module:
    """transformers' LLaMA of size ``name``, in float32. The same ``seed`` gives the same weights."""
    # Nothing is downloaded. This keeps the library from trying to.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    transformers = require("transformers", "demo")
    transformers.logging.set_verbosity_error()
    size = SIZES[name]
    llama_config = transformers.LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=size.hidden,
        intermediate_size=size.intermediate,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        max_position_embeddings=sequence,
        bos_token_id=None,
        eos_token_id=None,
        # The usual 0.02 suits widths of thousands. A narrow model would spend its few steps on a plateau: AdamW's
        # held-out loss after 200 steps was 2.56 with 0.02 and 2.15 with 0.06 (hidden 160, 3 layers).
        initializer_range=size.hidden**-0.5,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return transformers.LlamaForCausalLM(llama_config)


def make_optimizer(config: RunConfig, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer of ``config.method``, with the paper's settings apart from ``scale``, and no weight decay."""
    if config.method == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=config.learning_rate, weight_decay=0.0)
    options: dict[str, Any] = {"lr": config.learning_rate, "scale": config.scale, "seed": config.seed}
    if config.method == "apollo":
        return APOLLOAdamW.apollo(model, rank=SIZES[config.model].hidden // 4, **options)
    return APOLLOAdamW.mini(model, **options)
