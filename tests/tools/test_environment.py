"""apollo-triton env: what a report of a bug needs, also where a library is broken."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from apollo_triton import __version__, cli
from apollo_triton.core import backend as backends
from apollo_triton.tools import environment


def printed(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert cli.main(["env", *options]) == 0
    return capsys.readouterr().out


def test_a_table_that_an_issue_shows(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that breaks the table, a version that is not the installed one, a package that is not there."""
    monkeypatch.setenv("TRITON_CACHE_DIR", "a|b\nc")
    monkeypatch.setenv("UNRELATED", "of the user")
    monkeypatch.setattr(environment, "_PACKAGES", ("numpy", "not-installed"))
    lines = printed(capsys).splitlines()
    assert lines[:2] == [f"| apollo-triton | {__version__} |", "|---|---|"]
    assert all(line.count("|") == 3 for line in lines), lines
    assert f"| numpy | {importlib.metadata.version('numpy')} |" in lines
    assert "| TRITON_CACHE_DIR | a/b c |" in lines
    assert not any("not-installed" in line or "UNRELATED" in line for line in lines)


def test_json_has_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(printed(capsys, "--json"))
    assert found["apollo-triton"] == __version__
    assert found["torch"].startswith(f"{torch.__version__}, built for ")
    assert found["cpu"].startswith('backend="auto" is reference: ')


def test_secrets_stay(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A table that is pasted into a public issue with a password in it."""
    monkeypatch.setenv("ACCELERATE_API_TOKEN", "hush")
    monkeypatch.setenv("TRITON_REMOTE", "https://user:hush@host")
    text = printed(capsys)
    assert "| ACCELERATE_API_TOKEN | (set) |" in text
    assert "| TRITON_REMOTE | (set) |" in text
    assert "hush" not in text


def fails(error: BaseException) -> Any:
    def ask(*arguments: Any, **options: Any) -> None:
        raise error

    return ask


def test_what_is_broken_is_a_line_and_not_the_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report of a broken driver or triton that ends in a traceback of its own."""
    monkeypatch.setattr(environment, "choose", fails(RuntimeError("driver\nis gone")))
    monkeypatch.setattr(torch.cuda, "device_count", fails(RuntimeError("no driver")))
    monkeypatch.setattr(subprocess, "run", fails(FileNotFoundError("git")))
    found = json.loads(printed(capsys, "--json"))
    assert found["cpu"] == "not known: RuntimeError: driver is gone"
    assert found["checkout"].startswith(("not known: FileNotFoundError: git", "none, installed in "))


def test_a_broken_package_is_a_line(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """An installation that was cut off, whose version is not written anywhere."""
    monkeypatch.setattr(environment, "_PACKAGES", ("numpy",))
    monkeypatch.setattr(importlib.metadata, "version", fails(KeyError("Version")))
    assert "| numpy | not known: KeyError: 'Version' |" in printed(capsys).splitlines()


def test_a_triton_without_a_specification_is_a_line(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stub in triton's place, of which find_spec says ValueError."""
    monkeypatch.setattr(environment, "_PACKAGES", ("triton",))
    monkeypatch.setattr(importlib.metadata, "version", fails(importlib.metadata.PackageNotFoundError("triton")))
    monkeypatch.setitem(sys.modules, "triton", types.ModuleType("triton"))
    [line] = [line for line in printed(capsys).splitlines() if line.startswith("| triton |")]
    assert line.startswith("| triton | not known: ValueError: ")


def test_a_gpu_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    """The name, the capability and the memory that decide which kernels run, and why auto takes which."""

    class Properties:
        name, major, minor, total_memory = "Some GPU", 7, 5, 16_000_000_000

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: Properties)
    monkeypatch.setattr(environment, "choose", lambda tensor, asked: backends.Backend("reference", "it is old"))
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda size, device: empty(size, device="meta"))
    found = dict(environment.facts())
    assert found["cuda:0"] == 'Some GPU, capability 7.5, 16.0 GB; backend="auto" is reference: it is old'


def test_a_broken_triton_is_not_called_a_missing_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """triton 3.2 without setuptools: the advice to install what is there."""
    obstacle = backends._triton_obstacle.__wrapped__
    monkeypatch.setitem(sys.modules, "triton", None)
    assert str(obstacle()).startswith("triton is not installed: in a checkout pip install")
    monkeypatch.delitem(sys.modules, "triton")
    (tmp_path / "triton.py").write_text("import gone_with_the_wind")
    monkeypatch.syspath_prepend(tmp_path)
    assert "triton cannot be imported: ModuleNotFoundError" in str(obstacle())
