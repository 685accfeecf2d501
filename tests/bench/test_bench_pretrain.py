"""Pre-training compares optimizers and nothing else: the same weights, the same batches, whoever trains."""

from __future__ import annotations

import sys

import pytest
import torch

from apollo_triton.tools.demo.training import RunConfig
from bench import pretrain, pretrain_data
from bench.pretrain import VARIANTS, results_of, train
from bench.pretrain_data import load_tokens, sample, train_tokenizer
from bench.results_file import Results

STEPS = 6


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("text")
    for number in range(30):
        lines = [f"def function_{number}_{line}(value): return value + {line}\n" for line in range(number, number + 40)]
        (folder / f"{number}.py").write_text("".join(lines))
    return load_tokens(folder, 300, 1)


@pytest.fixture
def in_process(corpus, monkeypatch):
    monkeypatch.setattr(pretrain, "_corpus", corpus)
    return corpus


def config(corpus, method, seed=0, rate=1e-2):
    return RunConfig(method, rate, None, "tiny", STEPS, 2, 16, seed, "cpu", corpus.fingerprint)


def test_tokens_are_integers_of_the_vocabulary_and_decode_to_the_text(corpus, tmp_path):
    assert corpus.train.dtype == torch.int32
    assert 256 < corpus.vocabulary <= 300
    assert 0 <= int(corpus.train.min()) < int(corpus.train.max()) < corpus.vocabulary
    text = b"def f(x):\n    return x  # a comment, \xc3\xa4\n" * 50
    tokenizer = train_tokenizer(text, 300)
    assert tokenizer.decode(tokenizer.encode(text.decode()).ids).encode() == text


def test_the_sample_is_the_same_whatever_the_order_and_no_text_counts_twice():
    texts = [bytes([value]) * 10 for value in range(50)]
    chosen = list(sample(texts, 205))
    assert len(chosen) == 20
    assert list(sample(texts[::-1] + texts, 205)) == chosen


def test_no_text_says_so(tmp_path):
    with pytest.raises(ValueError, match="nowhere: there is no such folder or file"):
        load_tokens(tmp_path / "nowhere", 300, 1)


def test_the_sources_of_the_environment_leave_out_another_one_s(monkeypatch, tmp_path):
    library, packages = tmp_path / "lib", tmp_path / "packages"
    for folder in (library, library / "site-packages", packages):
        folder.mkdir(exist_ok=True)
        (folder / "a.py").write_text(str(folder))
    (packages / "table.py").write_text("x" * (pretrain_data.LARGEST_FILE + 1))
    monkeypatch.setattr(pretrain_data.sysconfig, "get_paths", lambda: {"stdlib": str(library)})
    monkeypatch.setattr(pretrain_data.site, "getsitepackages", lambda: [str(packages)])
    assert sorted(pretrain_data._texts(None)) == sorted([str(library).encode(), str(packages).encode()])


@pytest.mark.slow
def test_every_variant_starts_from_the_same_weights_and_ends_elsewhere(in_process):
    rows = {name: train(config(in_process, name)) for name in VARIANTS}
    first = {row["curve"]["0"] for name, row in rows.items() if not name.startswith("Q-")}
    rounded = {row["curve"]["0"] for name, row in rows.items() if name.startswith("Q-")}
    assert len(first) == len(rounded) == 1
    assert rounded.pop() == pytest.approx(first.pop(), rel=1e-2)
    ends = [row["held_out_loss"] for row in rows.values()]
    assert all(row["held_out_loss"] < row["curve"]["0"] for row in rows.values())
    assert len(set(ends)) == len(ends)  # a variant whose options were lost would end where its plain one does
    halved = [rows[f"{name}, bf16 moments"]["state_bytes"] / rows[name]["state_bytes"] for name in ("APOLLO", "Mini")]
    assert halved == pytest.approx([0.5, 0.5], rel=0.05)


def test_a_run_gives_the_same_numbers_again_and_another_seed_others(in_process):
    one, again, other = (train(config(in_process, "APOLLO", seed)) for seed in (0, 0, 1))
    assert one["curve"] == again["curve"]
    assert one["curve"]["0"] != other["curve"]["0"]


# A forked process has torch already, which takes a new one four seconds.
@pytest.mark.parametrize("start", ["fork", pytest.param("spawn", marks=pytest.mark.full)])
def test_a_run_that_fails_is_a_row_that_says_why(start, corpus, monkeypatch):
    monkeypatch.setattr(pretrain, "START_METHOD", start)
    configs = [config(corpus, "AdamW"), config(corpus, "AdamW", rate=-1.0)]
    rows = {each.learning_rate: row for each, row in results_of(configs, corpus, workers=1)}
    assert rows[1e-2]["held_out_loss"] > 0
    assert "Invalid learning rate: -1.0" in rows[-1.0]["skipped"]


def test_finished_runs_are_not_run_again(corpus, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pretrain, "load_tokens", lambda *arguments: corpus)
    monkeypatch.setattr(pretrain, "Results", lambda *a, **k: Results(*a, **k, folder=tmp_path))
    ran = []

    def stand_in(configs, corpus, workers):
        for each in configs:
            ran.append(each.method)
            yield each, {"variant": each.method, "seed": each.seed, "held_out_loss": 1.0, "seconds": 1}

    monkeypatch.setattr(pretrain, "results_of", stand_in)
    command = ["pretrain", "--model", "tiny", "--seeds", "1", "--device", "cpu", "--variants"]
    for variants in (["AdamW"], ["AdamW", "Mini"]):
        monkeypatch.setattr(sys, "argv", command + variants)
        pretrain.main()
    assert ran == ["AdamW", "Mini"]
    monkeypatch.setattr(sys, "argv", [*command, "AdamW", "--lr", "AdamW=1"])  # another rate is another run
    pretrain.main()
    monkeypatch.setattr(sys, "argv", [*command, "AdamW", "--lr", "Adam=1"])
    with pytest.raises(SystemExit, match="--lr Adam=1: give NAME=NUMBER, where NAME is one of AdamW, APOLLO, Mini"):
        pretrain.main()
    assert ran == ["AdamW", "Mini", "AdamW"]
