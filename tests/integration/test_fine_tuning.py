"""examples/finetune_sft.py: settings, targets, resume, errors."""

from __future__ import annotations

import ast
import json
import math
import os
import re
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from programs import ROOT
from recipe_cases import Run, assert_same_bits

pytest.importorskip("transformers")


@pytest.fixture
def questions(texts: Path) -> Path:
    path = texts.parent / "questions.json"
    asked = [{"instruction": f"{a} + {b}?", "input": "", "output": str(a + b)} for a in range(8) for b in range(8)]
    path.write_text(json.dumps(asked))
    return path


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("method", "rank", "scale", "batch"),
    [pytest.param("apollo", 32, 1.0, 16, marks=pytest.mark.full), ("mini", 1, 128.0, 32)],
)
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
    arguments = transformers.TrainingArguments
    early = lambda *given, **named: arguments(*given, **named | {"save_steps": 4})  # noqa: E731
    monkeypatch.setattr(transformers, "TrainingArguments", early)
    same = [f"--model={tiny_model}", "--data=questions.json", f"--method={method}", "--lr=3e-3"]
    begun = run(*same, "--folder=whole", "--resume", name="finetune_sft")
    assert "begins at step 1" in begun
    # Of the model of the fixture: 64 x 64 three times, 64 x 128 twice; and o_proj, gate_proj, 2 x 257 x 64, 3 norms.
    assert f"trained: {3 * 64**2 + 2 * 64 * 128:,} parameters of down_proj, k_proj, q_proj, up_proj, v_proj" in begun
    frozen = "embed_tokens, gate_proj, input_layernorm, lm_head, norm, o_proj, post_attention_layernorm"
    assert f"frozen: {64**2 + 64 * 128 + 2 * 257 * 64 + 3 * 64:,} parameters of {frozen}" in begun
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


PIECES = {"first.txt": "ab", "second.txt": "wxyz"}  # repeated: each 256 tokens of a file are the same
ATTENTION, MLP = 64 * 64, 64 * 128  # weights of a matrix of the fixture's model: 3 and 2 of them are trained


