"""apollo-triton env: what a report of a bug needs, also where a library is broken."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import subprocess
import sys
import types
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from apollo_triton import __version__, cli
from apollo_triton.core import device_backend as backends
from apollo_triton.tools import environment


def printed(capsys: pytest.CaptureFixture[str], *options: str) -> str:
    assert cli.main(["env", *options]) == 0
    return capsys.readouterr().out


def test_a_table_that_an_issue_shows(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """A value that breaks the table, a version that is not the installed one, a package that is not there."""
    monkeypatch.setenv("TORCH_A|B\x1b[31m", "1")
    monkeypatch.setattr(environment, "_checkout", lambda: "a|b\nc\x1b")
    monkeypatch.setenv("UNRELATED", "of the user")
    monkeypatch.setattr(environment, "_PACKAGES", ("numpy", "not-installed"))
    lines = printed(capsys).splitlines()
    assert lines[:2] == [f"| apollo-triton | {__version__} |", "|---|---|"]
    assert all(line.count("|") == 3 for line in lines), lines
    assert f"| numpy | {importlib.metadata.version('numpy')} |" in lines
    assert "| checkout | a/b c |" in lines
    assert "| TORCH_A/B [31m | (set) |" in lines
    assert not any("not-installed" in line or "UNRELATED" in line for line in lines)


def test_json_has_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    found = json.loads(printed(capsys, "--json"))
    assert found["apollo-triton"] == __version__
    assert found["torch"].startswith(f"{torch.__version__}, built for ")
    assert found["cpu"].startswith('backend="auto" is reference: ')


def test_what_decides_which_kernels_run_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    """A report in which everything is hidden."""
    shown = {
        "TRITON_INTERPRET": "1",
        "CUDA_VISIBLE_DEVICES": "0,1,7",
        "HIP_VISIBLE_DEVICES": "-1",
        "CUDA_LAUNCH_BLOCKING": "1",
        "CUDA_HOME": "/usr/local/cuda-12.4",
        "TRITON_PTXAS_PATH": "/usr/local/cuda/bin/ptxas",
        "OMP_NUM_THREADS": "16",
        "NCCL_DEBUG": "INFO",
        "NCCL_P2P_DISABLE": "1",
        "PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:True,max_split_size_mb:128",
        "TORCH_CUDA_ARCH_LIST": "8.0;9.0a+PTX",
        "ACCELERATE_MIXED_PRECISION": "bf16",
        "WORLD_SIZE": "8",
    }
    for name, value in shown.items():
        monkeypatch.setenv(name, value)
    found = dict(environment.facts())
    assert {name: found[name] for name in shown} == shown


SECRET = "h" + "unter2-made-up"
WORDS = [
    "PASSWD",
    "PASSPHRASE",
    "AUTH",
    "PW",
    "CRED",
    "token",
    "api_key",
    "Proxy",
    "URL",
    "ENDPOINT",
    "USER",
    "DIR",
    "X",
]
KNOWN = ["NCCL_DEBUG", "CUDA_VISIBLE_DEVICES", "OMP_NUM_THREADS", "PYTORCH_CUDA_ALLOC_CONF", "CUDA_HOME", "RANK"]
KNOWN += ["ACCELERATE_MIXED_PRECISION", "TRITON_PTXAS_PATH", "TORCH_CUDA_ARCH_LIST", "TRITON_INTERPRET"]
NAMES = st.lists(st.sampled_from(WORDS), min_size=1).map("_".join)
SETTINGS = st.sampled_from(KNOWN) | st.builds(str.__add__, st.sampled_from(environment._PREFIXES), NAMES)
AROUND = st.sampled_from(["", "1", "1,", "INFO", "https://user:", "https://x/?token=", "/usr/local/", "/home/", "a="])


@given(SETTINGS, AROUND, AROUND)
def test_no_value_of_the_environment_is_a_secret(name: str, before: str, after: str) -> None:
    """A table that is pasted into a public issue with a password in it."""
    with mock.patch.dict(os.environ, {name: f"{before}{SECRET}{after}"}):
        found = dict(environment._settings())
    assert found[name] == "(set)"
    assert SECRET not in str(found)


@given(SETTINGS, st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=7))
def test_a_value_is_shown_only_if_its_setting_can_have_it(name: str, value: str) -> None:
    with mock.patch.dict(os.environ, {name: value}):
        assert dict(environment._settings())[name] in ("(set)", *re.findall(r"^[\d,.;+]+$", value))


TEXTS = {
    f"https://user:{SECRET}@host/x": "https://host/x",
    f"cannot open https://host/x?sig={SECRET}&y#z: gone": "cannot open https://host/x?(hidden) gone",
    "/home/made-up/lib/x.so: no such file": "~/lib/x.so: no such file",
    "C:\\Users\\made-up\\x.dll": "C:~\\x.dll",
    f"api_key={SECRET} is wrong": "api_key=(hidden) is wrong",
    f"DB_PW={SECRET};x": "DB_PW=(hidden);x",
    "NVIDIA driver on your system is too old (found version 11040)": None,
    "Command '['git', '-C', '/opt/x', 'rev-parse']' returned non-zero exit status 128": None,
}


@pytest.mark.parametrize(("text", "public"), TEXTS.items())
def test_what_an_error_says_is_made_public(text: str, public: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message of a driver or of git, with an address, a password or a home folder in it."""
    monkeypatch.setattr(environment, "_checkout", fails(RuntimeError(text)))
    assert dict(environment.facts())["checkout"] == f"not known: RuntimeError: {text if public is None else public}"


def test_a_secret_of_the_environment_is_in_no_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    """An error that shows a variable which is not listed."""
    monkeypatch.setenv("my_service_passwd", SECRET)
    monkeypatch.setenv("HOME", "/srv/people/made-up")
    monkeypatch.setattr(environment, "device_backend", fails(RuntimeError(f"login {SECRET} at /srv/people/made-up/x")))
    text = printed(capsys, "--json")
    assert "login (hidden) at ~/x" in text
    assert SECRET not in text
    assert "made-up" not in text


def test_the_folder_of_an_installation_is_not_the_users_home(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(environment, "__file__", "/home/made-up/venv/lib/apollo_triton/tools/environment.py")
    assert dict(environment.facts())["checkout"] == "none, installed in ~/venv/lib/apollo_triton"


def fails(error: BaseException) -> Any:
    def ask(*arguments: Any, **options: Any) -> None:
        raise error

    return ask


def test_what_is_broken_is_a_line_and_not_the_end(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The report of a broken driver or triton that ends in a traceback of its own."""
    monkeypatch.setattr(environment, "device_backend", fails(RuntimeError("driver\nis gone")))
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
    monkeypatch.setattr(environment, "device_backend", lambda tensor, asked: backends.Backend("reference", "it is old"))
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
