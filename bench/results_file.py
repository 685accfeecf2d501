"""The results files, ``results/<machine>/<name>.json``. They are rewritten after every row, so that no row is lost.

A file names the machine, the versions and the source of its rows. Rows of an earlier run are kept only if all of these
are the same. Rows that do not depend on the machine are under ``every-machine``.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import re
import subprocess
from pathlib import Path
from typing import Any

import torch

from apollo_triton.tools.environment import machine_name

BENCH = Path(__file__).parent
ROOT = BENCH.parent
RESULTS = BENCH / "results"
EVERY_MACHINE = "every-machine"
PACKAGES = (
    *("torch", "triton", "apollo-torch", "bitsandbytes", "torch-optimi", "torchao", "galore-torch"),
    *("flashoptim", "adafactor8bit"),
    *("transformers", "tokenizers"),
)

Row = dict[str, Any]


class Results:
    """The rows of the benchmark ``name`` on one device. Each has its own ``"id"``.

    The file is in ``folder``, by default in the folder that APOLLO_RESULTS names, or else in ``bench/results``.
    ``device`` is None for figures that are counted and are the same on every machine.

    Opening a file keeps the rows of an earlier run if its source, versions, machine and ``settings`` (all else that
    decides the figures) are the same. ``fresh`` drops them. Rows that say why something was skipped are never kept.
    """

    def __init__(
        self,
        name: str,
        device: str | None = "cpu",
        *,
        fresh: bool = False,
        settings: Row | None = None,
        folder: Path | None = None,
    ) -> None:
        described = {"name": EVERY_MACHINE} if device is None else describe(device)
        folder = folder or Path(os.environ.get("APOLLO_RESULTS", RESULTS))
        self.path = folder / folder_name(described) / f"{name}.json"
        self._header = {"machine": described, "versions": versions(), "source": source(), "settings": settings or {}}
        self.rows: dict[str, Row] = {}
        earlier = {} if fresh else _read(self.path)
        header = json.loads(json.dumps(self._header))
        changed = [name for name in header if earlier.get(name) != header[name]]
        if not changed:
            self.rows = {row["id"]: row for row in earlier["rows"] if "skipped" not in row}
            print(f"{self.path.name}: {len(self.rows)} rows of an earlier run are kept", flush=True)
        elif earlier:
            print(f"{self.path.name} is of another {' and '.join(changed)}: all rows are measured again", flush=True)

    def __contains__(self, identity: str) -> bool:
        return identity in self.rows

    def add(self, identity: str, **figures: Any) -> None:
        """Write a row, in place of one with the same id. The file is complete whenever the program ends."""
        self.rows[identity] = {"id": identity, **figures}
        self.write()

    def write(self) -> None:
        """Write all rows."""
        # One row per line, so that a diff shows which rows changed.
        lines = ",\n".join(json.dumps(row) for row in self.rows.values())
        header = json.dumps(self._header | {"commit": commit()}, indent=1).removesuffix("\n}")
        write_whole(self.path, f'{header},\n "rows": [\n{lines}\n]}}\n')


def write_whole(path: Path, text: str) -> None:
    """Write ``text`` to ``path``. If this is interrupted, the file is as it was before."""
    path.parent.mkdir(parents=True, exist_ok=True)
    unfinished = path.with_suffix(".tmp")
    unfinished.write_text(text, encoding="utf-8")
    os.replace(unfinished, path)


def _read(path: Path) -> Row:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):  # it does not exist or is incomplete, and is measured again
        return {}


def default_device() -> str:
    """ "cuda" if there is a CUDA device, else "cpu"."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def describe(device: str) -> Row:
    """What distinguishes this machine from others: its processor, or for a GPU that GPU."""
    if device.startswith("cuda"):
        properties = torch.cuda.get_device_properties(device)
        return {
            "name": machine_name(device),
            "memory_GiB": round(properties.total_memory / 2**30),
            "toolkit": torch.version.cuda or torch.version.hip,
        }
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else 0
    return {"name": machine_name(device), "memory_GiB": round(memory / 2**30)}


def folder_name(described: Row) -> str:
    """The folder of a machine's results.

    >>> folder_name({"name": "NVIDIA H100 80GB HBM3"})
    'nvidia-h100-80gb-hbm3'
    """
    return re.sub(r"[^a-z0-9]+", "-", described["name"].lower()).strip("-")


def versions() -> dict[str, str | None]:
    """The versions of Python and of every package that is measured or takes part."""
    return {"python": platform.python_version()} | {package: version(package) for package in PACKAGES}


def version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def source() -> str:
    """A fingerprint of the package and its kernels. It says what was measured, whatever the commit."""
    digest = hashlib.sha256()
    for folder in ("apollo_triton", "kernels"):
        for path in sorted((ROOT / folder).rglob("*.py")):
            digest.update(path.relative_to(ROOT).as_posix().encode() + path.read_bytes())
    return digest.hexdigest()[:12]


def commit() -> str:
    """The commit that git names, with "-dirty" if the code differs from it.

    APOLLO_COMMIT overrides it, for a copy of the code that has no git repository or stands in another one.
    """

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()

    if given := os.environ.get("APOLLO_COMMIT"):
        return given
    try:
        changed = git("status", "--porcelain", "--", "apollo_triton", "kernels", "bench/*.py")
        return git("rev-parse", "--short", "HEAD") + ("-dirty" if changed else "")
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
