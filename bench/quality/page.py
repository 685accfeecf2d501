"""Write the tables of docs/quality.md and its picture from the study's rows.

    python -m bench.quality.page                                # docs/quality.md and docs/quality.png
    python -m bench.quality.page --results bench/results/MACHINE --model 60M    # print the tables of another machine

Each table stands between two marks of the page, and a test holds that it is what the committed rows say.
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from apollo_triton.tools.demo.training import SIZES

from ..marked_part import MarkedPart
from ..results_file import RESULTS, ROOT
from .draw import compared, draw
from .run import SMALL
from .study import Study
from .tables import TABLES

PAGE = ROOT / "docs" / "quality.md"


def part(name: str, page: Path = PAGE) -> MarkedPart:
    """The part of the page that a table fills."""
    return MarkedPart(page, f"<!-- {name}: python -m bench.quality.page -->", f"<!-- end of {name} -->")


def folder() -> Path:
    """The machine of the page: the one whose results have the study of the small model."""
    results = Path(os.environ.get("APOLLO_RESULTS", RESULTS))
    found = [path.parent for path in sorted(results.glob("*/quality.json")) if Study.read(path.parent).rows]
    if len(found) > 1:
        raise SystemExit(f"several machines have the study, {', '.join(map(str, found))}: choose one by --results")
    return found[0] if found else results / "no machine yet"


def pictured(study: Study) -> str:
    """The line that shows the picture, if there is anything to draw."""
    if not compared(study):
        return "Missing: the picture, which needs AdamW's runs on all tokens and another method's."
    return "![Each method's difference to AdamW's loss, beside its optimizer state](quality.png)"


def write(study: Study, page: Path = PAGE) -> None:
    """Put every table into the page, and the picture beside it."""
    for name, table in TABLES.items():
        part(name, page).write(table(study))
    part("picture", page).write(pictured(study))
    if compared(study):
        draw(study, page.with_suffix(".png"))


def main() -> None:
    parser = argparse.ArgumentParser(
        "python -m bench.quality.page", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, metavar="FOLDER", help="a machine's results: print, write no page")
    parser.add_argument("--model", choices=SIZES, default=SMALL, help="with --results, a LLaMA's size (%(default)s)")
    options = parser.parse_args()
    if options.results:
        if not (options.results / "quality.json").exists():
            parser.error(f"--results {options.results}: there is no quality.json")
        study = Study.read(options.results, options.model)
        print("\n\n".join(f"## {name}\n\n{table(study)}" for name, table in TABLES.items()))
        return
    write(Study.read(folder()))
    print(f"written to {PAGE}")


if __name__ == "__main__":
    main()
