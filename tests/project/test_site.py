"""The site of the documentation builds, needs no network, and a broken link stops it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import apollo_triton

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.full


def build(root: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", str(site)]
    return subprocess.run(
        command,
        cwd=root,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )


def test_the_site_builds_and_a_broken_link_stops_it(tmp_path: Path) -> None:
    """A link, an anchor or a page of the navigation that leads nowhere; Markdown that GitHub takes for a list or a
    table and the site does not; a docstring that its reader cannot see."""
    pytest.importorskip("mkdocs")
    pytest.importorskip("mkdocstrings")
    found = build(ROOT, tmp_path / "site")
    assert found.returncode == 0, found.stderr
    pages = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "site").rglob("*.html")}
    assert {"index.html", "api.html", "REPORT.html", "CONTRIBUTING.html"} <= pages.keys()
    for name, text in pages.items():
        prose = re.sub(r"<(pre|code|script|style)\b.*?</\1>", "", text, flags=re.DOTALL)
        broken = re.findall(r"(?m)^(?:<p>)?(?:\||- |\* |```|&gt;&gt;&gt;).*", prose)
        assert not broken, f"{name}: not rendered: {broken[:3]}"
        outside = re.findall(r'<(?:script|link|img)[^>]*(?:src|href)="(https?:[^"]*)"', text)
        assert not outside, f"{name} needs a network: {outside}"
    for name in set(apollo_triton.__all__) - {"__version__"}:
        assert f'id="apollo_triton.{name}"' in pages["api.html"], name
    copy = tmp_path / "copy"
    copy.mkdir()
    for folder in ("docs", "bench", "apollo_triton", "examples"):
        shutil.copytree(ROOT / folder, copy / folder, symlinks=True)
    for file in ("mkdocs.yml", "CONTRIBUTING.md", "README.md"):
        shutil.copy(ROOT / file, copy)
    with (copy / "docs" / "int8.md").open("a") as page:
        page.write("\n[no page](nowhere.md), [no anchor](memory.md#nowhere), [no file](../bench/NOWHERE.md)\n")
    found = build(copy, tmp_path / "broken")
    assert found.returncode != 0
    for target in ("nowhere.md", "memory.md#nowhere", "../bench/NOWHERE.md"):
        assert f"'{target}'" in found.stderr, found.stderr
