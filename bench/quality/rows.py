"""The study's results, ``results/<machine>/quality*.json``: a row for each run that ended. A row is never dropped.

Each row has the versions, the source and the commit that it was measured with: the study takes hours, in which the
package may change, and most changes do not concern what a run trains.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Protocol

from ..results_file import RESULTS, Row, describe, folder_name, write_whole


class Named(Protocol):
    """What determines a run, and has a name of its own for each."""

    @property
    def name(self) -> str: ...


class Rows:
    """The rows of one machine in ``file``, by the names of their jobs."""

    def __init__(self, device: str = "cpu", file: str = "quality") -> None:
        self._machine = describe(device)
        folder = Path(os.environ.get("APOLLO_RESULTS", RESULTS))
        self.path = folder / folder_name(self._machine) / f"{file}.json"
        self._rows = read(self.path) if self.path.exists() else {}

    def __contains__(self, job: Named) -> bool:
        return job.name in self._rows

    def all(self) -> Iterable[Row]:
        return self._rows.values()

    def add(self, job: Named, row: Row) -> None:
        """Write a row, in place of one of the same job. The file is complete whenever the program ends."""
        self._rows[job.name] = {"id": job.name, **row}
        lines = ",\n".join(json.dumps(self._rows[name]) for name in sorted(self._rows))
        write_whole(self.path, f'{{"machine": {json.dumps(self._machine)},\n "rows": [\n{lines}\n]}}\n')


def of_every_machine(file: str = "quality") -> dict[str, Row]:
    """The rows of all results folders by their names; of equal names those of the first folder."""
    found: dict[str, Row] = {}
    for path in sorted(Path(os.environ.get("APOLLO_RESULTS", RESULTS)).glob(f"*/{file}.json")):
        found = read(path) | found
    return found


def read(path: Path) -> dict[str, Row]:
    """The rows of a results file by their names."""
    return {row["id"]: row for row in json.loads(path.read_text(encoding="utf-8"))["rows"]}
