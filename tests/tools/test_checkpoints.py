"""Files that are replaced whole or not at all, and checkpoints that are read only if every bit is as it was."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from apollo_triton.core.files import open_regular, replaced
from apollo_triton.tools import checkpoints

VALUE = {"step": 3, "model": {"weight": torch.arange(40.0)}}
KINDS = {"step": int, "model": dict}


@pytest.fixture
def path(tmp_path: Path) -> Path:
    path = tmp_path / "some.checkpoint"
    checkpoints.save(path, VALUE)
    return path


def refused(path: Path, kinds: dict[str, type] = KINDS) -> str:
    with pytest.raises(checkpoints.NotWhole) as error:
        checkpoints.load(path, kinds, "delete it")
    message = str(error.value)
    assert message.startswith(str(path))
    assert message.endswith("; delete it")
    assert message.isprintable()
    return message


def test_what_was_saved_is_loaded(path: Path) -> None:
    loaded = checkpoints.load(path, KINDS, "")
    assert loaded["step"] == 3
    assert torch.equal(loaded["model"]["weight"], VALUE["model"]["weight"])  # type: ignore[index]
    assert torch.load(path, weights_only=True)["step"] == 3  # as README's readers do
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    os.umask(before := os.umask(0))
    assert path.stat().st_mode & 0o777 == 0o666 & ~before


@pytest.mark.parametrize("examples", [50, pytest.param(1000, marks=pytest.mark.full)])
def test_no_damage_passes_unnoticed(path: Path, examples: int) -> None:
    """52 of 80 flips of a bit in tensors passed, and 9 in the pickle were tracebacks."""
    whole = path.read_bytes()

    @settings(max_examples=examples, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    @given(st.integers(0, 8 * len(whole) - 1), st.integers(0, len(whole) - 1), st.binary(min_size=1, max_size=9))
    def damaged(bit: int, length: int, more: bytes) -> None:
        flipped = bytearray(whole)
        flipped[bit // 8] ^= 1 << bit % 8
        for content in (flipped, whole[:length], whole + more, whole[:length] + more + whole[length:]):
            path.write_bytes(content)
            refused(path)

    damaged()


@pytest.mark.parametrize("value", [[], {"step": True, "model": {}}, {"step": 3}, {"step": 3, "model": [1]}])
def test_a_whole_file_of_another_structure(path: Path, value: Any) -> None:
    torch.save(value, path)
    checkpoints.seal(path)
    assert "is no checkpoint" in refused(path)


def test_a_whole_file_that_torch_cannot_load(path: Path) -> None:
    path.write_bytes(b"no pickle")
    checkpoints.seal(path)
    assert "is no checkpoint; delete it" in refused(path)


def test_what_is_no_file(path: Path) -> None:
    """A FIFO, for which it would wait for ever; a folder; nothing."""
    path.unlink()
    assert "No such file" in refused(path)
    path.mkdir()
    assert "is a folder" in refused(path)
    path.rmdir()
    os.mkfifo(path)
    assert "is a pipe or a device; a file is needed" in refused(path)


def test_a_sealed_file_is_on_the_disk(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bug: the recipes then delete the checkpoint before it, and a loss of power leaves this one without a checksum."""
    synced: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda descriptor: synced.append(os.fstat(descriptor).st_size))
    path.write_bytes(b"shard")
    checkpoints.seal(path)
    assert synced == [path.stat().st_size]


@pytest.mark.parametrize("failing", ["torch.save", "os.replace", "apollo_triton.tools.checkpoints.seal"])
def test_a_save_that_fails_keeps_the_old_file_and_leaves_nothing(
    path: Path, failing: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full, which torch.save reports as a RuntimeError without a name."""
    before = path.read_bytes()

    def fail(*_: Any) -> None:
        raise RuntimeError("unexpected pos 64 vs 0") if failing == "torch.save" else OSError(28, "No space left")

    monkeypatch.setattr(failing, fail)
    with pytest.raises(OSError, match=r"some.checkpoint( cannot be written \(unexpected pos|'$)"):
        checkpoints.save(path, {"step": 4})
    assert path.read_bytes() == before
    assert [each.name for each in path.parent.iterdir()] == [path.name]


def test_links_fifos_and_folders_at_the_path(tmp_path: Path) -> None:
    """A link that is followed, so that its target is overwritten; a FIFO that is waited for."""
    target, link, pipe, folder = (tmp_path / name for name in ("target", "link", "pipe", "folder"))
    target.write_text("as it was")
    link.symlink_to(target)
    os.mkfifo(pipe)
    folder.mkdir()
    for path in (link, pipe):
        with replaced(path) as unfinished:
            unfinished.write_text("new")
        assert path.read_text() == "new"
        assert not path.is_symlink()
    assert target.read_text() == "as it was"
    with pytest.raises(IsADirectoryError, match=r"folder is a folder, where a file is to be written"), replaced(folder):
        pass
    with pytest.raises(FileNotFoundError, match=r"'.*missing/name'$"), replaced(tmp_path / "missing" / "name"):
        pass
    with open_regular(link) as file:
        assert file.read() == b"new"


def test_a_temporary_name_that_is_taken_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A link that someone put where the new content goes first."""
    target = tmp_path / "target"
    target.write_text("as it was")
    monkeypatch.setattr("secrets.token_hex", lambda _: "known")
    (tmp_path / ".known-name").symlink_to(target)
    with pytest.raises(FileExistsError, match=r"name'$"), replaced(tmp_path / "name"):
        pass
    assert target.read_text() == "as it was"
