"""The documentation does what it says: every code block of README.md and docs/ is executed, and every link leads on.

What is done with a block depends on its kind, ``CHECKS``; one of another kind fails. Python blocks run in order, a page
in one namespace. A traceback names the page and its line.
"""

from __future__ import annotations

import ast
import contextlib
import inspect
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import docs_commands
import pytest
import torch
import yaml
from accelerate_states import forget_accelerate
from distributed_cases import needs_fsdp_on_a_cpu
from docs_preludes import PRELUDES, make_files

from apollo_triton import APOLLOAdamW
from apollo_triton.core.settings import DENSE_DEFAULTS, LOW_RANK_DEFAULTS

pytest.importorskip("transformers")

ROOT = Path(__file__).parents[2]
# Pages whose blocks make test-all runs: foreign programs, and what takes seconds.
FULL = ("compile.md", "distributed.md", "frameworks.md", "int8.md", "tools.md", "troubleshooting.md")
SHARDING_PAGES = ("README.md", "distributed.md", "layerwise.md")
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]


@dataclass(frozen=True)
class Block:
    """A fenced block: its kind as the fence says, the first line of its text, and its section's number."""

    page: Path
    line: int
    kind: str
    section: int
    text: str


def blocks_of(page: Path, text: str) -> Iterator[Block]:
    """All code blocks of a page. An indented one is an error: nothing would say what it is."""
    fence = kind = before = ""
    first = section = 0
    lines: list[str] = []
    for number, line in enumerate(text.splitlines(), 1):
        opening = re.match(r" *(```+|~~~+)", line)
        if fence and opening and opening[1] == fence:
            yield Block(page, first, kind, section, "\n".join(lines) + "\n")
            fence, lines = "", []
        elif fence:
            lines.append(line)
        elif opening:
            assert not line.startswith(" "), f"{page.name}:{number}: a fence begins in the first column"
            fence, first, kind = opening[1], number + 1, line[len(opening[1]) :].strip()
        else:
            section += line.startswith("## ")
            indented = line.startswith("    ") and not before.strip()
            assert not indented, f"{page.name}:{number}: an indented block; give it a fence that names its kind"
        before = line
    assert not fence, f"{page.name}:{first}: a fence is not closed"


@dataclass
class Reading:
    """What a reader of a page has come to: the names that are defined, and what the last block printed or raised."""

    page: Path
    folder: Path
    monkeypatch: pytest.MonkeyPatch
    names: dict[str, Any] = field(default_factory=dict)
    section: int = -1
    output: str | None = None
    error: BaseException | None = None

    def read(self, block: Block) -> None:
        where = f"{self.page.name}:{block.line}"
        assert block.kind in CHECKS, f"{where}: a block of the kind {block.kind!r} (known: {sorted(CHECKS)})"
        if block.kind not in ("", "text"):
            self.no_error_is_left()
        if block.kind == "python" and self.section != block.section:
            self.section = block.section
            self.names |= PRELUDES.get(self.page.name, lambda folder: {})(self.folder)
        try:
            CHECKS[block.kind](self, block)
        except (Exception, SystemExit) as error:
            raise AssertionError(f"the block at {where}: {type(error).__name__}: {error}") from error

    def read_page(self, text: str) -> None:
        for block in blocks_of(self.page, text):
            self.read(block)
        self.no_error_is_left()

    def no_error_is_left(self) -> None:
        if self.error is not None:
            raise self.error

    def run_python(self, block: Block) -> None:
        text = block.text if torch.cuda.is_available() else block.text.replace('"cuda"', '"cpu"')
        code = compile("\n" * (block.line - 1) + text, str(self.page), "exec")
        with contextlib.redirect_stdout(io.StringIO()) as output:
            try:
                exec(code, self.names)
            except Exception as error:  # the next block may show it
                self.error = error
        self.output = output.getvalue()

    def run_commands(self, block: Block) -> None:
        lines = [line for line in block.text.replace("\\\n", " ").splitlines() if not line.lstrip().startswith("#")]
        self.output = "".join(docs_commands.check(line, self.monkeypatch) for line in lines if line.strip())

    def compare(self, block: Block) -> None:
        """What the block before printed or raised, or a part of it, ``...`` standing for anything; with none before, an
        error text that the package's source has."""
        shown = self.output
        if self.error is not None:
            shown = f"{type(self.error).__name__}: {self.error}"
        self.output = self.error = None
        if shown is None:
            message = re.sub(r"^\w+Error: ", "", _one_line(block.text))
            assert any(message in text for text in _texts_of_the_source()), f"nothing says {message!r}"
            return
        pattern = ".*".join(re.escape(part) for part in _one_line(block.text).split("..."))
        assert re.search(rf"(?:^| ){pattern}(?: |$)", _one_line(shown)), f"shown:\n{block.text}\nin fact:\n{shown}"


