"""What the site needs beside ``mkdocs.yml``; on GitHub the pages need none of it.

**Links.** A page links to files outside ``docs/`` as GitHub wants it, ``../bench/REPORT.md`` say, and this project has
no address on the web that a link could be turned into. So the site carries what its pages link to, under
``repository/``: Markdown as pages, all else as files, and what those pages link to in turn. A link is read as GitHub
reads it, from where the file lies in the repository. One to nothing stays as it is, and fails the strict build.

**Examples.** Docstrings end in doctests without a heading, which Markdown would read as quotations: ``Examples`` puts
the heading there that mkdocstrings looks for.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

import griffe
from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files, InclusionLevel
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parent.parent
LINK = re.compile(r"\[(?P<text>[^\]\[]*)\]\((?P<path>[^()\s#:]+)(?P<anchor>#[^()\s]*)?\)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add the files outside ``docs/`` that pages link to."""
    pages = [ROOT / "docs" / file.src_uri for file in files.documentation_pages()]
    for page in pages:  # it grows
        for link in LINK.finditer(page.read_text(encoding="utf-8")):
            path = (page.parent / link["path"]).resolve()
            uri = _uri(path)
            if uri is None or not path.is_file() or files.get_file_from_path(uri) is not None:
                continue
            files.append(File.generated(config, uri, abs_src_path=str(path), inclusion=InclusionLevel.NOT_IN_NAV))
            if path.suffix == ".md":
                pages.append(path)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Turn every link to a file of the repository into one to its place on the site; a folder has none there."""
    source = Path(str(page.file.abs_src_path)).parent

    def placed(link: re.Match[str]) -> str:
        path = (source / link["path"]).resolve()
        uri = _uri(path)
        if uri is None or not path.exists():
            return link[0]
        if path.is_dir():
            return link["text"]
        target = posixpath.relpath(uri, posixpath.dirname(page.file.src_uri))
        return f"[{link['text']}]({target}{link['anchor'] or ''})"

    return LINK.sub(placed, markdown)


def _uri(path: Path) -> str | None:
    """Where a file of the repository lies on the site; None for any other."""
    for folder, prefix in ((ROOT / "docs", ""), (ROOT, "repository/")):
        if path.is_relative_to(folder):
            return prefix + path.relative_to(folder).as_posix()
    return None


class Examples(griffe.Extension):
    """Gives the doctests of a docstring the heading ``Examples:``."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every object whose docstring may be shown."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^>>> (?:.+\n?)+", _under_heading, obj.docstring.value, flags=re.MULTILINE)


def _under_heading(doctest: re.Match[str]) -> str:
    return "Examples:\n" + re.sub(r"^", "    ", doctest[0].rstrip("\n"), flags=re.MULTILINE) + "\n"
