"""Does it train as well? Every optimizer is tuned with the same effort, and then trains with three seeds.

    python -m bench.quality                                # all stages on two cores: hours; it goes on where it was
    python -m bench.quality --stages sweep full            # some of them
    python -m bench.quality --row "Mini, rate 0.005, full run, vocabulary 2048, seed 0"    # one run again, compared
    python -m bench.quality --model 60M --batch 512 --data FOLDER --tokens-a-weight 1 --seconds 300    # on a GPU

Each core trains one run at a time, with one thread. A run that is interrupted is lost as a whole; finished runs have
rows in the results file and are not run again. docs/quality.md is made of them by ``python -m bench.quality.page``.
"""

from __future__ import annotations

import argparse
import difflib
import itertools
import multiprocessing
import os
import time
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from dataclasses import fields
from pathlib import Path

from apollo_triton.tools.demo.training import SIZES

from ..pretrain import START_METHOD
from ..results_file import Row, default_device
from .plan import STAGES, jobs
from .rows import Rows, of_every_machine
from .run import BATCH, SEQUENCE, SMALL, TOKENS_A_WEIGHT, Job, row_of


def run_missing(stages: list[str], rows: Rows, template: Job, device: str, workers: int, seconds: float) -> int:
    """Run what the stages lack, several at a time. No run starts after ``seconds``. Returns how many failed."""
    ends = time.monotonic() + seconds
    running: dict[Future[Row], Job] = {}
    failed: set[Job] = set()
    with ProcessPoolExecutor(workers, multiprocessing.get_context(START_METHOD)) as pool:
        while True:
            wanted = (job for stage in stages for job in jobs(stage, rows.all(), template) if job not in rows)
            free = (job for job in wanted if job not in running.values() and job not in failed)
            if time.monotonic() < ends:
                for job in itertools.islice(free, workers - len(running)):
                    running[pool.submit(row_of, job, device)] = job
            if not running:
                return len(failed)
            for done in wait(running, return_when=FIRST_COMPLETED).done:
                job = running.pop(done)
                if error := done.exception():
                    failed.add(job)
                    print(f"{job.name}: failed, {type(error).__name__}: {error}", flush=True)
                else:
                    row = done.result()
                    rows.add(job, row)
                    print(f"{job.name}: {shown(row)}", flush=True)


def shown(row: Row) -> str:
    loss = row["held_out_loss"]
    return f"{'diverged' if loss is None else f'{loss:.4f}'} in {row['seconds']:.0f} s"


# How far apart runs end that differ in rounding alone, as on another processor, at most: seen up to 2 %.
ROUNDING = 0.03


def run_again(name: str, rows: Rows, device: str) -> int:
    """Run a row of this machine, or else of another one, again and compare. Returns 0 if the losses are as close as
    those of runs that differ in rounding alone."""
    every = of_every_machine() | {row["id"]: row for row in rows.all()}
    if not every:
        raise SystemExit(f"--row {name!r}: no results have been written yet beside {rows.path.parent}")
    if name not in every:
        method = name.partition(",")[0].lower()
        same = [known for known in every if known.lower().startswith(method)]
        close = difflib.get_close_matches(name, same or every, 3, cutoff=0.0)
        raise SystemExit("\n  ".join([f"--row {name!r}: there is no such row; the nearest are", *close]))
    known = every[name]
    job = Job(**{field.name: known[field.name] for field in fields(Job)})
    print(f"in the file: {shown(known)}, commit {known['commit']}, {known['versions']}", flush=True)
    row = row_of(job, device)
    print(f"now:         {shown(row)}, commit {row['commit']}, {row['versions']}")
    losses = row["held_out_loss"], known["held_out_loss"]
    if losses[0] == losses[1]:
        print("The losses are the same to the last digit.")
        return 0
    if None in losses:
        print("One of them diverged.")
        return 1
    away = losses[0] / losses[1] - 1
    print(f"The losses differ by {100 * away:+.2f} %: {losses[0]}, {losses[1]}.")
    return 0 if abs(away) <= ROUNDING else 1


def positive(text: str) -> float:
    """A number above 0, for argparse."""
    number = float(text)
    if not number > 0:
        raise argparse.ArgumentTypeError(f"{text} is not above 0")
    return number


def count(text: str) -> int:
    """A whole number above 0, for argparse."""
    return int(positive(str(int(text))))


def main() -> int:
    parser = argparse.ArgumentParser(
        "python -m bench.quality", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--stages", nargs="+", choices=STAGES, default=list(STAGES), metavar="STAGE", help=", ".join(STAGES)
    )
    parser.add_argument("--row", metavar="NAME", help="run this row again and compare; an id of quality.json")
    parser.add_argument("--model", choices=SIZES, default=SMALL, help="a LLaMA's size (%(default)s)")
    parser.add_argument(
        "--batch", type=count, default=BATCH, help=f"sequences of {SEQUENCE} tokens a step (%(default)s)"
    )
    parser.add_argument("--tokens-a-weight", type=positive, default=TOKENS_A_WEIGHT, help="of a full run (%(default)s)")
    parser.add_argument(
        "--data", default="", help="a file or folder of text (default: Python of packages that torch brings)"
    )
    parser.add_argument("--device", default=default_device(), help="where to train (%(default)s)")
    parser.add_argument("--workers", type=count, help="runs at a time (default: one a core, one on a GPU)")
    parser.add_argument(
        "--seconds", type=positive, default=float("inf"), help="start no run after so many (default: no limit)"
    )
    options = parser.parse_args()
    if options.data and not Path(options.data).exists():
        parser.error(f"--data {options.data}: there is no such file or folder")
    rows = Rows(options.device)
    if options.row is not None:
        return run_again(options.row, rows, options.device)
    workers = options.workers or (1 if options.device.startswith("cuda") else os.cpu_count() or 1)
    given = {name: getattr(options, name) for name in ("model", "batch", "tokens_a_weight", "data")}
    template = Job("", 0.0, **given)
    failed = run_missing(options.stages, rows, template, options.device, workers, options.seconds)
    print(f"written to {rows.path}")
    return min(failed, 1)


if __name__ == "__main__":
    raise SystemExit(main())
