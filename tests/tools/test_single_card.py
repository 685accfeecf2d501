"""The recipe's table: the parts against tensors counted here, what they add up to, and how it is printed."""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import pytest
import torch

from apollo_triton import APOLLOAdamW, quantize_model
from apollo_triton.backends.reference import dense_8bit
from apollo_triton.tools import options
from apollo_triton.tools.llama import meta_model
from apollo_triton.tools.memory import command as memory
from apollo_triton.tools.memory import single_card
from apollo_triton.tools.memory.activations import Allocations, training_peak
from apollo_triton.tools.memory.count import apollo_mini

transformers = pytest.importorskip("transformers")

# 7B: attention and MLP of 32 layers; two embeddings of 32000 and 65 norms.
INT8 = 32 * (4 * 4096 * 4096 + 3 * 4096 * 11008)
OTHERS = 2 * 32000 * 4096 + 65 * 4096


def call(*arguments):
    parser = argparse.ArgumentParser()
    options.memory(parser)
    return memory.run(parser.parse_args(["--single-card", *arguments]))


@pytest.fixture(scope="module")
def seven():
    return single_card.count("7B")


@pytest.mark.slow
def test_the_parts_of_7b_counted_by_hand(seven):
    """A part that is missing or counted twice, the wrong dtype, a gradient that is not the head's."""
    channels = 32 * (4 * 4096 + 3 * 11008)  # rank 1: two moments a channel of the longer side
    matrices, tensors = 32 * 7, 2 + 65
    assert seven.parts["int8 weights"] == INT8
    assert seven.parts["their scales and zero points"] == INT8 // 128 * (4 + 1)
    assert seven.parts["other weights"] == 2 * OTHERS
    # Moments of rank 1 and of norms in float32, the others in a byte and a float32 for 256; a step and an update_norm
    # in float32 a matrix, a step alone for the rest.
    norms = 65 * 4096
    assert seven.parts["optimizer state of int8 weights"] == 2 * 4 * channels + 8 * matrices
    in_8_bits = 2 * (OTHERS - norms) + 2 * 4 * (OTHERS - norms) // 256
    assert seven.parts["optimizer state of the others"] == in_8_bits + 2 * 4 * norms + 4 * tensors
    assert seven.parts["gradients of weights at the peak"] == 2 * 32000 * 4096
    # Inputs of 32 checkpoints and of what comes after, [256, 4096] in bfloat16, some of them in float32.
    inputs = 33 * 2 * 256 * 4096
    assert inputs < seven.parts["activations kept by the forward"] < inputs + 5 * 4 * 256 * 4096
    # The gradient of the logits alone, once the float32 one is gone.
    assert 2 * 256 * 32000 < seven.parts["activations of the backward"] < 3 * 2 * 256 * 32000
    assert seven.total == sum(seven.parts.values())


@pytest.mark.slow
def test_activations_and_state_are_those_of_their_own_modules(seven):
    peak = training_peak(meta_model("7B"), 1, 256)
    assert peak.total == sum(list(seven.parts.values())[-4:-1])
    assert peak.activations == sum(list(seven.parts.values())[-3:-1])
    state = apollo_mini(quantize_model(meta_model("7B")), **single_card.OPTIONS).state
    assert state == seven.parts["optimizer state of int8 weights"] + seven.parts["optimizer state of the others"]


@pytest.mark.slow
def test_an_update_takes_in_passing_what_is_said(seven):
    """Storages that live during the worst kind of update, of bfloat16 rounded stochastically, on real tensors."""
    pytest.importorskip("bitsandbytes")
    weight = torch.nn.Parameter(torch.ones(2, dense_8bit.CHUNK, dtype=torch.bfloat16))
    weight.grad = torch.ones_like(weight)
    optimizer = APOLLOAdamW([weight], state_bits=8, stochastic_rounding=True)
    optimizer.step()
    with Allocations(torch.nn.Module(), layerwise=False) as allocations:
        optimizer.step()
    # On a device old moments are held besides, 2 bytes an element: nearly half a buffer.
    assert 0.8 < (allocations.peak().total + 2 * dense_8bit.CHUNK) / seven.parts["in passing, by an update"] <= 1


