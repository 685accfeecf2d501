"""What the paper's recipes are given: packing, shares of the ranks, kinds of files, and errors that say what to do."""

from __future__ import annotations

import itertools
import os
import re
import signal
import socket
import sys
from argparse import Namespace
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from programs import ROOT, run_program
from recipe_cases import SMALL, TEXTS, Run, losses, options_of

pytest.importorskip("transformers")
datasets = pytest.importorskip("datasets")
from pretraining import data, hub, model  # noqa: E402

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


@pytest.mark.slow
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


def test_a_document_that_cannot_be_read() -> None:
    """A file whose end is broken, which shows in the middle of the training: a traceback of a library's."""

    def documents() -> Iterator[dict[str, str]]:
        yield {"text": "one"}
        raise EOFError("Compressed file ended\n\x1b[2J")

    def open_documents() -> Any:
        return datasets.IterableDataset.from_generator(documents)

    packer = data.Packer(open_documents, data.load_encode("bytes", 256), lambda text: True, "text")
    with pytest.raises(SystemExit, match=r"a document of --data or --validation cannot be read \(EOFError") as error:
        packer.take(1, 99)
    assert str(error.value).isprintable()


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
    "--config list.json: it must be a JSON object of options, not [1]": ["--config=list.json"],
    "--rank 64 has no effect with --method mini, whose rank is 1; leave it out": [
        "--config=60m",
        "--method=mini",
        "--rank=64",
    ],
    "--update-proj-gap 50 has no effect with --method adamw": [
        "--config=60m",
        "--method=adamw",
        "--update-proj-gap=50",
    ],
    "--data-config en has no effect with a file or a folder": [
        "--config=60m",
        "--data=own.json",
        "--data-config=en",
    ],
    "--held-out 0.1 has no effect with --validation": ["--config=60m", "--held-out=0.1", "--validation=own.json"],
    "--stochastic-rounding has no effect with --dtype float32": [
        "--config=60m",
        "--dtype=float32",
        "--stochastic-rounding",
    ],
}


@pytest.mark.parametrize("message", WRONG)
def test_wrong_options(message: str, texts: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """A config that is not checked as the command line is; a combination that fails in the middle of a run."""
    Path("own.json").write_text('{"model": "2B", "lr": 0.01, "steps": 5}')
    Path("other.json").write_text('{"model": "60M", "learning_rate": 0.01}')
    Path("list.json").write_text("[1]")
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
    "--data pipe is a pipe or a device; a file or a folder is needed": ["--data=pipe"],
    "--data broken.parquet cannot be read as parquet": ["--data=broken.parquet"],
    "--data broken.jsonl cannot be read as json": ["--data=broken.jsonl"],
    "--tokenizer pictures: no tokenizer there can be loaded": ["--tokenizer=pictures"],
}


@pytest.mark.parametrize("message", LATER)
def test_what_the_data_do_not_allow(message: str, run: Run) -> None:
    Path("pictures").mkdir()
    os.mkfifo("pipe")
    Path("broken.parquet").write_bytes(b"PAR1 and no more")
    Path("broken.jsonl").write_text('{"text": "one"}\n{"text": [')
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


PARALLEL = {
    "weights would move before the ranks' gradients are averaged; use --parallel fsdp": ("ddp", "freed"),
    "the sum over the ranks needs a gradient; use --gradients freed": ("fsdp", "none"),
}


@pytest.mark.parametrize("message", PARALLEL)
def test_gradients_that_cannot_be_freed_on_several_ranks_are_refused(
    message: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Ranks that drift apart, or an error only once a model has been made."""
    monkeypatch.setenv("WORLD_SIZE", "2")
    parallel, gradients = PARALLEL[message]
    with pytest.raises(SystemExit):
        options_of(monkeypatch, "--config=60m", f"--parallel={parallel}", f"--gradients={gradients}")
    assert message in capsys.readouterr().err


def test_fsdp2_pretrain_says_how_it_is_started(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    with pytest.raises(SystemExit, match="torchrun --standalone --nproc-per-node 2"):
        run("--folder=run", name="fsdp2_pretrain")


def test_plain_loop_says_what_is_wrong(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    """Options that are ignored, batches that a run with others has seen, files that are no checkpoint."""
    run("--steps=2", name="plain_loop")
    assert "step 2 of plain_loop.pt is done already" in run("--steps=1", name="plain_loop")
    for options, message in {
        ("--accumulate=0",): "--accumulate 0: each must be at least 1",
        ("--accumulate=3",): "plain_loop.pt is of a run with --accumulate 2",
        ("--checkpoint=no/such.pt",): "there is no folder no",
        ("--checkpoint=broken.pt",): "--checkpoint broken.pt: broken.pt does not end in its checksum",
        ("--checkpoint=pipe",): "pipe is a pipe or a device; a file is needed",
    }.items():
        Path("broken.pt").write_bytes(b"half")
        if not Path("pipe").exists():
            os.mkfifo("pipe")
        with pytest.raises(SystemExit) as error:
            run(*options, name="plain_loop")
        assert message in f"{error.value} {capsys.readouterr().err}"


FSDP2 = {
    "--rank 8 is APOLLO's, and --mini has rank 1": ["--mini", "--rank=8"],
    "--report 0: it must be at least 1": ["--report=0"],
}


@pytest.mark.parametrize("message", FSDP2)
def test_fsdp2_pretrain_refuses_what_it_would_ignore(
    message: str, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run("--folder=run", *FSDP2[message], name="fsdp2_pretrain")
    assert message in capsys.readouterr().err


NOWHERE = "http://127.0.0.1:9"  # where nobody listens


def test_without_a_network_it_says_what_to_do(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A minute of attempts, and an error of a library's."""
    asked: list[Any] = []
    monkeypatch.setattr(socket, "getaddrinfo", lambda *arguments, **named: asked.append(arguments) or [])
    monkeypatch.setattr(hub, "ENDPOINT", NOWHERE)
    monkeypatch.setattr(hub, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(data, "hub_answers", hub.hub_answers.__wrapped__)  # which asks again in each test
    with pytest.raises(SystemExit) as error:
        run("--config=60m")
    first, second = str(error.value).splitlines()
    assert first.startswith("--data allenai/c4: there is no such path here, and the Hugging Face hub has not given")
    assert second.startswith("Without a network: --data FILE_OR_FOLDER and --tokenizer FOLDER, or --tokenizer bytes")
    assert len(asked) == 1


@pytest.mark.full
def test_a_program_without_a_network_ends_with_what_to_do(texts: Path) -> None:
    """Warnings of a library's before it, or a traceback behind it."""
    example, home = str(ROOT / "examples" / "pretrain_c4.py"), str(texts.parent / "home")
    offline = {"HF_ENDPOINT": NOWHERE, "HF_HUB_OFFLINE": "0", "HF_HOME": home}
    found = run_program(example, "--config=60m", cwd=texts.parent, timeout=100, **offline)
    assert found.returncode == 1
    lines = found.stderr.strip().splitlines()
    assert lines[-2].startswith("--data allenai/c4: ")
    assert lines[-1].startswith("Without a network: ")
    assert "Traceback" not in found.stderr
    assert "Retrying" not in found.stderr


@pytest.mark.parametrize(
    ("program", "options", "message"),
    [
        ("pretrain_c4", ["--config=60m", "--tokenizer=no/such"], "--tokenizer no/such: there is no such path here"),
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
