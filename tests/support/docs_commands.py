"""Checks of the documentation's command lines.

Quick local commands are run. All others are parsed by the program's own parser, which knows every option.
``check(line, monkeypatch)`` fails for a program that is not in ``PROGRAMS``. Commands run in the current directory,
which has the files that the page's commands name (``docs_preludes.make_files``).
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import io
import os
import re
import runpy
import shlex
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from apollo_triton import cli
from apollo_triton.compat import redirect as compat
from apollo_triton.tools.demo import command as demo
from apollo_triton.tools.validate import command as validate

ROOT = Path(__file__).parents[2]
Words = list[str]


def check(line: str, monkeypatch: pytest.MonkeyPatch) -> str:
    """Check the commands of one line, which may end in a comment. Returns what they printed, if they were run."""
    words = shlex.split(line, comments=True)
    if "&&" in words:
        first = words.index("&&")
        return _check(words[:first], monkeypatch) + check(shlex.join(words[first + 1 :]), monkeypatch)
    return _check(words, monkeypatch)


def _check(words: Words, monkeypatch: pytest.MonkeyPatch) -> str:
    while words and re.fullmatch(r"[A-Z_]+=\S*", words[0]):  # environment variables
        words.pop(0)
    assert words, "nothing to run"
    assert words[0] in PROGRAMS, f"{words[0]}: tests/support/docs_commands.py does not know how to check it"
    return PROGRAMS[words[0]](words[1:], monkeypatch) or ""


def _apollo_triton(arguments: Words, monkeypatch: pytest.MonkeyPatch) -> str:
    """Runs ``memory``. Parses ``demo`` and ``validate``, which take minutes. The output includes standard error."""
    for long in (demo, validate):
        monkeypatch.setattr(long, "run", lambda options: 0)
    with contextlib.redirect_stdout(io.StringIO()) as output, contextlib.redirect_stderr(output):
        cli.main(arguments)
    return output.getvalue()


class _ParsedError(Exception):
    """Raised by ``argparse`` once it has parsed, so that nothing is run."""


def _parse(run: Callable[[], object], argv: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    """Start a program, let it parse ``argv``, and stop it there."""
    parse_args = argparse.ArgumentParser.parse_args

    def parse(parser: argparse.ArgumentParser, *arguments: object) -> None:
        parse_args(parser, *arguments)
        raise _ParsedError

    with monkeypatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        patch.setattr(argparse.ArgumentParser, "parse_args", parse)
        patch.syspath_prepend(str(ROOT))
        with pytest.raises(_ParsedError):
            run()


def _python(arguments: Words, monkeypatch: pytest.MonkeyPatch) -> str | None:
    if arguments[0] != "-m":
        script = ROOT / arguments[0]
        with monkeypatch.context() as patch:
            patch.syspath_prepend(str(script.parent))  # as Python does
            return _parse(lambda: runpy.run_path(str(script), run_name="__main__"), arguments, monkeypatch)
    module, *rest = arguments[1:]
    if module == "apollo_triton":
        return _apollo_triton(rest, monkeypatch)
    if module == "apollo_triton.compat":
        return _compat(rest, monkeypatch)
    if module == "pip":
        return _pip(rest, monkeypatch)
    assert module.partition(".")[0] == "bench", f"python -m {module}: tests/support/docs_commands.py does not know it"
    return _parse(lambda: runpy.run_module(module, run_name="__main__"), [module, *rest], monkeypatch)


def _compat(arguments: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check a command up to the program that it starts. transformers' parser reads the options of a Trainer.

    Commands of other tools are run by tests/integration/test_tools.py, which reads them from the page.
    """
    if arguments[0] in ("llamafactory-cli", "axolotl", "trl"):
        assert f"python -m apollo_triton.compat {shlex.join(arguments)}" in (ROOT / "docs" / "tools.md").read_text()
        return
    from transformers import HfArgumentParser, TrainingArguments

    commands: list[Words] = []

    def begin(path: str, command: Words) -> None:
        commands.append(command)
        raise SystemExit

    with monkeypatch.context() as patch:
        patch.setattr(compat, "as_apollo_torch", lambda: None)
        patch.setattr(os, "execv", begin)
        with contextlib.suppress(SystemExit):
            compat.main(arguments)
    (command,) = commands
    script, *options = command[1:] if command[0] == sys.executable else _launched(command[1:])
    assert Path(script).is_file(), script
    HfArgumentParser(TrainingArguments).parse_args_into_dataclasses([*options, "--output_dir=run"])


