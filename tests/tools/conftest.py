"""The demo's text, and the folder of a demo that has ended."""

from __future__ import annotations

import sysconfig
from pathlib import Path

import pytest
from demo_cases import arguments

from apollo_triton import cli


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> Path:
    """A small file to train on."""
    path = tmp_path_factory.mktemp("text") / "argparse.py"
    path.write_bytes((Path(sysconfig.get_paths()["stdlib"]) / "argparse.py").read_bytes()[:20_000])
    return path


@pytest.fixture(scope="module")
def finished(text, tmp_path_factory) -> Path:
    """The folder of an uninterrupted demo."""
    out = tmp_path_factory.mktemp("finished")
    assert cli.main(arguments(text, out)) == 0
    return out
