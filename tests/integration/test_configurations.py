"""The optimizer from a framework's configuration alone, as docs/frameworks.md shows it: each file of that page goes
through the framework's own code, which makes the optimizer, trains and goes on from a checkpoint.

``tests/support/framework_programs.py`` has these ways through the frameworks. Those with a stack of their own are in
folders that make test-all fills (tests/integration/programs).
"""

from __future__ import annotations

import importlib
import json
import re
import shlex
from pathlib import Path
from typing import Any

import framework_programs
import pytest
import yaml
from programs import ROOT, ended_well, installed, run_program

pytestmark = pytest.mark.filterwarnings("ignore")

PAGE = (ROOT / "docs" / "frameworks.md").read_text(encoding="utf-8")
PROGRAM = str(ROOT / "tests" / "support" / "framework_programs.py")
MATRICES = {"layers.0.self_attn.weight", "layers.0.mlp.weight"}
EMBEDDING, HEAD = "embed_tokens.weight", "lm_head.weight"
Found = dict[str, Any]
Group = dict[str, Any]


def blocks(title: str, kind: str) -> list[str]:
    """The blocks of a section of the page."""
    text = PAGE.split(f"\n## {title}\n")[1].split("\n## ")[0]
    found = re.findall(rf"^```{kind}\n(.+?)^```$", text, re.MULTILINE | re.DOTALL)
    assert found, f"docs/frameworks.md: {title} has no {kind}"
    return found


def arguments(title: str) -> list[str]:
    """What follows the module in a section's command."""
    (block,) = blocks(title, "sh")
    words = shlex.split(block.replace("\\\n", " "))
    return words[words.index("-m") + 2 :]


def run(tool: str, text: str, place: Path, *launcher: str, before: tuple[Path, ...] = ()) -> Found:
    """What the program prints with this configuration, in a process of its own."""
    (place / "configuration").write_text(text, encoding="utf-8")
    folders = [str(folder) for folder in before]
    found = run_program(*launcher, PROGRAM, tool, "configuration", cwd=place, before=folders)
    assert ended_well(found), f"{found.stdout[-2000:]}\n{found.stderr[-4000:]}"
    return json.loads(found.stdout.splitlines()[-1])


def low_rank_of(found: Found, **keys: Any) -> set[str]:
    """The names of the low-rank weights. It is our optimizer, with these options in each group, and it trained."""
    assert found["optimizers"] == ["APOLLOAdamW"]
    for group in found["groups"]:
        assert {name: group[name] for name in keys} == keys
    assert found["losses"][-1] < found["losses"][0], found["losses"]
    assert found["resumed"]
    return {name for group in found["groups"] if group.get("rank") for name in group["names"]}


def group_of(found: Found, parameter: str) -> Group:
    (group,) = [group for group in found["groups"] if parameter in group["names"]]
    return group


def without_names(found: Found) -> bool:
    return any("without names" in warning for warning in found["warnings"])


@pytest.mark.slow
def test_hydra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra's lists refused as betas or target_modules, or saved, where torch.load refuses them; options that are lost
    on the way; names that are."""
    pytest.importorskip("hydra")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "hydra.yaml").write_text(*blocks("Hydra", "yaml"), encoding="utf-8")
    found = framework_programs.run("hydra", "hydra.yaml")
    assert low_rank_of(found, betas=(0.9, 0.95)) == MATRICES
    assert group_of(found, EMBEDDING)["lr"] == 3e-4
    assert group_of(found, HEAD)["lr"] == 1e-3
    assert not without_names(found)


def in_yaml(title: str) -> list[tuple[str, dict[str, Any]]]:
    """The dotted paths of a section's optimizers, and their keywords."""
    found = []
    for block in blocks(title, "yaml"):
        section = yaml.safe_load(block)
        keys = section.get("model", section)["optimizer"]
        path = next(keys.pop(name) for name in ("_target_", "_component_", "class_path") if name in keys)
        found.append((path, keys.get("init_args", keys)))
    return found


@pytest.mark.parametrize("title", ["Hydra", "Lightning's CLI", "torchtune", "NeMo AutoModel"])
def test_the_files_name_options_that_exist(title: str) -> None:
    """An option that was renamed, a class that moved, a value that YAML reads as a text: found without the framework.
    It is called as hydra.utils.instantiate, torchtune.config.instantiate and NeMo's factory call: the path imported, a
    model's parameters, and the file's keywords."""
    for path, keys in in_yaml(title):
        keys.pop("param_group_overrides", None)  # NeMo's own
        module, _, name = path.rpartition(".")
        model = framework_programs.Model()
        named = "target_modules" in keys
        optimizer = getattr(importlib.import_module(module), name)(
            model.named_parameters() if named else model.parameters(), **keys
        )
        low_rank = [group for group in optimizer.param_groups if "rank" in group]
        assert [group["rank"] for group in low_rank] == [256]
        assert len(low_rank[0]["params"]) == (2 if named else 4)


@pytest.mark.full
@pytest.mark.parametrize(("number", "low_rank"), [(0, {EMBEDDING, HEAD} | MATRICES), (1, MATRICES)])
def test_lightning(number: int, low_rank: set[str], tmp_path: Path) -> None:
    """A type in the signature that jsonargparse cannot read, or that turns a value into another; a default that it
    passes as if it had been asked for; names that are lost; a checkpoint of Lightning's that does not resume."""
    pytest.importorskip("lightning")
    pytest.importorskip("jsonargparse")
    found = run("lightning", blocks("Lightning's CLI", "yaml")[number], tmp_path)
    assert low_rank_of(found) == low_rank
    assert without_names(found) == (number == 0)
    assert group_of(found, "layers.0.norm.weight")["lr"] == (3e-4 if number == 0 else 1e-3)
    if number == 1:
        assert group_of(found, EMBEDDING)["lr"] == 3e-4
        assert {group["state_dtype"] for group in found["groups"]} == {"bfloat16"}


