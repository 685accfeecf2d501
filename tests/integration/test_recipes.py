"""The paper's recipes: configs against the paper's figures, packing, resume, ranks, errors. Models have one layer, and
narrow ones where a whole one is too heavy for a CPU; their whole shapes are checked on the meta device."""

from __future__ import annotations

import itertools
import json
import math
import os
import re
import runpy
import signal
import socket
import sys
from argparse import Namespace
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_cases import needs_fsdp_on_a_cpu
from hypothesis import given, settings
from hypothesis import strategies as st
from pictures import check_picture, record_figures
from programs import ROOT, ended_well, run_program

from apollo_triton.tools.llama import meta_model, paper_figures

pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
sys.path.append(str(ROOT / "examples"))  # where Python itself looks when it runs one of them
from pretraining import checkpoints, data, hub, model  # noqa: E402
from pretraining.options import known_configs, parse_options  # noqa: E402
from pretraining.reports import LABELS  # noqa: E402

PAPER = paper_figures()["pretrain_hyperparameters"]
SIZES = {"60m": "60M", "130m": "130M", "350m": "350M", "350m_1024": "350M", "1b": "1B", "7b": "7B", "13b": "13B"}
TEXTS = [f"Document {number}: {'word ' * (7 * number % 23)}ends." for number in range(200)]
TINY = ["--layers=1", "--shrink=8", "--sequence=16", "--tokens-per-step=128", "--micro-batch=2", "--report=1"]
SMALL = ["--tokenizer=bytes", "--vocabulary=256", "--validation-tokens=64", "--evaluate-every=4", *TINY]
Run = Callable[..., str]


@pytest.fixture
def texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run in, with documents in ``texts.jsonl``."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    path = tmp_path / "texts.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in [None, *TEXTS[:9], "", *TEXTS[9:]]))
    return path