@pytest.mark.slow
def test_options_and_shapes_go_through():
    plain = single_card.count("60M")
    wide = single_card.count("60M", state_dtype=torch.float32)
    others = "optimizer state of the others"
    assert 3.9 < wide.parts[others] / plain.parts[others] < 4
    rows = single_card.count("60M", state_bits=8, embeddings="rows")  # a table [32000, 512]: docs/options.md
    assert rows.parts[others] == 2 * (512 * 32000 * 65 // 64 + 4 * 32000 + 4) + 17 * (8 * 512 + 4)
    assert "checkpointed layers, embeddings='rows'" in " ".join(single_card.text(rows).split())
    longer = single_card.count("60M", batch=2, sequence=512, dtype=torch.float32)
    assert longer.parts["other weights"] == 2 * plain.parts["other weights"]
    assert longer.parts["int8 weights"] == plain.parts["int8 weights"]
    activations = "activations kept by the forward"
    assert longer.parts[activations] > 4 * plain.parts[activations]
    assert (longer.batch, longer.sequence, longer.dtype) == (2, 512, "float32")


@pytest.mark.slow
def test_the_table_adds_up_and_fits_a_small_terminal(capsys, seven):
    assert call() == 0
    output = capsys.readouterr().out
    lines = output.splitlines()
    assert max(map(len, lines)) <= 79
    start = next(number for number, line in enumerate(lines) if line.split() == ["bytes", "GB"]) + 1
    table = dict(line.rsplit(maxsplit=2)[:2] for line in lines[start : start + 10])
    sizes = {name: int(size.replace(",", "")) for name, size in table.items()}
    total = sizes.pop("total")
    assert sizes == seven.parts
    assert total == sum(sizes.values())
    left = [f"Leaves {(card * 10**9 - total) / 1e9:.2f} of {card} GB." for card in (11, 12)]
    assert " ".join(left) in " ".join(output.split())


def test_the_table_of_the_documentation_is_the_commands(seven):
    text = (Path(__file__).parents[2] / "docs" / "int8.md").read_text(encoding="utf-8")
    shown = text.partition("<!-- single card -->")[2].partition("<!-- end of single card -->")[0].strip().strip("`")
    assert shown.strip("\n") == single_card.text(seven).split("\n\n")[1]


@pytest.mark.slow
def test_json_is_exact_and_takes_models_and_shapes(capsys):
    assert call("--json", "--model", "60M", "130M", "--batch", "2", "--sequence", "64") == 0
    reports = json.loads(capsys.readouterr().out)
    for report, model in zip(reports, ("60M", "130M"), strict=True):
        counted = single_card.count(model, batch=2, sequence=64)
        shape = {"model": model, "batch": 2, "sequence": 64, "dtype": "bfloat16"}
        assert report == shape | {"parts": counted.parts, "total": sum(report["parts"].values())}


def test_what_does_not_fit_is_said():
    parts = {"int8 weights": 11_500_000_000}
    text = single_card.text(single_card.SingleCard("x", 1, 256, "bfloat16", parts))
    assert "Does not fit 11 GB. Leaves 0.50 of 12 GB." in text


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--batch", "0"], r"batch=0 \(allowed: 1 or more\)"),
        (["--batch", "1000000", "--sequence", "1000000"], r"sequence=1000000 \(allowed: up to 134,217,728 tokens\)"),
        (["--rank", "4"], "--single-card has the recipe's own settings: leave out --rank"),
        (["--state-dtype", "float32"], "leave out --state-dtype"),
        (["--paper"], "--paper has the paper's own settings: leave out --single-card"),
        (["--model", "70M"], "unknown model '70M'"),
    ],
)
def test_options_that_do_not_go_together(arguments, message):
    with pytest.raises(ValueError, match=message):
        call(*arguments)


def test_a_shape_needs_the_option_that_runs_a_step():
    parser = argparse.ArgumentParser()
    options.memory(parser)
    with pytest.raises(ValueError, match="only --single-card runs a step: leave out --sequence"):
        memory.run(parser.parse_args(["--sequence", "64"]))


def test_a_model_without_a_language_head_is_refused(tmp_path):
    config = transformers.ViTConfig(hidden_size=32, num_hidden_layers=1, num_attention_heads=2, intermediate_size=64)
    config.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="a ViTModel takes no input_ids and labels"):
        single_card.count(str(tmp_path))