@pytest.mark.full
@pytest.mark.parametrize("in_backward", [False, True])
def test_torchtune(in_backward: bool, tmp_path: Path) -> None:
    """An optimizer of one norm that is refused, so that optimizer_in_bwd cannot be used; losses that it changes."""
    (file,) = blocks("torchtune", "yaml")
    text = file + f"optimizer_in_bwd: {in_backward}\n".lower()
    found = run("torchtune", text, tmp_path, before=(installed("torchtune"),))
    low_rank = low_rank_of(found, lr=2e-5, stochastic_rounding=True)
    parts = [f"attn.{name}_proj" for name in ("q", "k", "v", "output")] + [f"mlp.w{number}" for number in (1, 2, 3)]
    assert low_rank == {"tok_embeddings.weight"} | {f"layers.0.{part}.weight" for part in parts}
    assert without_names(found)
    assert group_of(found, "norm.scale")["weight_decay"] == 0


@pytest.mark.full
def test_verl(tmp_path: Path) -> None:
    """Keys that verl's configuration refuses, an override that does not reach the optimizer."""
    pytest.importorskip("hydra")
    text = "\n".join(arguments("verl"))
    found = run("verl", text, tmp_path, before=(installed("verl"),))
    assert low_rank_of(found, betas=[0.9, 0.999]) == {EMBEDDING, HEAD} | MATRICES
    assert without_names(found)
    assert group_of(found, HEAD)["lr"] == 2e-5
    assert group_of(found, HEAD)["weight_decay"] == 0.01  # verl's default
    assert group_of(found, "layers.0.norm.weight")["lr"] == 1e-5


@pytest.mark.full
def test_nemo_automodel(tmp_path: Path) -> None:
    """Overrides that the split loses, rates and decay that NeMo's scheduler takes away from groups, keys or state that
    do not survive torch.distributed.checkpoint with flatten_optimizer_state_dict."""
    (file,) = blocks("NeMo AutoModel", "yaml")
    found = run("nemo_automodel", file, tmp_path, before=(installed("nemo_automodel"),))
    assert low_rank_of(found, stochastic_rounding=True) == {EMBEDDING, HEAD} | MATRICES
    norm, matrix, head = (group_of(found, name) for name in ("layers.0.norm.weight", "layers.0.mlp.weight", HEAD))
    assert norm["lr"] == pytest.approx(0.5 * matrix["lr"])
    assert norm["weight_decay"] == 0
    assert head["lr"] == pytest.approx(0.1 * matrix["lr"])
    assert head["weight_decay"] == matrix["weight_decay"] == 0.01


BY_PATTERNS, BY_NAMES = "llama3_debugmodel", "llama3_debugmodel_by_names"
TORCHRUN = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2")


@pytest.mark.full
@pytest.mark.parametrize(("config", "launcher"), [(BY_NAMES, ()), (BY_PATTERNS, TORCHRUN)])
def test_torchtitan(config: str, launcher: tuple[str, ...], tmp_path: Path) -> None:
    """A key that its container adds and the optimizer refuses, names that do not arrive, groups in another order than
    their patterns, keys or state that its flat checkpoints lose, alone and under FSDP2."""
    before = (installed("torchtitan"), ROOT / "examples")
    module, path, flag, _ = arguments("torchtitan")
    text = "\n".join([module, path, flag, config])
    found = run("torchtitan", text, tmp_path, *launcher, before=before)
    parts = ("attention.qkv_linear.wqkv", "attention.wo", "feed_forward.w1", "feed_forward.w2", "feed_forward.w3")
    assert low_rank_of(found) == {f"layers.{layer}.{part}.weight" for layer in range(6) for part in parts}
    matrix = group_of(found, "layers.5.feed_forward.w2.weight")
    assert (matrix["rank"], matrix["initial_lr"], matrix["weight_decay"]) == (64, 1e-3, 0.1)
    for name, decay in (("tok_embeddings", 0.1), ("lm_head", 0.1), ("layers.0.ffn_norm", 0.0)):
        dense = group_of(found, f"{name}.weight")
        assert (dense["initial_lr"], dense["weight_decay"]) == (3e-4, decay)
        assert dense["lr"] == pytest.approx(0.3 * matrix["lr"])  # their schedule
    assert not without_names(found)


@pytest.mark.full
def test_the_command_for_torchtitan(tmp_path: Path) -> None:
    """A configuration of the page's command that does not exist, or whose targets are no weights of Llama 3 8B."""
    program = (
        "import json, sys, torch\n"
        "from torchtitan.config import ConfigManager\n"
        "config = ConfigManager().parse_args(sys.argv[1:])\n"
        "with torch.device('meta'):\n"
        "    model = config.model_spec.model.build()\n"
        "(optimizer,) = config.optimizer.build(model_parts=[model])\n"
        "print(json.dumps({group['name']: len(group['params']) for group in optimizer.param_groups}))\n"
    )
    before = [str(installed("torchtitan")), str(ROOT / "examples")]
    found = run_program("-c", program, *arguments("torchtitan"), cwd=tmp_path, before=before)
    assert found.returncode == 0, found.stderr[-4000:]
    counts = json.loads(found.stdout.splitlines()[-1])
    assert counts == {"low-rank": 5 * 32, "dense": 1, "embeddings": 1, "norms and biases": 2 * 32 + 1}
