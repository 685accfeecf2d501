"""apollo_triton.compat: apollo_torch by every way of asking for it, here and in processes that are started."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from programs import ROOT, run_program

from apollo_triton.compat import redirect

pytestmark = pytest.mark.slow  # processes that import torch

ASK = """
import importlib.metadata, importlib.util, apollo_torch, apollo_triton
for name in ("APOLLOAdamW", "QAPOLLOAdamW"):
    assert issubclass(getattr(apollo_torch, name), getattr(apollo_triton, name)), name
assert importlib.util.find_spec("apollo_torch").origin == apollo_torch.__file__
for name in ("apollo_torch", "apollo-torch"):
    assert importlib.metadata.version(name) == apollo_torch.__version__ == "1.0.3+apollo.triton"
"""


def python(*arguments: str, code: int = 0, **environment: str) -> subprocess.CompletedProcess[str]:
    found = run_program(*arguments, timeout=120, **environment)
    assert found.returncode == code, found.stderr
    return found


# The same without importing torch, which takes two seconds.
FIND = """
import importlib.metadata, importlib.util, pathlib
assert "stand_in" in pathlib.Path(importlib.util.find_spec("apollo_torch").origin).parts
for name in ("apollo_torch", "apollo-torch"):
    assert importlib.metadata.version(name) == "1.0.3+apollo.triton"
"""
# A rank above the width, which the official one takes: the Trainer's default of 128 on a small model.
WIDE = """
import sys, warnings, torch
from torch.nn import Parameter
for name in ("APOLLOAdamW", "QAPOLLOAdamW"):
    weights = [Parameter(torch.ones(6, 4)), Parameter(torch.ones(3, 8)), Parameter(torch.ones(9, 9))]
    dense = Parameter(torch.ones(2))
    for weight in weights:
        weight.grad = torch.randn(weight.shape)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        optimizer = getattr(apollo_torch, name)([{"params": weights, "rank": 5}, {"params": [dense]}])
    [said] = caught
    assert str(said.message).startswith("rank 5 is above the projected width of 2 weights, the narrowest 3: "), said
    assert said.filename == "<string>", "not at the line that makes the optimizer"
    optimizer.step()
    assert [tuple(optimizer.state[each]["exp_avg"].shape) for each in weights] == [(6, 5), (8, 5), (9, 5)]
    try:
        getattr(apollo_triton, name)([{"params": weights, "rank": 5}])
    except ValueError as error:
        assert "'rank_above_width': True" in str(error)
    else:
        raise AssertionError("taken without a word")
"""


NAMES = """
for name in ("GaLoreAdamW8bit", "nothing"):
    try:
        getattr(apollo_torch, name)
    except (AttributeError, ImportError) as error:
        print(f"{type(error).__name__}: {error}")
