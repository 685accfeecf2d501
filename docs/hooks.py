"""What the site needs in addition to ``mkdocs.yml``. On GitHub the pages need none of it.

**Links.** Pages link to files outside ``docs/`` as GitHub expects it, for example ``../bench/REPORT.md``. The project
has no web address that such a link could point to. So the site contains the files that its pages link to, under
``repository/``: Markdown files as pages and all others as files, and also what these pages link to. Links are resolved
as on GitHub, from the place of the file in the repository. A link to a missing file is left as it is, and fails the
strict build.

**Examples.** Docstrings end with doctests that have no heading, and Markdown would read these as quotations.
``Examples`` adds the heading that mkdocstrings looks for.
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
    for page in pages:  # pages are added to the list inside the loop
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
    """Point each link to a file of the repository to its place on the site. Links to folders become plain text."""
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
    """The place of a file of the repository on the site. None for any other file."""
    for folder, prefix in ((ROOT / "docs", ""), (ROOT, "repository/")):
        if path.is_relative_to(folder):
            return prefix + path.relative_to(folder).as_posix()
    return None


class Examples(griffe.Extension):
    """Puts the heading ``Examples:`` above the doctests of a docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Called for every object whose docstring may be shown."""
        if obj.docstring:
            obj.docstring.value = re.sub(r"^>>> (?:.+\n?)+", _under_heading, obj.docstring.value, flags=re.MULTILINE)


def _under_heading(doctest: re.Match[str]) -> str:
    return "Examples:\n" + re.sub(r"^", "    ", doctest[0].rstrip("\n"), flags=re.MULTILINE) + "\n"
