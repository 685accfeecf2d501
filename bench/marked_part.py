"""The part of a page that a command writes: what stands between two marks."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from .results_file import write_whole


class MarkedPart(NamedTuple):
    """What stands in ``document`` between the lines ``begin`` and ``end``."""

    document: Path
    begin: str
    end: str

    def read(self) -> str:
        return self.document.read_text(encoding="utf-8").partition(self.begin)[2].partition(self.end)[0].strip()

    def write(self, text: str) -> None:
        before, begin, rest = self.document.read_text(encoding="utf-8").partition(self.begin)
        if not begin:
            raise SystemExit(f"{self.document} has no line {self.begin}")
        write_whole(self.document, f"{before}{begin}\n\n{text}\n\n{self.end}{rest.partition(self.end)[2]}")