def loss_on(folder: Path | str, text: str) -> float:
    """The loss of a folder's model on 256 bytes, whose tokens are places in the sorted names of bytes."""
    import transformers
    from tokenizers import pre_tokenizers

    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    names = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokens = torch.tensor([[names.index(letter) for letter in text * (256 // len(text))]])
    with torch.no_grad():
        logits = model(input_ids=tokens[:, :-1]).logits
    return torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:]).item()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("method", "trained", "state"),
    [
        # Adapters of rank 32 have 32 columns and 32 rows. AdamW: two moments of each, and a step of each tensor.
        ("lora", 32 * (3 * 128 + 2 * 192), 8 * 32 * (3 * 128 + 2 * 192) + 10 * 4),
        pytest.param("adamw", 3 * ATTENTION + 2 * MLP, 8 * (3 * ATTENTION + 2 * MLP) + 5 * 4, marks=pytest.mark.full),
        # Two moments of [rank, longer side], and a few numbers of each matrix.
        pytest.param("apollo", 3 * ATTENTION + 2 * MLP, 8 * 32 * (3 * 64 + 2 * 128), marks=pytest.mark.full),
        pytest.param("mini", 3 * ATTENTION + 2 * MLP, 8 * (3 * 64 + 2 * 128), marks=pytest.mark.full),
    ],
)
def test_a_second_text(method: str, trained: int, state: int, tiny_model: Path, run: Run, monkeypatch: Any) -> None:
    """Forgetting that is measured on the second text, or not from the model as it was; bytes that leave something out;
    a run that goes on with fresh adapters; a folder that does not load."""
    import transformers

    arguments = transformers.TrainingArguments
    often = lambda *given, **named: arguments(*given, **named | {"save_steps": 1})  # noqa: E731
    monkeypatch.setattr(transformers, "TrainingArguments", often)
    for name, text in PIECES.items():
        Path(name).write_text(text * (3000 // len(text)))
    command = [
        f"--model={tiny_model}",
        "--data=second.txt",
        "--first-text=first.txt",
        f"--method={method}",
        "--lr=3e-3",
    ]
    found = run(*command, "--folder=tuned", name="finetune_sft")
    losses = re.findall(r"--[a-z-]+ (\w+.txt): held-out loss ([\d.]+) -> ([\d.]+)\n", found)
    assert [name for name, *_ in losses] == ["second.txt", "first.txt"]
    for name, before, after in losses:
        assert float(before) == pytest.approx(loss_on(tiny_model, PIECES[name]), abs=1e-4)  # of four digits
        assert float(after) == pytest.approx(loss_on("tuned", PIECES[name]), abs=1e-4)
    assert float(losses[0][1]) - float(losses[0][2]) > 0.01
    assert f"trained: {trained:,} parameters of " in found
    weights = 2 * 257 * 64 + 4 * ATTENTION + 3 * MLP + 3 * 64 + (trained if method == "lora" else 0)
    sizes = re.search(r"weights ([\d,]+) bytes, gradients ([\d,]+) bytes, optimizer state ([\d,]+) bytes\n", found)
    assert sizes
    shown = [int(size.replace(",", "")) for size in sizes.groups()]
    assert shown[:2] == [4 * weights, 4 * trained]
    assert state <= shown[2] <= state + (0 if method in ("adamw", "lora") else 5 * 32)

    name = "adapter_model.safetensors" if method == "lora" else "model.safetensors"
    ended = (Path("tuned") / name).read_bytes()
    for path in Path("tuned/checkpoint-3").iterdir():
        path.unlink()
    Path("tuned/checkpoint-3").rmdir()
    again = run(*command, "--folder=tuned", "--resume", name="finetune_sft")
    assert f"begins after {Path('tuned/checkpoint-2')}" in again
    # The last lines but the Trainer's, which have times.
    results = [[line for line in text.splitlines() if not line.startswith("{")][-3:] for text in (again, found)]
    assert results[0] == results[1]
    assert (Path("tuned") / name).read_bytes() == ended


def test_what_a_method_lacks_is_named(
    tiny_model: Path, run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    same = [f"--model={tiny_model}", "--data=second.txt"]
    with pytest.raises(SystemExit):
        run(*same, "--method=sgd", name="finetune_sft")
    error = capsys.readouterr().err
    assert all(name in error for name in ("sgd", "adamw", "apollo", "lora", "mini"))
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(SystemExit, match=r"--method lora needs peft: pip install 'apollo-triton\[recipes\]'"):
        run(*same, "--method=lora", name="finetune_sft")


BAD_DATA = {
    "ValueError: test_size=1 should be": '[{"instruction": "1 + 1?", "output": "2"}]',
    "KeyError: 'instruction'": '[{"question": "1 + 1?"}, {"question": "1 + 2?"}]',
    "KeyError: 'output'": '[{"instruction": "1 + 1?"}, {"instruction": "1 + 2?"}]',
    "--data bad.json: ": "[]",
    "--data bad.json: StopIteration": "",
    "--data bad.json: DatasetGenerationError": "instructions {",
    "TypeError": '[{"instruction": "1 + 1?", "output": "2"}, {"instruction": null, "output": "2"}]',
    "ValueError": '[{"instruction": "1 + 1?", "output": "2"}, {"instruction": "1 + 2?", "output": null}]',
}


@pytest.mark.parametrize("message", BAD_DATA)
def test_data_that_cannot_be_fine_tuned_on(message: str, questions: Path, tiny_model: Path, run: Run) -> None:
    Path("bad.json").write_text(BAD_DATA[message])
    with pytest.raises(SystemExit, match=message) as error:
        run(f"--model={tiny_model}", "--data=bad.json", name="finetune_sft")
    assert "\n" not in str(error.value)


BAD_TUNING = {
    "Invalid learning rate": ["--lr=-1"],
    "--model bare: ValueError": ["--model=bare"],
    "--model nowhere: ": ["--model=nowhere"],
    "--data pipe: FileNotFoundError": ["--data=pipe"],
}


@pytest.mark.parametrize("message", BAD_TUNING)
def test_wrong_options_of_fine_tuning(
    message: str, questions: Path, tiny_model: Path, run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)  # else it tries to reach it for 40 seconds
    Path("bare").mkdir()
    (Path("bare") / "config.json").write_text((tiny_model / "config.json").read_text())
    os.mkfifo("pipe")
    with pytest.raises(SystemExit) as error:
        run(f"--model={tiny_model}", "--data=questions.json", *BAD_TUNING[message], name="finetune_sft")
    assert message in f"{error.value} {capsys.readouterr().err}"


def test_a_number_of_processes_that_cannot_share_a_step(
    questions: Path, tiny_model: Path, run: Run, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three processes with 12 sequences a step, where 16 are asked for."""
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(SystemExit):
        run(f"--model={tiny_model}", "--data=questions.json", name="finetune_sft")
    assert "BATCH, 16, must be a multiple of the 12 sequences" in capsys.readouterr().err


def test_the_file_needs_no_other_of_the_repository() -> None:
    """A copy of the one file, as its readers take it, that imports from a folder which they have not."""
    examples = ROOT / "examples"
    tree = ast.parse((examples / "finetune_sft.py").read_text())
    modules = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    modules |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert {"apollo_triton", "transformers"} <= modules
    assert not {name.partition(".")[0] for name in modules} & {path.stem for path in examples.iterdir()}