CHECKS: dict[str, Callable[[Reading, Block], None]] = {
    "": Reading.compare,
    "text": Reading.compare,
    "python": Reading.run_python,
    "sh": Reading.run_commands,
    "yaml": lambda reading, block: yaml.safe_load(block.text),  # run in tests/integration/test_tools.py
}


def _one_line(text: str) -> str:
    return " ".join(text.split())


def _texts_of_the_source() -> list[str]:
    """All strings of the package, in one line each; what an f-string fills in is ``...``."""
    found = []
    for path in (ROOT / "apollo_triton").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [part.value if isinstance(part, ast.Constant) else "..." for part in node.values]
                found.append(_one_line("".join(parts)))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(_one_line(node.value))
    return found


@pytest.fixture
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder to run in, one rank of one, no kernels on a CPU, and a path that blocks may change."""
    make_files(tmp_path)
    torchrun = tmp_path / "bin" / "torchrun"  # looked up and not run, and not beside Python in every environment
    torchrun.parent.mkdir()
    torchrun.write_text(f"#!{sys.executable}\n")
    torchrun.chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([os.environ["PATH"], str(torchrun.parent)]))
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("PYTHONPATH", os.environ.get("PYTHONPATH", ""))
    monkeypatch.delitem(sys.modules, "apollo_torch", raising=False)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path / 'ranks'}", rank=0, world_size=1)
    yield tmp_path
    torch.distributed.destroy_process_group()
    forget_accelerate()  # a Trainer has told it of that group


def test_every_kind_of_block_is_found_and_none_is_passed_over(tmp_path: Path) -> None:
    """A parser that loses blocks: then nothing of them would be run, and all would be well."""
    text = "# A\n```sh\nmake\n```\n## B\n~~~python\n```\n~~~\n````\n```\n````\n"
    found = [(block.line, block.kind, block.section, block.text) for block in blocks_of(tmp_path, text)]
    assert found == [(3, "sh", 0, "make\n"), (7, "python", 1, "```\n"), (10, "", 1, "```\n")]
    for broken in ("a\n\n    make\n", "```sh\nmake\n", "- a\n  ```sh\n  make\n  ```\n"):
        with pytest.raises(AssertionError, match="fence"):
            list(blocks_of(tmp_path, broken))


WRONG = {
    "undefined": "```python\nx = y\n```",
    "placeholder": "```python\nlist(...)\n```",
    "unknown kind": "```c\nx\n```",
    "other output": "```python\nprint(1)\n```\n```text\n2\n```",
    "no such error": "```text\nValueError: gradients have gone home\n```",
    "no error": "```python\nx = 1\n```\n```text\nValueError: Invalid x\n```",
    "unknown program": "```sh\nrm -r /\n```",
    "unknown option": "```sh\napollo-triton validate --half\n```",
    "unknown extra": "```sh\npip install 'apollo-triton[everything]'\n```",
    "unknown target": "```sh\nmake coffee\n```",
    "unknown option of make's": '```sh\nmake demo ARGS="--half"\n```',
    "unknown option of a script": "```sh\ntorchrun examples/fsdp2_pretrain.py --folder run --half\n```",
}


@pytest.mark.parametrize("text", WRONG.values(), ids=WRONG)
def test_a_block_that_is_wrong_fails(text: str, alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A check that lets everything through."""
    reading = Reading(alone / "page.md", alone, monkeypatch)
    with pytest.raises((AssertionError, NameError, TypeError)):
        reading.read_page(text)


def marks_of(page: Path) -> list[pytest.MarkDecorator]:
    sharding = [needs_fsdp_on_a_cpu] if page.name in SHARDING_PAGES else []
    return sharding + ([pytest.mark.full] if page.name in FULL else [])