def _launched(arguments: Words) -> Words:
    """The script that torchrun would start, and its arguments."""
    from torch.distributed.run import parse_args

    options = parse_args(arguments)
    return [options.training_script, *options.training_script_args]


def _torchrun(arguments: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    """Check the program that is started. Frameworks are run by tests/integration/test_configurations.py."""
    module, *_ = _launched(arguments)
    if module not in ("verl.trainer.sft_trainer", "torchtitan.train"):
        _python(_launched(arguments), monkeypatch)


def _accelerate(arguments: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    from accelerate.commands.launch import launch_command_parser

    verb, *rest = arguments
    assert verb == "launch", f"accelerate {verb}"
    options = launch_command_parser().parse_args(rest)
    _python([options.training_script, *options.training_script_args], monkeypatch)


def _pip(arguments: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    """Constraint files and extras exist. Other packages may only be uninstalled."""
    verb, *rest = arguments
    if verb == "uninstall":
        return
    assert verb == "install", f"pip {verb}"
    extras = importlib.metadata.metadata("apollo-triton").get_all("Provides-Extra") or []
    while rest:
        word = rest.pop(0)
        if word == "-c":
            assert (ROOT / rest.pop(0)).is_file()
        elif word != "-e":
            found = re.fullmatch(r"(\.|apollo-triton)(?:\[([a-z0-9,]+)\])?", word)
            assert found, f"pip install {word}"
            for extra in (found[2] or "").split(","):
                assert not extra or extra in extras, f"pyproject.toml has no extra {extra!r}"


def _git(arguments: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    """The project has no address yet, so pages say URL. The folder's name is the one that ``cd`` then needs."""
    assert arguments == ["clone", "URL", "apollo-triton"], arguments


def _cd(arguments: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    assert arguments == ["apollo-triton"], arguments


def _make(arguments: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    """``make --dry-run`` prints what would run. Command lines of this project's programs are checked in turn."""
    command = ["make", "--dry-run", "--always-make", *arguments]
    plain = {"PATH": os.environ["PATH"]}  # without ARGS and flags of a make that runs these tests
    found = subprocess.run(command, cwd=ROOT, env=plain, capture_output=True, text=True, check=False, timeout=60)
    assert found.returncode == 0, found.stderr
    recipe = [line for line in found.stdout.splitlines() if not line.startswith("make")]
    assert recipe, found.stdout  # a phony target without a rule
    for words in map(shlex.split, recipe):
        if words[1:2] == ["-m"] and words[2].partition(".")[0] in ("apollo_triton", "bench"):
            _python(words[1:], monkeypatch)


def _mkdocs(arguments: Words, monkeypatch: pytest.MonkeyPatch) -> None:
    from mkdocs.__main__ import cli as mkdocs

    verb, *rest = arguments
    command = mkdocs.commands[verb]
    command.make_context(verb, rest)


PROGRAMS: dict[str, Callable[[Words, pytest.MonkeyPatch], str | None]] = {
    "accelerate": _accelerate,
    "apollo-triton": _apollo_triton,
    "cd": _cd,
    "git": _git,
    "make": _make,
    "mkdocs": _mkdocs,
    "pip": _pip,
    "python": _python,
    "torchrun": _torchrun,
}