@pytest.fixture
def run(texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run an example in this process; what it printed."""

    def run_example(*arguments: str, name: str = "pretrain_c4") -> str:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *arguments])
        capsys.readouterr()
        runpy.run_path(str(ROOT / "examples" / f"{name}.py"), run_name="__main__")
        return capsys.readouterr().out

    return run_example


def options_of(monkeypatch: pytest.MonkeyPatch, *arguments: str) -> Namespace:
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


# The configs


def test_there_is_a_config_for_every_recipe() -> None:
    assert set(known_configs()) == {*SIZES, "7b_one_card"}
    assert {*SIZES.values()} == {*paper_figures()["llama"]}


@pytest.mark.parametrize("config", SIZES)
@pytest.mark.parametrize("method", ["apollo", "mini", "q-apollo", "q-mini"])
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
    low_rank, dense = model.make_optimizer(meta_model(size), options).param_groups
    assert low_rank["lr"] == dense["lr"] == PAPER["lr"]
    assert low_rank["weight_decay"] == dense["weight_decay"] == PAPER["weight_decay"]
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


@pytest.mark.parametrize("config", SIZES)
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


@pytest.mark.parametrize("method", ["apollo", "mini", "q-apollo", "q-mini", "adamw"])
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


# The data


def test_what_the_model_sees_is_the_text_once_and_in_order(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tokens that are lost or come twice between documents, sequences, accumulated batches, steps or runs, one of which
    ends by a signal; held out documents that are trained on."""
    seen: list[torch.Tensor] = []
    backward = model.Trained.backward

    def record(self: Any, batches: list[torch.Tensor]) -> torch.Tensor:
        seen.extend(batch.flatten() for batch in batches)
        if len(seen) == 3 * 4:  # in the third step
            os.kill(os.getpid(), signal.SIGTERM)
        return backward(self, batches)

    monkeypatch.setattr(model.Trained, "backward", record)
    same = ["--config=60m", "--data=texts.jsonl", "--steps=10", *SMALL, "--folder=run"]
    assert "stopped: step 3 is saved in run" in run(*same)
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    assert list(losses(run(*same))) == [4, 5, 6, 7, 8, 9, 10]
    trained = [text for text in TEXTS if not data._is_held_out(text, 0.05)]
    assert 0.01 < 1 - len(trained) / len(TEXTS) < 0.1
    expected = list(itertools.chain.from_iterable([*text.encode(), 0] for text in trained))
    assert torch.cat(seen).tolist() == expected[: 10 * 128]


def packer_of(texts: list[str], rank: int, ranks: int) -> data.Packer:
    def open_documents() -> Any:
        whole = datasets.Dataset.from_dict({"text": texts}).to_iterable_dataset()
        return datasets.distributed.split_dataset_by_node(whole, rank, ranks)

    return data.Packer(open_documents, data.load_encode("bytes", 256), lambda text: True, "text")


@settings(max_examples=30, deadline=None)
@given(
    texts=st.lists(st.text("abc", min_size=1, max_size=9), min_size=3, max_size=9),
    takes=st.lists(st.tuples(st.integers(1, 3), st.integers(1, 7), st.booleans()), min_size=1, max_size=8),
    ranks=st.integers(1, 3),
    at_once=st.integers(1, 4),
)
def test_packing_loses_and_repeats_no_token(
    texts: list[str], takes: list[tuple[int, int, bool]], ranks: int, at_once: int
) -> None:
    """A rest that is dropped, a place that is a document off, an epoch that begins where a run went on."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(data, "READ_AT_ONCE", at_once)
        for rank in range(ranks):
            packer, found = packer_of(texts, rank, ranks), []
            for sequences, length, resume in takes:
                if resume:
                    state = packer.state_dict()
                    packer = packer_of(texts, rank, ranks)
                    packer.load_state_dict(state)
                tokens = packer.take(sequences, length)
                assert tokens.shape == (sequences, length)
                found += tokens.flatten().tolist()
            own = b"".join(text.encode() + b"\0" for text in texts[rank::ranks])
            assert bytes(found) == (own * (1 + len(found) // len(own)))[: len(found)]
            assert packer.epoch <= len(found) // len(own) + 1


def namespace(**changed: Any) -> Namespace:
    own = {"data": "texts.jsonl", "data_config": None, "text_column": "text", "validation": None, "held_out": 0.05}
    return Namespace(**(own | {"tokenizer": "bytes", "vocabulary": 256, "evaluate_every": 1} | changed))


def documents_of(packer: data.Packer | None) -> set[str]:
    assert packer is not None
    return {text for texts in packer._once() for text in texts}


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_ranks_share_the_documents_and_hold_out_the_same(ranks: int, texts: Path) -> None:
    """A document that two ranks have, or that one trains on and another evaluates on."""
    pairs = [data.open_data(namespace(), rank, ranks) for rank in range(ranks)]
    parts = [documents_of(packer) for pair in pairs for packer in pair]
    assert sum(map(len, parts)) == len(TEXTS)
    assert set().union(*parts) == set(TEXTS)
    assert set().union(*(documents_of(pair[1]) for pair in pairs)) == documents_of(data.open_data(namespace(), 0, 1)[1])


def test_kinds_of_local_data(texts: Path) -> None:
    """A loader that is given the wrong files, lines taken for documents, a file that is not there for a reason."""
    folder = texts.parent / "notes"
    (folder / "deeper").mkdir(parents=True)
    (folder / "a.txt").write_text("one\n\ntwo\n")
    (folder / "deeper" / "b.md").write_text("three\n")
    (folder / "picture.png").write_bytes(b"\x89PNG")
    everything = {"evaluate_every": 0}
    assert documents_of(data.open_data(namespace(data="notes", **everything), 0, 1)[0]) == {"one\n\ntwo\n", "three\n"}
    assert documents_of(data.open_data(namespace(data="notes/a.txt", **everything), 0, 1)[0]) == {"one", "two\n"}
    datasets.Dataset.from_dict({"text": ["four"]}).to_parquet(str(folder.parent / "c.parquet"))
    found = data.open_data(namespace(data="c.parquet", validation="notes"), 0, 1)
    assert [documents_of(packer) for packer in found] == [{"four"}, {"one\n\ntwo\n", "three\n"}]
    (folder / "c.csv").write_text("text\nfive\n")
    with pytest.raises(SystemExit, match=r"one kind of files is needed, this has \['csv', 'text'\]"):
        data.open_data(namespace(data="notes"), 0, 1)


@pytest.fixture(scope="module")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a LLaMA of one layer, and a tokenizer whose tokens are bytes and </s>."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    folder = tmp_path_factory.mktemp("tiny")
    names = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "</s>"]
    tokenizer = Tokenizer(models.BPE({name: number for number, name in enumerate(names)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>").save_pretrained(folder)
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 1, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(vocab_size=257, **sizes)).save_pretrained(folder)
    return folder


def test_a_tokenizer_of_a_folder(tiny_model: Path) -> None:
    """Documents without an end, with one that the text itself wrote, or with tokens that the model does not have."""
    encode = data.load_encode(str(tiny_model), 257)
    first, second = encode(["ab", "a</s>b"])
    assert first[-1] == 256
    assert len(first) == 3
    assert second.count(256) == 1
    assert len(second) == len("a</s>b") + 1
    with pytest.raises(SystemExit, match="gives token 256, and the model has 256; --vocabulary 257 makes room"):
        data.load_encode(str(tiny_model), 256)(["ab"])


# Several processes


COMMON = ["--config=60m", "--data=texts.jsonl", "--steps=6", *SMALL]
RANK = """
import json, os, runpy, sys
os.environ |= {"RANK": sys.argv[1], "LOCAL_RANK": sys.argv[1], "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
program, runs = sys.argv[2], json.loads(sys.argv[3])
sys.path.insert(0, os.path.dirname(program))
for port, arguments in runs:
    os.environ["MASTER_PORT"] = str(port)
    sys.argv = [program, *arguments]
    runpy.run_path(program, run_name="__main__")
    print("---", flush=True)
"""


def on_two_ranks(folder: Path, runs: dict[str, list[str]]) -> dict[str, str]:
    """What each of some runs printed; one after the other in the same two processes, since most of the time would go
    into starting them."""
    with_ports = []
    for arguments in runs.values():
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            with_ports.append((free.getsockname()[1], [*COMMON, *arguments]))
    rest = [str(ROOT / "examples" / "pretrain_c4.py"), json.dumps(with_ports)]
    with ThreadPoolExecutor() as pool:
        started = [pool.submit(run_program, "-c", RANK, str(rank), *rest, cwd=folder) for rank in (0, 1)]
    first, second = (each.result() for each in started)
    assert ended_well(first), first.stdout + first.stderr[-4000:]
    assert ended_well(second), second.stderr[-4000:]
    assert not losses(second.stdout)
    return dict(zip(runs, first.stdout.split("---"), strict=False))


@needs_fsdp_on_a_cpu
def test_two_ranks_under_ddp_and_fsdp(run: Run) -> None:
    """Ranks that see the same data or begin it again, gradients that are not averaged or averaged twice, a shard that
    does not come back, a loss that is one rank's alone."""
    Path("alike.jsonl").write_text((json.dumps({"text": "the same words again"}) + "\n") * 400)
    alike = ["--data=alike.jsonl", "--validation=alike.jsonl"]
    printed = on_two_ranks(
        Path.cwd(),
        {
            "whole": ["--parallel=ddp", "--folder=whole"],
            "first": ["--parallel=ddp", "--folder=parts", "--until=3"],
            "second": ["--parallel=ddp", "--folder=parts"],
            "early": ["--parallel=fsdp", "--folder=shards", "--until=3"],
            "late": ["--parallel=fsdp", "--folder=shards"],
            "alike": ["--parallel=ddp", "--folder=two", *alike],
        },
    )
    found = {name: losses(output) for name, output in printed.items()}
    assert found["first"] | found["second"] == found["whole"]
    assert list(found["second"]) == list(found["late"]) == [4, 5, 6]
    assert_same_bits(weights("parts"), weights("whole"))
    places = [torch.load(f"whole/step-6/rank-{rank}.pt", weights_only=True)["training"] for rank in (0, 1)]
    assert places[0]["rest"].tolist() != places[1]["rest"].tolist()
    assert found["early"] | found["late"] == pytest.approx(found["whole"], abs=2e-4)
    kept = json.loads(Path("whole/run.json").read_text())
    with pytest.raises(SystemExit, match="holds a run with ranks=2, this is 1"):
        checkpoints.begin(Path("whole"), kept | {"ranks": 1})
    # Documents are all alike there, so both ranks have the batches that one has.
    one = run(*COMMON, *alike, "--folder=one", "--tokens-per-step=64")
    assert found["alike"] == pytest.approx(losses(one), abs=2e-4)
    alone = weights("one")
    assert all(torch.allclose(value, alone[name], atol=1e-5) for name, value in weights("two").items())


def test_int8_weights_under_torchrun(texts: Path) -> None:
    """DDP's first broadcast, which knows no int8 weights; a program that does not go by torchrun's ranks."""
    pytest.importorskip("torch", minversion="2.13", reason="DDP has no init_sync")
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    program = [str(ROOT / "examples" / "pretrain_c4.py"), *COMMON, "--parallel=ddp", "--method=q-mini", "--folder=run"]
    found = run_program(*launch, *program, cwd=texts.parent, timeout=200)
    assert ended_well(found), found.stdout + found.stderr[-4000:]
    assert losses(found.stdout)[6] < losses(found.stdout)[1]


# One card


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


def test_tensorboard_gets_the_losses(run: Run) -> None:
    """A log that is asked for and stays empty, or is given another step's values."""
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    output = run("--config=60m", "--data=texts.jsonl", "--steps=4", *SMALL, "--folder=run", "--log=tensorboard")
    board = EventAccumulator("run/tensorboard").Reload()
    logged = {event.step: event.value for event in board.Scalars("loss")}
    assert logged == pytest.approx(losses(output), abs=1e-4)
    assert [event.step for event in board.Scalars("validation_loss")] == [4]


def test_wandb_gets_them_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    run("--config=60m", "--data=texts.jsonl", "--steps=2", *SMALL, "--folder=run", "--log=wandb")
    assert list(Path("run/wandb").glob("offline-run-*/run-*.wandb"))


# Errors


WRONG = {
    "there is no such config (known: 130m, 13b": ["--config=2b"],
    "--steps is needed: the paper gives no number of steps for 13B": ["--config=13b"],
    "runs under torchrun": ["--config=60m", "--parallel=ddp"],
    "--gradients none --state-bits 8 --checkpoint-activations": ["--config=60m", "--cap=12"],
    "--method adamw is torch.optim.AdamW": ["--config=60m", "--method=adamw", "--gradients=freed"],
    "at least 1 is needed, not 0": ["--config=60m", "--steps=0"],
    "argument --lr: a finite number, 0 or more, is needed, not nan": ["--config=60m", "--lr=nan"],
    "argument --seed: 0 to 2**32 - 1 is needed, not -1": ["--config=60m", "--seed=-1"],
    "argument --sequence: at least 2 is needed, not 1": ["--config=60m", "--sequence=1"],
    "argument --held-out: a number above 0 and below 1 is needed, not 1": ["--config=60m", "--held-out=1"],
    "--rank 999 is above the width of 60M, 512": ["--config=60m", "--rank=999"],
    "--shrink 3 does not leave 60M heads of one even width; use one of [1, 2, 4, 8]": ["--config=60m", "--shrink=3"],
    "--shrink 1000 does not leave": ["--config=60m", "--shrink=1000"],
    "invalid choice: '2B'": ["--config=own.json"],
    "there is no option 'learning_rate'": ["--config=other.json"],
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_options(message: str, texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A config that is not checked as the command line is; a combination that fails in the middle of a run."""
    Path("own.json").write_text('{"model": "2B", "lr": 0.01, "steps": 5}')
    Path("other.json").write_text('{"model": "60M", "learning_rate": 0.01}')
    with pytest.raises(SystemExit):
        options_of(monkeypatch, *WRONG[message])
    assert message in " ".join(capsys.readouterr().err.split())


LATER = {
    "are no whole sequences of 16 tokens": ["--tokens-per-step=100"],
    "--micro-batch 3 does not divide a rank's 8 sequences; use one of [1, 2, 4, 8]": ["--micro-batch=3"],
    "--text-column body is not text; the data has text": ["--text-column=body"],
    "a larger --held-out than 1e-09": ["--held-out=1e-9"],
    "--vocabulary 10 is too small for --tokenizer bytes; use at least 256": ["--vocabulary=10"],
    "--folder texts.jsonl: File exists; give a folder": ["--folder=texts.jsonl"],
    "--validation pictures: a folder of one kind of files is needed, this has none": ["--validation=pictures"],
}


@pytest.mark.parametrize("message", LATER)
def test_what_the_data_do_not_allow(message: str, run: Run) -> None:
    Path("pictures").mkdir()
    with pytest.raises(SystemExit, match=re.escape(message)):
        run("--config=60m", "--data=texts.jsonl", "--steps=2", *SMALL, "--folder=run", *LATER[message])


def test_a_folder_of_another_run_is_refused(run: Run) -> None:
    """Weights that go on with another method or other data; a run that may not be told more often."""
    same = ["--config=60m", "--data=texts.jsonl", "--steps=4", *SMALL, "--folder=run"]
    run(*same, "--until=1")
    with pytest.raises(SystemExit, match=r"run holds a run with method='apollo', this is 'mini'"):
        run(*same, "--method=mini")
    assert list(losses(run(*same, "--until=3", "--report=2"))) == [2, 3]


def test_a_call_that_failed_leaves_its_folder_free(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings that are kept before anything is trained, and then refuse the call that mends them."""
    same = ["--config=60m", "--data=texts.jsonl", "--steps=1", *SMALL, "--folder=run"]

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no memory")

    with monkeypatch.context() as patch:
        patch.setattr(torch.nn.Module, "to_empty", fail)
        with pytest.raises(RuntimeError, match="no memory"):
            run(*same, "--lr=1")
    assert list(losses(run(*same, "--lr=0.01"))) == [1]


def test_a_log_whose_library_is_missing(
    texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(SystemExit):
        options_of(monkeypatch, "--config=60m", "--log=wandb")
    assert "--log: wandb is not installed; pip install wandb" in capsys.readouterr().err


def test_a_path_that_is_not_there_is_named_by_its_option(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(data, "hub_answers", lambda: False)
    with pytest.raises(SystemExit, match=r"^--validation /nope: there is no such path here"):
        run("--config=60m", "--data=texts.jsonl", "--steps=2", *SMALL, "--folder=run", "--validation=/nope")


def test_fsdp2_pretrain_says_how_it_is_started(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit, match="torchrun --standalone --nproc-per-node 2"):
        run("--folder=run", name="fsdp2_pretrain")


def test_plain_loop_says_that_there_is_nothing_to_do(run: Run) -> None:
    run("--steps=2", name="plain_loop")
    assert "step 2 of plain_loop.pt is done already" in run("--steps=1", name="plain_loop")
    with pytest.raises(SystemExit):
        run("--accumulate=0", name="plain_loop")


NO_NETWORK = {"HF_ENDPOINT": "http://127.0.0.1:9", "HF_HUB_OFFLINE": "0"}  # where nobody listens


def test_without_a_network_it_says_what_to_do(texts: Path) -> None:
    """A minute of attempts, and a traceback of a library's."""
    example, home = str(ROOT / "examples" / "pretrain_c4.py"), str(texts.parent / "home")
    found = run_program(example, "--config=60m", cwd=texts.parent, timeout=100, HF_HOME=home, **NO_NETWORK)
    assert found.returncode == 1
    lines = found.stderr.strip().splitlines()
    assert lines[-2].startswith("--data allenai/c4: there is no such path here, and the Hugging Face hub has not given")
    assert lines[-1].startswith("Without a network: --data FILE_OR_FOLDER and --tokenizer FOLDER, or --tokenizer bytes")
    assert "Traceback" not in found.stderr
    assert "Retrying" not in found.stderr


@pytest.mark.parametrize(
    ("program", "options", "message"),
    [
        ("pretrain_c4", ["--config=60m", "--tokenizer=no/such"], "--tokenizer no/such: there is no such path here"),
        ("finetune_sft", ["--model=no/such"], "--model no/such: "),
    ],
)
def test_nor_do_tokenizers_and_models_ask_in_vain(
    program: str, options: list[str], message: str, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Six attempts for each of two files, all the same. (One is made by transformers, whatever it is told.)"""
    asked: list[Any] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **named: asked.append(arguments) or [])
    for module in (hub, data):
        monkeypatch.setattr(module, "hub_answers", lambda: False)
    with pytest.raises(SystemExit, match=message) as error:
        run("--data=texts.jsonl", *options, name=program)
    assert "Without a network" in str(error.value)
    assert len(asked) <= 1


# Fine-tuning


@pytest.fixture
def questions(texts: Path) -> Path:
    path = texts.parent / "questions.json"
    asked = [{"instruction": f"{a} + {b}?", "input": "", "output": str(a + b)} for a in range(8) for b in range(8)]
    path.write_text(json.dumps(asked))
    return path


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("method", "rank", "scale", "batch"), [("apollo", 32, 1.0, 16), ("mini", 1, 64.0, 32)])
def test_fine_tuning(
    method: str, rank: int, scale: float, batch: int, questions: Path, tiny_model: Path, run: Run, monkeypatch: Any
) -> None:
    """Settings that do not reach the optimizer or the Trainer, frozen weights that move, targets that do not; a run
    that does not go on as it was; a loss over the questions."""
    import transformers

    trainers: list[Any] = []

    class Kept(transformers.Trainer):
        def __init__(self, *arguments: Any, **named: Any) -> None:
            super().__init__(*arguments, **named)
            trainers.append(self)
            self.batches = 0

        def training_step(self, *arguments: Any, **named: Any) -> torch.Tensor:
            self.batches += 1
            return super().training_step(*arguments, **named)

    monkeypatch.setattr(transformers, "Trainer", Kept)
    same = [f"--model={tiny_model}", "--data=questions.json", f"--method={method}", "--lr=3e-3", "--save-every=4"]
    same += ["--scale=64"] if method == "mini" else []  # 128 is what Mini has anyway
    begun = run(*same, "--folder=whole", "--resume", name="finetune_sft")
    assert "--resume: --folder whole holds no checkpoint, so this begins at step 1" in begun
    (trainer,) = trainers
    low_rank = trainer.optimizer.optimizer if hasattr(trainer.optimizer, "optimizer") else trainer.optimizer
    (group,) = (group for group in low_rank.param_groups if "rank" in group)
    assert (group["rank"], group["scale"], group["weight_decay"]) == (rank, scale, 0.0)
    assert trainer.args.per_device_train_batch_size * trainer.args.gradient_accumulation_steps == batch
    assert (trainer.args.num_train_epochs, trainer.args.lr_scheduler_type) == (3, "linear")
    examples = 64 - 6
    assert trainer.state.global_step == 3 * math.ceil(examples / batch)
    before = transformers.AutoModelForCausalLM.from_pretrained(tiny_model).state_dict()
    after = transformers.AutoModelForCausalLM.from_pretrained("whole").state_dict()
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    targets = ("q_proj", "k_proj", "v_proj", "up_proj", "down_proj")
    assert moved == {name for name in before if any(target in name for target in targets)}
    question, answer = trainer.train_dataset[0]["input_ids"], trainer.train_dataset[0]["labels"]
    assert 2 <= sum(label != -100 for label in answer) <= 3  # one or two digits, and the end
    assert answer[-1] == question[-1] == 256
    run(*same, "--folder=parts", name="finetune_sft")
    newest = max(Path("parts").glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    for path in (*newest.iterdir(), newest):
        path.rmdir() if path.is_dir() else path.unlink()
    run(*same, "--folder=parts", "--resume", name="finetune_sft")
    again = transformers.AutoModelForCausalLM.from_pretrained("parts").state_dict()
    assert_same_bits(again, after)
    assert trainers[2].batches < trainers[0].batches == trainers[1].batches


BAD_DATA = {
    "has too few examples, 1; 2 are needed at least": '[{"instruction": "1 + 1?", "output": "2"}]',
    "cannot be read as json, or has no examples": "[]",
    "bad.json cannot be read as json": "",
    "--data bad.json cannot be read": "instructions {",
    "the instruction of example 2 is None, not a text": (
        '[{"instruction": "1 + 1?", "output": "2"}, {"instruction": null, "output": "2"}]'
    ),
}


@pytest.mark.parametrize("message", BAD_DATA)
def test_data_that_cannot_be_fine_tuned_on(message: str, questions: Path, tiny_model: Path, run: Run) -> None:
    Path("bad.json").write_text(BAD_DATA[message])
    with pytest.raises(SystemExit, match=message):
        run(f"--model={tiny_model}", "--data=bad.json", name="finetune_sft")


BAD_TUNING = {
    "argument --batch: at least 1 is needed, not 0": ["--batch=0"],
    "argument --lr: a finite number, 0 or more, is needed, not -1": ["--lr=-1"],
    "--rank 500, --target-modules: ": ["--rank=500"],
    "no weight matches": ["--target-modules", "nope"],
    "this folder holds no tokenizer that can be loaded": ["--model=bare"],
}


@pytest.mark.parametrize("message", BAD_TUNING)
def test_wrong_options_of_fine_tuning(
    message: str, questions: Path, tiny_model: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("bare").mkdir()
    (Path("bare") / "config.json").write_text((tiny_model / "config.json").read_text())
    with pytest.raises(SystemExit) as error:
        run(f"--model={tiny_model}", "--data=questions.json", *BAD_TUNING[message], name="finetune_sft")
    assert message in f"{error.value} {capsys.readouterr().err}"


@pytest.fixture(autouse=True)
def _alone() -> Iterator[None]:
    """A Trainer leaves Accelerate's state behind."""
    from accelerate_states import forget_accelerate

    yield
    forget_accelerate()