from apollo_torch import GaLoreAdamW8bit
"""


def test_what_a_program_finds_and_so_do_processes_that_it_starts() -> None:
    """A way of asking that finds nothing or another; a rank that is refused, taken in silence, or elsewhere too; names
    of others and of nobody. In one process, since most of the time would go into starting several."""
    child = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {FIND!r}], check=True)"
    call = "import apollo_triton.compat as c; c.as_apollo_torch(); c.as_apollo_torch()\n"
    found = python("-c", "\n".join([call, ASK, child, WIDE, NAMES]), code=1)
    assert "pip install galore-torch, then from galore_torch import GaLoreAdamW8bit" in found.stderr
    assert "AttributeError: module 'apollo_torch', for which apollo_triton stands in, has no 'nothing'" in found.stdout


def test_an_installed_one_is_not_shadowed_without_a_word(tmp_path: Path) -> None:
    package = tmp_path / "apollo_torch"
    package.mkdir()
    (package / "__init__.py").write_text("APOLLOAdamW = 'the official one'")
    about = tmp_path / "apollo_torch-1.0.9.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Metadata-Version: 2.1\nName: apollo-torch\nVersion: 1.0.9\n")
    first = os.pathsep.join([str(tmp_path), str(ROOT), *(path for path in sys.path if path)])
    call = "import apollo_triton.compat as c; c.as_apollo_torch()\n"
    assert "apollo-torch 1.0.9 is installed and stays unused" in python("-c", call + FIND, PYTHONPATH=first).stderr
    # Left alone where nobody asks, and refused where it is too late.
    late = "import apollo_triton, apollo_torch\nassert apollo_torch.APOLLOAdamW[0] == 't'\n" + call
    error = python("-c", late, code=1, PYTHONPATH=first).stderr
    assert f"apollo_torch is imported already, from {package}" in error


def test_a_script(tmp_path: Path) -> None:
    script = tmp_path / "train.py"
    beside = tmp_path / "beside.py"
    beside.write_text("VALUE = 7")
    script.write_text(FIND + "import sys, beside\nprint(sys.argv[1:], __name__, beside.VALUE)")
    found = python("-m", "apollo_triton.compat", str(script), "--a", "b").stdout
    assert found == "['--a', 'b'] __main__ 7\n"


WHICH = "import importlib.util as u; print(u.find_spec('apollo_torch').origin)"
OTHERS = {"folder": "apollo_torch/__init__.py", "file": "apollo_torch.py", "empty": "apollo_torch/README"}


def place(folder: Path, other: str) -> None:
    path = folder / OTHERS[other]
    path.parent.mkdir(exist_ok=True, parents=True)
    path.write_text("")


@pytest.mark.parametrize("other", ["folder", "file"])
@pytest.mark.parametrize("way", ["script", "link", "module", "launcher", "launched module", "launched text"])
def test_one_that_python_finds_first_is_not_used_in_silence(way: str, other: str, tmp_path: Path) -> None:
    """A copy of the official package beside the script, or in the current folder with -m: it would be used, while the
    output says that an installed one is not."""
    place(tmp_path / "own", other)
    script = tmp_path / "own" / "train.py"
    script.write_text(WHICH)
    link = tmp_path / "link.py"
    link.symlink_to(script)
    launcher = tmp_path / "launch"
    launcher.write_text("#!/bin/sh\n")
    launcher.chmod(0o755)
    arguments = {
        "script": [str(script)],
        "link": [str(link)],
        "module": ["-m", "train"],
        "launcher": ["launch", "--nproc", "2", str(script)],
        "launched module": ["launch", "-m", "train"],
        "launched text": ["launch", "-c", "import train"],
    }[way]
    found = run_program(
        "-m", "apollo_triton.compat", *arguments, cwd=tmp_path / "own", PATH=f"{tmp_path}{os.pathsep}{os.defpath}"
    )
    assert found.returncode == 2
    assert f"Python would use the apollo_torch in {tmp_path / 'own'}, and not apollo_triton" in found.stderr
    assert not found.stdout


def test_a_folder_without_a_package_changes_nothing(tmp_path: Path) -> None:
    """A folder of results called apollo_torch, which Python does not import while there is a package."""
    place(tmp_path, "empty")
    (tmp_path / "train.py").write_text(WHICH)
    found = run_program("-m", "apollo_triton.compat", "train.py", cwd=tmp_path)
    assert found.returncode == 0
    assert "stand_in" in found.stdout
    assert str(tmp_path) not in found.stderr


def test_in_the_process_itself_it_stays_unused_and_is_named(tmp_path: Path) -> None:
    place(tmp_path, "folder")
    script = tmp_path / "train.py"
    script.write_text(f"import apollo_triton.compat as c\nc.as_apollo_torch()\nc.as_apollo_torch()\n{WHICH}")
    for environment in ({}, {"PYTHONPATH": os.pathsep.join([redirect._FOLDER, str(ROOT)])}):  # here, and inherited
        found = run_program(str(script), **environment)
        assert "stand_in" in found.stdout, found.stderr
        assert found.stderr.count("UserWarning: ") == 1
        assert f"train.py:2: UserWarning: the apollo_torch in {tmp_path} stays unused here" in found.stderr


@pytest.mark.parametrize(
    ("name", "runs"), [("tool", "the command"), ("./tool", "the file"), ("tool.py", "the file"), ("./only", "the file")]
)
def test_a_file_with_the_name_of_a_command(name: str, runs: str, tmp_path: Path) -> None:
    """A file called torchrun in the current folder, run by Python in place of the command."""
    commands, here = tmp_path / "commands", tmp_path / "here"
    commands.mkdir()
    here.mkdir()
    for each in ("tool", "tool.py"):
        (commands / each).write_text("#!/bin/sh\necho the command")
        (commands / each).chmod(0o755)
    for each in ("tool", "tool.py", "only"):
        (here / each).write_text("print('the file')")
    path = f"{commands}{os.pathsep}{os.defpath}"
    found = run_program("-m", "apollo_triton.compat", name, cwd=here, PATH=path)
    assert found.stdout == f"{runs}\n", found.stderr


def test_what_takes_the_place_of_the_process(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A module taken for a script, a command that is not found beside Python, a wrong name that is started."""
    started: list[list[str]] = []

    def begin(path: str, command: list[str]) -> None:
        assert path == command[0]
        started.append(command)
        raise SystemExit

    monkeypatch.setattr(redirect, "as_apollo_torch", lambda: None)
    monkeypatch.setattr(os, "execv", begin)
    tool = tmp_path / "tool"
    tool.write_text("")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    for arguments in (["-m", "json.tool", "--help"], ["tool", "--version"], ["-m"]):
        with pytest.raises(SystemExit):
            redirect.main(arguments)
    python = sys.executable
    assert started == [[python, "-m", "json.tool", "--help"], [str(tool), "--version"], [python, "-m"]]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "only").write_text("print('the file')")
    refused = {
        ("nothing.py",): "nothing.py: no such file; -m runs a module",
        ("nothing",): "nothing: no such command; -m runs a module",
        ("only",): "only: no such command; write ./only for the file of this name",  # torchrun, not installed
        (): "",
    }
    for arguments, said in refused.items():
        with pytest.raises(SystemExit) as error:
            redirect.main(arguments)
        assert error.value.code == 2
        found = capsys.readouterr()
        assert said in found.err
    assert "python -m apollo_triton.compat" in found.out
    assert len(started) == 3


@pytest.mark.parametrize("error", [SystemExit(3), pytest.param(ValueError("of the script"), marks=pytest.mark.full)])
def test_a_script_ends_as_it_would_by_itself(error: BaseException, tmp_path: Path) -> None:
    script = tmp_path / "ends.py"
    script.write_text(f"raise {error!r}")
    found = python("-m", "apollo_triton.compat", str(script), code=3 if isinstance(error, SystemExit) else 1)
    assert isinstance(error, SystemExit) or "ValueError: of the script" in found.stderr
