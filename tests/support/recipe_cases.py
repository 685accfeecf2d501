"""What the tests of the recipes (examples/pretrain_c4.py, examples/finetune_sft.py) share."""

from __future__ import annotations

import re
import sys
from argparse import Namespace
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from programs import ROOT

from apollo_triton.tools.llama import paper_figures

sys.path.append(str(ROOT / "examples"))  # where Python itself looks when it runs one of them

PAPER = paper_figures()["pretrain_hyperparameters"]
SIZES = {"60m": "60M", "130m": "130M", "350m": "350M", "350m_1024": "350M", "1b": "1B", "7b": "7B", "13b": "13B"}
TEXTS = [f"Document {number}: {'word ' * (7 * number % 23)}ends." for number in range(200)]
TINY = ["--layers=1", "--shrink=8", "--sequence=16", "--tokens-per-step=128", "--micro-batch=2", "--report=1"]
SMALL = ["--tokenizer=bytes", "--vocabulary=256", "--validation-tokens=64", "--evaluate-every=4", *TINY]
Run = Callable[..., str]


def options_of(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Namespace:
    from pretraining.options import parse_options

    monkeypatch.setattr(sys, "argv", ["pretrain_c4.py", *arguments])
    return parse_options(None)


def losses(output: str) -> dict[int, float]:
    return {int(step): float(loss) for step, loss in re.findall(r"^step +(\d+) +loss ([\d.]+) ", output, re.MULTILINE)}


def weights(folder: str) -> dict[str, torch.Tensor]:
    (path,) = Path(folder).glob("step-*/model.pt")
    return torch.load(path, weights_only=True)["model"]


def assert_same_bits(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    assert [name for name in ours if not torch.equal(ours[name], theirs[name])] == []
