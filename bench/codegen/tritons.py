"""The sketch by other versions of Triton: ``python -m bench.codegen.tritons FOLDER ...``.

Each folder holds a version that ``pip install --no-deps --target FOLDER triton==3.2.0`` has put there: 0.2 GB to load,
0.6 GB on disk. A process of its own finds it before the installed one, which is the last row of the table.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from ..results_file import EVERY_MACHINE, RESULTS, ROOT, Results
from .figures import Row

# A wgmma's registers and slots, and the slots where products wait by barriers. triton 3.2 knows no sm_100.
TARGETS = ("sm_90", "sm_100")


def compiled(folder: Path | None) -> tuple[str, list[Row]]:
    """The version of the triton in ``folder``, or of the installed one, and its rows of every sketch by a product."""
    targets = TARGETS[:1] if folder and list(folder.glob("triton-3.2.*")) else TARGETS
    paths = [str(each) for each in (folder, ROOT, os.environ.get("PYTHONPATH")) if each]
    alone = {"PYTHONPATH": os.pathsep.join(paths), "TRITON_INTERPRET": "0"}
    with tempfile.TemporaryDirectory() as place:
        command = [sys.executable, "-m", "bench.codegen", "--sketches", *targets, "--out", place]
        subprocess.run(command, cwd=ROOT, env=os.environ | alone, check=True, stdout=subprocess.DEVNULL)
        table = json.loads((Path(place) / EVERY_MACHINE / "codegen.json").read_text())
    return table["versions"]["triton"], table["rows"]


def short_of_slots(row: Row) -> bool:
    """Whether a tile has fewer slots than the stages ask for."""
    return any(slots < row["wanted_slots"][name] for name, slots in row["slots"].items())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folders", nargs="*", type=Path, help="unpacked versions of Triton")
    parser.add_argument("--out", type=Path, default=RESULTS, help="folder for the results")
    arguments = parser.parse_args()
    results = Results("tritons", device=None, fresh=True, folder=arguments.out)
    for folder in [*arguments.folders, None]:
        version, rows = compiled(folder)
        for target in dict.fromkeys(row["target"] for row in rows):
            here = [row for row in rows if row["target"] == target]
            works = [row for row in here if "error" not in row]
            results.add(
                f"triton {version}, {target}",
                triton=version,
                target=target,
                compiled=[row["what"] for row in works],
                failed={row["what"]: row["error"] for row in here if "error" in row},
                hazards={row["what"]: row["hazards"] for row in works if row["hazards"]},
                slots={row["what"]: row["slots"] for row in works if short_of_slots(row)},
            )
    print(f"written to {results.path}")


if __name__ == "__main__":
    main()
