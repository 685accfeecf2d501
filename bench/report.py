"""Write ``bench/REPORT.md``, its pictures and the demo's from all results files: ``python -m bench.report``.

The report says what was not measured. No figure is carried over from one machine to another.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from . import report_figures, report_gpu_check, report_tables, report_text
from .report_data import Machine, load
from .report_targets import TARGETS
from .results_file import BENCH, RESULTS, ROOT, write_whole

INTRODUCTION = """# Benchmarks

`python -m bench.report` writes this page from the files in [results](results), which has one folder per machine.
`make bench` measures everything anew and writes it, and `make bench-gpu` does so for everything that needs a GPU. A
figure without a machine beside it is counted, not timed, and is the same everywhere. Where a figure is missing, the
page says why."""


def report(counted: Machine, machines: list[Machine], pictures: Path) -> str:
    """The report in Markdown. Its pictures are written into the folder ``pictures``."""
    sections = [INTRODUCTION, report_text.summary(counted, machines)]
    rows = [target.line([counted, *machines]) for target in TARGETS]
    sections.append("## Targets\n\n" + report_tables.table(["", "target", "measured", "on"], rows))
    for machine in machines:
        parts = [
            report_tables.whole_step(machine),
            report_figures.roofline(machine, pictures),
            report_figures.growth(machine, pictures),
            report_tables.growth(machine),
            report_tables.kernels(machine),
            report_figures.kernels(machine, pictures),
            report_tables.training(machine),
            report_tables.no_gradient(machine),
            report_tables.pretraining(machine),
            report_figures.pretraining(machine, pictures),
            report_tables.host(machine),
            report_gpu_check.gpu_check(machine),
        ]
        sections.append("\n\n".join([f"## {machine.name}", report_tables.provenance(machine), *filter(None, parts)]))
    sections.append(report_text.counted(counted))
    sections.append(report_text.published())
    sections.append(report_text.METHOD)
    return "\n\n".join(sections) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the folder that has one folder per machine")
    parser.add_argument("--out", type=Path, help="(default: bench/REPORT.md; of another folder REPORT.md in it)")
    parser.add_argument("--demo", type=Path, default=ROOT / "docs" / "demo.png", help="the demo's picture")
    options = parser.parse_args()
    if not options.results.is_dir():
        raise SystemExit(f"--results {options.results}: there is no such folder")
    if options.out is None:
        options.out = (BENCH if options.results.resolve() == RESULTS else options.results) / "REPORT.md"
    counted, machines = load(options.results)
    write_whole(options.out, report(counted, machines, options.out.parent / "pictures"))
    report_figures.demo(options.demo)
    print(f"written to {options.out}")


if __name__ == "__main__":
    main()