@pytest.mark.filterwarnings("ignore")  # what a block warns of is for its reader
@pytest.mark.slow
@pytest.mark.parametrize("page", [pytest.param(page, marks=marks_of(page), id=page.stem) for page in PAGES])
def test_every_block_of_a_page(page: Path, alone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A name, an argument, an option, an extra, a make target or an error text that has changed, and was not changed in
    the documentation."""
    if page.name in ("int8.md", "README.md"):
        pytest.importorskip("bitsandbytes")
    Reading(page, alone, monkeypatch).read_page(page.read_text(encoding="utf-8"))


def prose_of(text: str) -> str:
    """A page without its code blocks, tables, comments and the targets of links."""
    text = re.sub(r"(?ms)^(```+).*?^\1$|<!--.*?-->", "", text)
    return re.sub(r"\]\([^)]*\)", "]", re.sub(r"(?m)^\|.*", "", text))


def test_the_readme_stays_short() -> None:
    """A README that grows until nobody reads it: what is more than a first look needs is a page of docs/."""
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    assert len(prose_of(text).split()) <= 1000


def test_prose_is_what_a_reader_reads_in_sentences() -> None:
    """A count of words that leaves text out, or counts code."""
    text = "# A b\n\nc `d` [e f](g.md)\n```sh\nh\n```\ni\n| j |\n|---|\n| k |\n<!-- l -->\n"
    assert prose_of(text).split() == ["#", "A", "b", "c", "`d`", "[e", "f]", "i"]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_no_line_is_wider_than_a_terminal(page: Path) -> None:
    """Paragraphs in one line, which diffs show whole and terminals break. A row of a table and a link cannot be cut."""
    cannot_be_cut = re.compile(r"\|.*|!?\[[^\]]*\]\([^)]*\)")
    lines = enumerate(page.read_text(encoding="utf-8").splitlines(), 1)
    wide = [number for number, line in lines if len(line) > 120 and not cannot_be_cut.fullmatch(line)]
    assert not wide, f"{page.name}: lines {wide} have more than 120 characters"


def test_the_tables_of_options_have_every_option_and_its_default() -> None:
    """An option that was added, renamed or given another default, and the tables were left as they are."""
    section = (ROOT / "docs" / "options.md").read_text(encoding="utf-8").partition("## All of them")[2]
    shown = {}
    for names, defaults in re.findall(r"(?m)^\| (`.*?`) \| (.*?) \|", section):
        values = re.split(r", (?![^(]*\))", defaults)  # not within a tuple
        shown |= dict(zip(re.findall(r"`(\w+)`", names), values, strict=True))
    arguments = inspect.signature(APOLLOAdamW.__init__).parameters.values()
    options = {argument.name: argument.default for argument in arguments} | LOW_RANK_DEFAULTS | DENSE_DEFAULTS
    for name in ("self", "params", "no_deprecation_warning", "rank"):
        del options[name]
    assert shown.pop("rank").startswith("none")
    known = {"float32": torch.float32}
    assert {name: eval(value, known) for name, value in shown.items()} == options


def anchors_of(page: Path) -> set[str]:
    """The anchors that GitHub and the site give to a page's headings."""
    text = re.sub(r"(?ms)^(```+).*?^\1$", "", page.read_text(encoding="utf-8"))
    headings = re.findall(r"(?m)^#+ (.+)$", text)
    return {re.sub(r"\s", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


def broken_links(page: Path) -> list[str]:
    """Links of a page whose file is not there, or whose anchor is no heading of it."""
    text = re.sub(r"(?ms)^(```+).*?^\1$", "", page.read_text(encoding="utf-8"))
    found = []
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        target, _, anchor = link.partition("#")
        path = (page.parent / target).resolve() if target else page
        if not re.match(r"https?:|mailto:", link) and not (
            path.exists() and (not anchor or path.suffix != ".md" or anchor in anchors_of(path))
        ):
            found.append(link)
    return found


def test_no_link_leads_nowhere(tmp_path: Path) -> None:
    """A page, a heading or a file that was renamed, and the links to it were not. The site's own check is in
    test_site.py."""
    assert {page.name: broken for page in PAGES if (broken := broken_links(page))} == {}
    page = tmp_path / "page.md"
    page.write_text(
        "# A b, `c`\n[a](#a-b-c) [b](page.md#a-b-c) [c](page.md#b) [d](no.md) [e](https://example.org/no)\n"
    )
    assert broken_links(page) == ["page.md#b", "no.md"]
