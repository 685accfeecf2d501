"""examples/finetune_sft.py: settings, targets, resume, errors."""

from __future__ import annotations

import ast
import json
import math
import os
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
