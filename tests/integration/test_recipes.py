"""The paper's recipes: configs against the paper's figures, training, resume, ranks. Models have one layer, and narrow
ones where a whole one is too heavy for a CPU; their whole shapes are checked on the meta device."""

from __future__ import annotations

import json
import math
import re
import runpy
import socket
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from distributed_cases import needs_fsdp_on_a_cpu
from pictures import check_picture, record_figures
from programs import ROOT, ended_well, run_program
from recipe_cases import PAPER, SIZES, SMALL, Run, assert_same_bits, losses, options_of, weights

from apollo_triton.tools import checkpoints as files
from apollo_triton.tools.llama import meta_model, paper_figures

pytest.importorskip("transformers")
pytest.importorskip("datasets")
from pretraining import checkpoints, model
from pretraining.options import known_configs
from pretraining.reports import LABELS

# The configs


def test_there_is_a_config_for_every_recipe() -> None:
    assert set(known_configs()) == {*SIZES, "7b_one_card"}
    assert {*SIZES.values()} == {*paper_figures()["llama"]}


METHODS = ("apollo", "mini", "q-apollo", "q-mini")


@pytest.mark.parametrize("config", SIZES)
@pytest.mark.parametrize("method", METHODS)
def test_a_config_has_the_papers_figures(config: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A figure that was mistyped, or a default of the optimizer's that is not the paper's."""
    size = SIZES[config]
    given = [] if size in PAPER["steps"] else ["--steps=5"]
    options = options_of(monkeypatch, f"--config={config}", f"--method={method}", *given)
    assert options.model == size
    assert options.steps == PAPER["steps"].get(size, 5)
    assert options.tokens_per_step == PAPER["tokens_per_step"]
    assert options.sequence == (1024 if config == "350m_1024" else PAPER["sequence"])
    assert options.tokens_per_step // options.sequence == (128 if config == "350m_1024" else 512)
    assert (options.data, options.data_config, options.tokenizer) == ("allenai/c4", "en", "t5-base")
    low_rank, *dense = model.make_optimizer(meta_model(size), options).param_groups
    assert {group["lr"] for group in (low_rank, *dense)} == {PAPER["lr"]}
    assert {group["weight_decay"] for group in (low_rank, *dense)} == {PAPER["weight_decay"]}
    assert low_rank["max_grad_norm"] is None  # 0 in the paper's words
    assert PAPER["grad_clip"] == 0
    assert low_rank["update_proj_gap"] == PAPER["update_proj_gap"]
    assert low_rank["disable_nl"] is False  # its 1.01 is not an option; tests/optimizer/test_algorithm.py holds it
    mini = method.endswith("mini")
    assert low_rank["rank"] == (1 if mini else paper_figures()["rank"].get(size, 256))
    assert low_rank["scale"] == PAPER["scale_mini" if mini else "scale_apollo"]
    assert low_rank["scale_type"] == ("tensor" if mini else "channel")


@pytest.mark.parametrize("config", SIZES)
def test_the_model_has_the_papers_shape(config: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A head that is tied, heads that share keys, a size that goes astray on its way through config.json."""
    options = options_of(monkeypatch, f"--config={config}", "--steps=5")
    model.llama_config(options).save_pretrained(tmp_path)
    shape = paper_figures()["llama"][SIZES[config]]
    hidden, wide, layers = shape["hidden"], shape["intermediate"], shape["layers"]
    # Four attention and three MLP matrices and two norms a layer; embedding, head and the last norm.
    expected = layers * (4 * hidden**2 + 3 * hidden * wide + 2 * hidden) + 2 * shape["vocab"] * hidden + hidden
    found = meta_model(str(tmp_path / "config.json"))
    assert sum(parameter.numel() for parameter in found.parameters()) == expected
    assert found.config.num_attention_heads == shape["heads"]
    assert found.config.max_position_embeddings >= options.sequence


def test_the_learning_rate_is_the_papers() -> None:
    """A schedule that is a step late, does not reach its peak or its end."""
    factor = runpy.run_path(str(ROOT / "examples" / "pretrain_c4.py"))["learning_rate_factor"]
    warmup, end = int(1000 * PAPER["warmup_fraction"]), PAPER["final_fraction"]
    assert factor(1, 1000) == 1 / warmup
    assert factor(warmup, 1000) == 1
    assert factor(warmup + (1000 - warmup) // 2, 1000) == pytest.approx((1 + end) / 2)
    assert factor(1000, 1000) == pytest.approx(end)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", [pytest.param(name, marks=() if name in ("60m", "1b") else pytest.mark.full) for name in SIZES]
)
def test_each_config_trains(config: str, run: Run) -> None:
    """A shape that the optimizer or the model cannot take. One layer; whole widths up to 350M, an eighth above; all
    32000 tokens at 60M, 256 above."""
    size = SIZES[config]
    narrow = [] if size in ("60M", "130M", "350M") else ["--shrink=8"]
    vocabulary = 32000 if size == "60M" else 256
    tokens = 1024 if config == "350m_1024" else 256
    few = [f"--vocabulary={vocabulary}", "--layers=1", f"--tokens-per-step={tokens}", "--steps=2", "--report=1"]
    output = run(f"--config={config}", "--data=texts.jsonl", "--tokenizer=bytes", *few, *narrow, "--evaluate-every=0")
    first, second = losses(output).values()
    assert abs(first - math.log(vocabulary)) < 0.5, output
    assert second < first


@pytest.mark.slow
@pytest.mark.parametrize(
    "method",
    ["apollo", "q-mini", *(pytest.param(name, marks=pytest.mark.full) for name in ("mini", "q-apollo", "adamw"))],
)
def test_each_method_learns_and_goes_on_bit_for_bit(method: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A part of the state that is not saved, a schedule or data that begin again, a report that says so wrongly, a
    picture that is none (see ``check_picture``)."""
    figures = record_figures(monkeypatch)
    same = ["--config=60m", f"--method={method}", "--data=texts.jsonl", "--steps=8", *SMALL]
    whole = run(*same, "--folder=whole")
    first = run(*same, "--folder=parts", "--until=3")
    second = run(*same, "--folder=parts")
    assert losses(first) | losses(second) == losses(whole)
    assert list(losses(second)) == [4, 5, 6, 7, 8]
    assert_same_bits(weights("parts"), weights("whole"))
    assert losses(whole)[8] < losses(whole)[1] - 0.3
    perplexity = re.findall(r"^step +8 +validation loss ([\d.]+) +perplexity ([\d.]+) ", whole, re.MULTILINE)
    assert [float(value) for value in perplexity[0]] == [
        pytest.approx(math.log(float(perplexity[0][1])), abs=1e-3),
        float(perplexity[0][1]),
    ]
    assert (Path("whole") / "loss.png").stat().st_size > 5000
    check_picture(figures["loss"], {LABELS[method]})
    title, about = (text.get_text() for text in figures["loss"].texts)
    assert title == f"Loss of {LABELS[method]}: lower is better"
    assert all(part in about for part in ("LLaMA 60M", "seed 0", "tokens a step", "float"))
    assert ("rank" in about) == method.endswith("apollo")


def test_layerwise_updates_with_accumulation_change_nothing(run: Run) -> None:
    """Weights that move in the middle of a step, or gradients of which only the last part counts."""
    same = ["--config=60m", "--data=texts.jsonl", "--steps=4", *SMALL]
    run(*same, "--folder=plain")
    run(*same, "--folder=layerwise", "--gradients=freed")
    assert_same_bits(weights("layerwise"), weights("plain"))


def test_the_micro_batch_changes_nothing_but_rounding(run: Run) -> None:
    """A sum of gradients where their mean is wanted, or a batch that is left out."""
    same = ["--config=60m", "--data=texts.jsonl", "--steps=4", *SMALL]
    output = run(*same, "--folder=parts")
    assert losses(run(*same, "--folder=one", "--micro-batch=8")) == pytest.approx(losses(output), abs=2e-4)


# Several processes


COMMON = ["--config=60m", "--data=texts.jsonl", "--steps=6", *SMALL]
# The ranks are forked, so that the libraries, which take most of the time, are imported once.
RANKS = """
import json, os, runpy, signal, sys
import bitsandbytes, torch._dynamo, transformers.models.llama.modeling_llama
program, runs = sys.argv[1], json.loads(sys.argv[2])
sys.path.insert(0, os.path.dirname(program))
runpy.run_path(program)
started = []
for rank in (0, 1):
    started.append(os.fork())
    if started[-1] == 0:
        break
if started[-1] == 0:
    signal.alarm(300)  # as the parent, which cannot end them
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    sys.stdout = open(f"printed-{rank}", "w")
    for port, arguments in runs:
        os.environ["MASTER_PORT"] = str(port)
        sys.argv = [program, *arguments]
        runpy.run_path(program, run_name="__main__")
        print("---", flush=True)
else:
    sys.exit(any([os.waitpid(process, 0)[1] for process in started]))
"""


def on_two_ranks(folder: Path, runs: dict[str, list[str]]) -> dict[str, str]:
    """What each of some runs printed; one after the other in the same two processes."""
    with_ports = []
    for arguments in runs.values():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            with_ports.append((free.getsockname()[1], [*COMMON, *arguments]))
    ended = run_program("-c", RANKS, str(ROOT / "examples" / "pretrain_c4.py"), json.dumps(with_ports), cwd=folder)
    first, second = ((folder / f"printed-{rank}").read_text() for rank in (0, 1))
    assert ended_well(ended), first + second + ended.stderr[-8000:]
    assert not losses(second)
    return dict(zip(runs, first.split("---"), strict=False))


def resumed_and_with_all_savings(run: Run) -> None:
    """Ranks that see the same data or begin it again, gradients that are not averaged or averaged twice; micro-batches
    that move the weights before the last one; a run that goes on from another step; a shard that does not come back;
    int8 weights or 8-bit moments that are not those of one process, hooks that use gradients before their sum."""
    whole, parts = ["--parallel=ddp", "--folder=whole"], ["--parallel=ddp", "--folder=parts"]
    savings = [*alike(), "--method=q-mini", "--state-bits=8", "--gradients=freed"]
    shards = ["--parallel=fsdp", "--folder=shards", *savings]
    printed = on_two_ranks(
        Path.cwd(),
        {
            "whole": whole,
            "first": [*parts, "--until=3"],
            "second": parts,
            "early": [*shards, "--until=3"],
            "late": shards,
        },
    )
    found = {name: losses(output) for name, output in printed.items()}
    assert found["first"] | found["second"] == found["whole"]
    assert found["whole"][6] < found["whole"][1]
    assert list(found["second"]) == list(found["late"]) == [4, 5, 6]
    assert_same_bits(weights("parts"), weights("whole"))
    places = [torch.load(f"whole/step-6/rank-{rank}.pt", weights_only=True)["training"] for rank in (0, 1)]
    assert places[0]["rest"].tolist() != places[1]["rest"].tolist()
    one = losses(run(*COMMON, *savings, "--folder=one", "--tokens-per-step=64"))
    assert found["early"] | found["late"] == pytest.approx(one, abs=5e-3)  # int8 weights are rounded at random
    for path in Path("shards/step-6").rglob("*"):
        if path.is_file():
            files.check(path, "each rank writes the checksums of its own files")
    kept = json.loads(Path("whole/run.json").read_text())
    with pytest.raises(SystemExit, match="holds a run with ranks=2, this is 1"):
        checkpoints.begin(Path("whole"), kept | {"ranks": 1})


def as_one_process(run: Run) -> None:
    """A loss that is one rank's alone, a mean that is a sum, a plain shard that does not come back."""
    same = alike()
    shards = ["--parallel=fsdp", "--folder=shards", *same]
    runs = {"two": ["--parallel=ddp", "--folder=two", *same], "early": [*shards, "--until=3"], "late": shards}
    found = {name: losses(output) for name, output in on_two_ranks(Path.cwd(), runs).items()}
    one = losses(run(*COMMON, *same, "--folder=one", "--tokens-per-step=64"))
    assert found["two"] == pytest.approx(one, abs=2e-4)
    assert found["early"] | found["late"] == pytest.approx(one, abs=2e-4)
    alone = weights("one")
    assert all(torch.allclose(value, alone[name], atol=1e-5) for name, value in weights("two").items())


@needs_fsdp_on_a_cpu
@pytest.mark.slow
@pytest.mark.parametrize("check", [resumed_and_with_all_savings, pytest.param(as_one_process, marks=pytest.mark.full)])
def test_two_ranks_under_ddp_and_fsdp(run: Run, check: Callable[[Run], None]) -> None:
    check(run)


def alike() -> list[str]:
    """Documents that are all alike: the batches of two ranks are those of one."""
    Path("alike.jsonl").write_text((json.dumps({"text": "the same words again"}) + "\n") * 400)
    return ["--data=alike.jsonl", "--validation=alike.jsonl"]


# One card


@pytest.mark.slow
def test_the_one_card_recipe_runs_on_a_cpu_at_a_size_that_it_can_train(run: Run) -> None:
    """A model that is not filled, a part that is not counted, gradients that stay alive."""
    pytest.importorskip("bitsandbytes")
    small = ["--model=60M", "--until=2", "--sequence=16", "--tokens-per-step=16", "--report=1", "--evaluate-every=0"]
    output = run("--config=7b_one_card", "--data=texts.jsonl", "--tokenizer=bytes", "--folder=run", *small)
    counted = dict(re.findall(r"^(\S.*?) +([\d.]+) GB$", output, re.MULTILINE))
    assert counted["int8 weights"] == "0.025"  # 25.3 M in attention and MLP
    assert counted["gradients of weights at the peak"] == "0.066"
    # 25.3 MB and their 1 MB, 32.8 M others at 4 + 2 bytes and 1 MB of scales, that gradient, the 109 MB that an update
    # takes in passing, and 2 to 3 MB of activations.
    assert 0.399 < float(counted["total"]) < 0.405
    first, second = losses(output).values()
    assert 4 < first < 12, output
    assert second != first


# What a run tells


@pytest.mark.parametrize("log", ["tensorboard", pytest.param("wandb", marks=pytest.mark.full)])
def test_a_log_gets_the_losses(log: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A log that is asked for and stays empty, or is given another step's values."""
    pytest.importorskip(log)
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    output = run("--config=60m", "--data=texts.jsonl", "--steps=4", *SMALL, "--folder=run", f"--log={log}")
    if log == "wandb":  # in a format of its own
        assert list(Path("run/wandb").glob("offline-run-*/run-*.wandb"))
        return
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    board = EventAccumulator("run/tensorboard").Reload()
    logged = {event.step: event.value for event in board.Scalars("loss")}
    assert logged == pytest.approx(losses(output), abs=1e-4)
    assert [event.step for event in board.Scalars("validation_loss")] == [4]
