"""LLaMA-Factory, axolotl and TRL by their own command lines, with commands and keys read out of docs/tools.md.

The first two have folders of their own (tests/integration/programs, the Makefile), with the transformers that each asks
for. Which optimizer ran is read from the checkpoint that it left: only this package's groups have ``state_bits``.
"""

from __future__ import annotations

import json
import os
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("trl")
yaml = pytest.importorskip("yaml")

from programs import ROOT, installed, run_program  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

from apollo_triton import APOLLOAdamW  # noqa: E402

pytestmark = pytest.mark.full
PAGE = (ROOT / "docs" / "tools.md").read_text()
WIDTH, RANK, STEPS = 320, 256, 8
BIASES, DENSE, MATRICES = 4, 5, 7  # of attention; embedding, head and three norms; attention and MLP


def section(title: str) -> tuple[list[str], dict[str, Any], str]:
    """The command, the YAML and what is left of one section of the page."""
    text = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    command = re.search(r"^```sh\npython (.+)\n```$", text, re.MULTILINE)
    keys = re.search(r"^```yaml\n(.+?)^```$", text, re.MULTILINE | re.DOTALL)
    assert command, f"docs/tools.md: {title} has no command"
    assert keys, f"docs/tools.md: {title} has no YAML"
    return shlex.split(command[1]), yaml.safe_load(keys[1]), text


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with a small LLaMA, its tokenizer of numbers, and texts that count on."""
    words = ["<unk>", "<s>", "</s>", *(str(number) for number in range(50))]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    names = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>", "pad_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(tmp_path / "model")
    torch.manual_seed(0)
    sizes = {"hidden_size": WIDTH, "intermediate_size": WIDTH, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = LlamaConfig(**sizes, vocab_size=len(words), attention_bias=True, bos_token_id=1, eos_token_id=2)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    lines = (" ".join(str((start + index) % 50) for index in range(16)) for start in range(64))
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "counting.jsonl").write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    described = {"counting": {"file_name": "counting.jsonl", "columns": {"prompt": "text"}}}
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(described))
    return tmp_path


def run(tool: str, arguments: list[str], keys: dict[str, Any], place: Path, folder: Path | None = None) -> Path:
    """Run a command of the page on a file with these keys; the checkpoint that it leaves."""
    name = Path(arguments[-1]).name
    (place / name).write_text(yaml.safe_dump(keys))
    first = [str(folder)] if folder else []
    path = os.pathsep.join([*(f"{each}/bin" for each in first), os.environ["PATH"]])
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(place / "hub"), "AXOLOTL_DO_NOT_TRACK": "1"}
    before = [str(place / "modules"), *first]
    found = run_program(*arguments, cwd=place, before=before, PATH=path, ACCELERATE_USE_CPU="true", **offline)
    assert found.returncode == 0, f"{tool}: {found.stdout[-2000:]}\n{found.stderr[-4000:]}"
    return place / str(keys["output_dir"]) / f"checkpoint-{STEPS}"


def losses(checkpoint: Path) -> list[float]:
    history = json.loads((checkpoint / "trainer_state.json").read_text())["log_history"]
    return [entry["loss"] for entry in history if "loss" in entry]


def groups(checkpoint: Path) -> list[dict[str, Any]]:
    """What the optimizer saved, of groups that hold anything; it is ours, and it trained."""
    saved = torch.load(checkpoint / "optimizer.pt", weights_only=True)
    found = [group for group in saved["param_groups"] if group["params"]]
    assert all("state_bits" in group for group in found), found
    for group in found:
        for index in group["params"] if "rank" in group else []:
            assert sorted(saved["state"][index]["exp_avg"].shape) == [RANK, WIDTH]
    whole = losses(checkpoint)
    assert len(whole) == STEPS, whole
    assert min(whole[-3:]) < whole[0] - 1, whole
    return found


def counts(found: list[dict[str, Any]]) -> list[int]:
    return [len(group["params"]) for group in found]


def test_llama_factory(place: Path) -> None:
    """Its three groups with an option lost on the way, decay where it has none or none where it has; layer-wise updates
    that leave the trajectory (at a constant learning rate: it does not hand them its schedule, as the page says)."""
    folder = installed("llamafactory")
    arguments, keys, _ = section("LLaMA-Factory")
    (place / "modules").mkdir()
    (place / "modules" / "torchaudio.py").write_text('"""Imported by LLaMA-Factory; released builds need CUDA."""\n')
    common = {"stage": "pt", "do_train": True, "finetuning_type": "full", "model_name_or_path": "model"}
    common |= {"dataset": "counting", "dataset_dir": "data", "cutoff_len": 16, "report_to": "none", "use_cpu": True}
    common |= {"max_steps": STEPS, "per_device_train_batch_size": 4, "gradient_accumulation_steps": 1}
    common |= {"logging_steps": 1, "save_steps": STEPS, "max_grad_norm": 0.0, "lr_scheduler_type": "constant"}
    plain = run("llamafactory", arguments, keys | common | {"output_dir": "plain"}, place, folder)
    found = groups(plain)
    assert counts(found) == [BIASES, DENSE, MATRICES]
    assert [group["weight_decay"] for group in found] == [0.0, keys["weight_decay"], keys["weight_decay"]]
    assert [group["initial_lr"] for group in found] == [keys["learning_rate"]] * 3
    assert ["rank" in group for group in found] == [False, False, True]
    low_rank = found[2]
    for name in ("rank", "scale", "scale_type", "scale_front"):
        assert low_rank[name] == keys[f"apollo_{name}"], name
    assert low_rank["update_proj_gap"] == keys["apollo_update_interval"]
    layerwise = keys | common | {"output_dir": "layerwise", "apollo_layerwise": True}
    again = losses(run("llamafactory", arguments, layerwise, place, folder))
    assert again == pytest.approx(losses(plain), abs=1e-3)


def check_the_string(found: list[dict[str, Any]], keys: dict[str, Any]) -> None:
    """Two groups of the Trainer, the options of optim_args, and no weight decay, as the page says."""
    assert counts(found) == [BIASES + DENSE, MATRICES]
    assert ["rank" in group for group in found] == [False, True]
    assert [group["weight_decay"] for group in found] == [0.0, 0.0]
    assert [group["initial_lr"] for group in found] == [keys["learning_rate"]] * 2
    asked = dict(pair.split("=") for pair in keys["optim_args"].split(","))
    assert {name: str(found[1][name]) for name in asked} == asked
    assert [group["eps"] for group in found] == [1e-6, 1e-7]


def test_axolotl(place: Path) -> None:
    """The string or its options lost between axolotl's schema, accelerate's launcher and the Trainer; a page that says
    otherwise of decay and eps than what happens."""
    folder = installed("axolotl")
    arguments, keys, _ = section("axolotl")
    data = [{"path": "data/counting.jsonl", "ds_type": "json", "type": "completion"}]
    common = {"base_model": "model", "datasets": data, "dataset_prepared_path": "prepared", "sequence_len": 16}
    common |= {"output_dir": "out", "max_steps": STEPS, "micro_batch_size": 4, "gradient_accumulation_steps": 1}
    common |= {"logging_steps": 1, "save_steps": STEPS, "bf16": False, "weight_decay": 0.01, "adam_epsilon": 1e-7}
    check_the_string(groups(run("axolotl", arguments, keys | common, place, folder)), keys)


def trl_keys() -> dict[str, Any]:
    common = {"output_dir": "out", "max_steps": STEPS, "per_device_train_batch_size": 4, "logging_steps": 1}
    return common | {"save_steps": STEPS, "report_to": "none", "use_cpu": True, "bf16": False}


def test_trl(place: Path) -> None:
    """As for axolotl: the string or its options lost between TRL's parser, accelerate's launcher and the Trainer."""
    arguments, keys, _ = section("TRL")
    common = trl_keys() | {"model_name_or_path": "model", "dataset_name": "data"}
    common |= {"weight_decay": 0.01, "adam_epsilon": 1e-7}
    check_the_string(groups(run("trl", arguments, keys | common, place)), keys)


def test_trl_is_given_the_optimizer(place: Path) -> None:
    """The page's program: an SFTTrainer that replaces the optimizer, or loses its decay."""
    from datasets import load_dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig

    program = re.search(r"^```python\n(.+?)^```$", section("TRL")[2], re.MULTILINE | re.DOTALL)
    assert program
    model = LlamaForCausalLM.from_pretrained(place / "model")
    options = trl_keys() | {"output_dir": str(place / "out"), "disable_tqdm": True}
    names = {
        "model": model,
        "args": SFTConfig(**options),
        "data": load_dataset("json", data_files=str(place / "data" / "counting.jsonl"), cache_dir=place)["train"],
        "tokenizer": AutoTokenizer.from_pretrained(place / "model"),
    }
    exec(program[1], names)
    assert type(names["optimizer"]) is APOLLOAdamW
    names["trainer"].train()
    found = groups(place / "out" / f"checkpoint-{STEPS}")
    assert [group["name"] for group in found] == ["low-rank", "dense", "embeddings", "norms and biases"]
    assert counts(found) == [MATRICES, 1, 1, BIASES + DENSE - 2]
    assert [group["weight_decay"] for group in found] == [0.01, 0.01, 0.01, 0]
