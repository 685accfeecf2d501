"""The folder of a recipe's run, where what lies in it is damaged, or something else than a run has left there."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from distributed_cases import needs_fsdp_on_a_cpu
from recipe_cases import SMALL, Run, losses

from apollo_triton.tools import checkpoints as files

pytest.importorskip("transformers")
pytest.importorskip("datasets")
from pretraining import checkpoints

SAME = ["--config=60m", "--data=texts.jsonl", "--steps=4", *SMALL, "--folder=run"]


@pytest.fixture
def begun(run: Run) -> Path:
    """A run that has reached its second step."""
    run(*SAME, "--until=2", "--evaluate-every=0")
    return Path("run/step-2")


def refused(run: Run, *options: str) -> str:
    with pytest.raises(SystemExit) as error:
        run(*SAME, "--evaluate-every=0", *options)
    message = str(error.value)
    assert message.isprintable()
    return message


def sealed(path: Path, value: object) -> None:
    torch.save(value, path)
    files.seal(path)


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)


def replace_by_fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


DAMAGE: dict[str, tuple[str, Callable[[Path], None], str]] = {
    "a bit of the weights": ("model.pt", flip, "is damaged: its checksum is not that of its content"),
    "a bit of the state": ("optimizer.pt", flip, "is damaged"),
    "a bit of the place": ("rank-0.pt", flip, "is damaged"),
    "half a file": ("optimizer.pt", lambda path: os.truncate(path, 1000), "does not end in its checksum"),
    "of an earlier version": (
        "model.pt",
        lambda path: torch.save({"model": {}}, path),
        "or an earlier apollo-triton wrote it",
    ),
    "no file": ("rank-0.pt", Path.unlink, "cannot be read (No such file or directory)"),
    "a FIFO": ("model.pt", replace_by_fifo, "is a pipe or a device; a file is needed"),
    "weights of another model": ("model.pt", lambda path: sealed(path, {"model": {"a": 1}}), "cannot be loaded"),
    "no state": ("optimizer.pt", lambda path: sealed(path, {"optimizer": 3}), "its optimizer is 3, which is no dict"),
    "no place": (
        "rank-0.pt",
        lambda path: sealed(path, {"training": {"rest": 1, "epoch": 0}, "reports": {}}),
        "the place in the data is none",
    ),
}


@pytest.mark.slow
def test_a_damaged_checkpoint_is_named_and_stays(begun: Path, run: Run) -> None:
    """Weights that are taken with a flipped bit, a traceback, a FIFO that is waited for."""
    shutil.copytree(begun, "good")
    for name, change, message in DAMAGE.values():
        change(begun / name)
        found = refused(run)
        assert message in found
        assert str(begun) in found
        assert "give another --folder, or delete run/step-2" in found
        shutil.rmtree(begun)
        shutil.copytree("good", begun)
    assert list(losses(run(*SAME, "--evaluate-every=0"))) == [3, 4]


@pytest.mark.slow
def test_other_things_in_the_folder(begun: Path, run: Run) -> None:
    """A name that is no number, a file or a link where the next checkpoint is made, a link that is followed."""
    target = Path("target")
    target.mkdir()
    (target / "kept").write_text("as it was")
    Path("run/unfinished").symlink_to(target.resolve())
    (Path("run") / "step-old").mkdir()
    Path("run/step-9").write_text("no folder")
    config = Path("config-of-another")
    config.write_text("as it was")
    Path("run/config.json").unlink()
    Path("run/config.json").symlink_to(config.resolve())
    assert list(losses(run(*SAME, "--evaluate-every=0", "--until=3"))) == [3]
    Path("run/unfinished").write_text("no folder")
    Path("run/loss.png").unlink()
    Path("run/loss.png").mkdir()
    last = run(*SAME, "--evaluate-every=0")
    assert list(losses(last)) == [4]
    assert "there is no picture of the losses: run/loss.png is a folder" in last
    assert (target / "kept").read_text() == config.read_text() == "as it was"


SETTINGS = {
    "half": ('{"method": ', "run.json cannot be read"),
    "a list": ("[1]", r"run.json holds \[1\], not the settings"),
    "nested": ("[" * 10**5, "run.json cannot be read"),
    "escapes": ('{"\\u001b[2J": "\\u001b[2J"}', r"holds a run with \\x1b\[2J='\\x1b\[2J'"),
    "a FIFO": (None, "run.json is a pipe or a device"),
}


def test_settings_that_are_broken(texts: Path) -> None:
    """Tracebacks of json, TypeError and AttributeError."""
    folder = Path("run")
    (folder / "step-1").mkdir(parents=True)
    for content, message in SETTINGS.values():
        if content is None:
            replace_by_fifo(folder / "run.json")
        else:
            (folder / "run.json").write_text(content)
        with pytest.raises(SystemExit, match=message) as error:
            checkpoints.begin(folder, {})
        assert str(error.value).isprintable()
        assert len(str(error.value)) < 500


def test_a_save_that_fails_keeps_the_checkpoint_before_it(
    begun: Path, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(files, "seal", full)
        assert re.match(
            r"--folder run: step 4 cannot be saved \(.*No space left.*\); the checkpoint before", refused(run)
        )
    assert checkpoints.newest(Path("run")) == 2
    assert list(losses(run(*SAME, "--evaluate-every=0"))) == [3, 4]


@needs_fsdp_on_a_cpu
@pytest.mark.slow
@pytest.mark.parametrize("name", ["__0_0.distcp", pytest.param(".metadata", marks=pytest.mark.full)])
def test_a_damaged_shard_is_named(name: str, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of PyTorch's distributed checkpoints, which have no checksum of their own."""
    for variable, value in {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": 1, "MASTER_ADDR": "127.0.0.1"}.items():
        monkeypatch.setenv(variable, str(value))
    monkeypatch.setenv("MASTER_PORT", "0")
    run(*SAME, "--parallel=fsdp", "--until=1", "--evaluate-every=0")
    flip(Path("run/step-1/sharded") / name)
    try:
        assert f"run/step-1/sharded/{name} is damaged" in refused(run, "--parallel=fsdp")
    finally:
        dist.destroy_process_group()
