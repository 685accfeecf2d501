"""docs/architectures.md: what "auto" makes low-rank of architectures of transformers, computed anew for each row."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import nn

from apollo_triton.core.coverage import coverage
from apollo_triton.core.kinds import EMBEDDING, HEAD, VECTOR
from apollo_triton.core.targets import Targets

transformers = pytest.importorskip("transformers")

PAGE = Path(__file__).parents[2] / "docs" / "architectures.md"
ROWS = re.findall(r"^\| `(\w+)` \| (.*) \|$", PAGE.read_text(), re.MULTILINE)
# One of each kind: names that the old default missed, fused experts, two-dimensional tables, encoders, images, sound.
# They take 2 s of one core together, all of them 10 s.
QUICK = {"LlamaForCausalLM", "GPTNeoXForCausalLM", "OPTForCausalLM", "GraniteMoeForCausalLM", "MambaForCausalLM"}
QUICK |= {"BertModel", "T5Model", "BartModel", "ViTModel", "ConvNextModel", "SamModel", "WhisperModel"}
# What the paper trains, and its like: "auto" is to be the same there as the names were.
AS_BEFORE = {"LlamaForCausalLM", "Qwen3ForCausalLM", "Gemma3ForCausalLM", "MistralForCausalLM", "Qwen3MoeForCausalLM"}


def model_of(name: str) -> nn.Module:
    """The model of a class with its default configuration: the size that its authors released first."""
    kind = getattr(transformers, name)
    with torch.device("meta"):
        return kind(kind.config_class())


def row_of(model: nn.Module) -> list[str]:
    """The cells: parameters, the share of low-rank elements by names and by "auto" at rank 1, and what stays dense."""
    by_names, auto = (coverage(model, Targets(model, targets), 1, {}) for targets in (["attn", "mlp"], "auto"))
    sizes = {key: weight.tensor.numel() for key, weight in auto.weights.items()}
    counted = {key for key, weight in auto.weights.items() if weight.kind not in (EMBEDDING, HEAD, VECTOR)}
    shares = [sum(sizes[key] for key in counted & set(found.low_rank)) for found in (by_names, auto)]
    dense: dict[str, int] = {}
    for key in counted - set(auto.low_rank):
        *modules, own = (part for part in auto.weights[key].name.split(".") if not part.isdigit())
        name = modules[-1] if own == "weight" else own if modules[-2:-1] != ["parametrizations"] else modules[-3]
        dense[name] = dense.get(name, 0) + sizes[key]
    largest = sorted(dense, key=lambda name: (-dense[name], name))[:3]
    total = sum(map(sizes.get, counted))
    return [
        f"{sum(sizes.values()) / 1e6:,.0f} M",
        *(f"{share / total:.1%}".replace("%", " %") for share in shares),
        ", ".join(f"`{name}`" for name in largest) or "-",
    ]


def test_the_table_is_long_enough():
    assert len(ROWS) >= 50
    assert {name for name, _ in ROWS} >= QUICK | AS_BEFORE


@pytest.mark.parametrize(
    ("name", "cells"),
    [pytest.param(*row, id=row[0], marks=[] if row[0] in QUICK else pytest.mark.full) for row in ROWS],
)
def test_a_row_of_the_table_is_what_the_code_does(name, cells):
    """A change of the rules that makes a table of positions low-rank, or half of a model dense."""
    model = model_of(name)
    assert row_of(model) == cells.split(" | ")
    by_names, auto = (
        coverage(source, Targets(source, targets), rank, {}).low_rank
        for source, targets, rank in ((model, ["attn", "mlp"], 256), (model, "auto", 256))
    )
    assert name not in AS_BEFORE or by_names == auto
    named = list(model.named_parameters())
    from_names = set(coverage(named, Targets(named, "auto"), 256, {}).low_rank.values())
    # of CTRL's `w` and the like names do not tell that they are embeddings
    assert from_names == set(auto.values())
