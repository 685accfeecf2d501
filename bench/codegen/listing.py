"""Disassembled machine code, PTX and AMD's assembly, as lists of instructions."""

from __future__ import annotations

import linecache
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any, NamedTuple


class Instruction(NamedTuple):
    """An opcode with its modifiers, its operands, the predicate that guards it, and its line of Python."""

    opcode: str
    operands: str
    guard: str = ""
    line: str = ""


class Listing(NamedTuple):
    """The instructions in order, and each label with the index of the instruction that follows it."""

    code: list[Instruction]
    labels: dict[str, int]

    def target(self, index: int) -> int | None:
        """The index that the instruction at ``index`` may branch to."""
        instruction = self.code[index]
        if "BRA" not in instruction.opcode and "branch" not in instruction.opcode:
            return None
        label = re.search(r"\.L\w+", instruction.operands)
        return self.labels[label[0]] if label else None

    def loops(self) -> list[list[Instruction]]:
        """The code from each target of a backward branch to that branch."""
        targets = ((self.target(end), end) for end in range(len(self.code)))
        return [self.code[start : end + 1] for start, end in targets if start is not None and start <= end]


_SASS = re.compile(r"\s*/\*[0-9a-f]{4,}\*/\s+(?:@(?P<guard>!?\w+) +)?(?P<opcode>[\w.]+)\s*(?P<operands>.*?) ?;")
_TEXT = re.compile(r"\s+(?:@(?P<guard>!?%p\d+) )?(?P<opcode>[a-z][\w.:]+)\s*(?P<operands>.*)")
_FILE = re.compile(r'\.file\s+(\d+) "(.+?)"(?: "(.+)")?')
_LOCATION = re.compile(r'\s*(?://## File "(.+)", line|\.loc\s+(\d+)) (\d+)')


def sass(text: str) -> Listing:
    """What nvdisasm writes."""
    return _parsed(text, _SASS)


def assembly(text: str) -> Listing:
    """PTX, and AMD's assembly."""
    return _parsed(text, _TEXT)


def _parsed(text: str, pattern: re.Pattern[str]) -> Listing:
    files = {index: "/".join(path).rstrip("/") for index, *path in _FILE.findall(text)}
    code, labels, source = list[Instruction](), dict[str, int](), ""
    for line in text.splitlines():
        if match := _LOCATION.match(line):
            if match[3] != "0":
                source = linecache.getline(match[1] or files.get(match[2], ""), int(match[3])).strip()
        elif match := re.match(r"(\.L\w+):", line):
            labels[match[1]] = len(code)
        elif (match := pattern.match(line)) and match["opcode"] != "NOP":
            code.append(Instruction(match["opcode"], match["operands"], match["guard"] or "", source))
    return Listing(code, labels)


def nvidia_tool(tool: str, compiled: Any, *options: str) -> str:
    """What ``cuobjdump`` or ``nvdisasm``, which Triton brings, says of a kernel."""
    from triton.backends import nvidia

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [str(Path(nvidia.__path__[0]) / "bin" / tool), *options, file.name]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
