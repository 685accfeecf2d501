"""Check this checkout on a GPU that is here for minutes: right first, then fast.

    python -m bench.gpu_check --minutes 8 --out FOLDER
    python -m bench.gpu_check --rehearse               # every stage on a CPU, at toy sizes

It needs torch and triton, and neither make, git, nor a network; it installs nothing. ``APOLLO_COMMIT`` names the commit
where git is missing. A stage has its own time limit and its own file in ``FOLDER/<machine>``. What a limit cuts off
goes on with the time that other stages leave, and at the next call: from FOLDER, or else from ``bench/results``. So
copy what is in FOLDER to there and call again. ``python -m bench.report`` shows it. The exit status is 1 if a stage
failed or something was not right.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import json
import math
import os
import shutil
import signal
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

from ..stage import CUT_OFF, DONE
from ..stage import run as run_stage
from .stages import CHECKS, FILES, MINUTES, Check

# Time for the end of the last stage and the files' way out.
RESERVE = 10.0
# A stage that has less time than this would only import and end.
LEAST = 15.0
MOST_LISTED = 20  # of what was not right; the report and the files have the rest


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=MINUTES, help="for all stages together (%(default)s)")
    parser.add_argument("--out", type=Path, help="folder for the results files (default: bench/results)")
    parser.add_argument("--rehearse", action="store_true", help="every stage on a CPU, at toy sizes")
    options = parser.parse_args(arguments)
    seconds = 60 * options.minutes - RESERVE
    if not seconds >= LEAST:  # nan too
        raise SystemExit(f"--minutes {options.minutes:g}: the least is {math.ceil((LEAST + RESERVE) / 6) / 10}")
    if importlib.util.find_spec("triton") is None:
        raise SystemExit("triton is not installed here: there are no kernels to check")
    if options.rehearse:
        return rehearse(options.out, seconds)
    import torch

    from ..results_file import RESULTS

    if not torch.cuda.is_available():
        raise SystemExit("PyTorch sees no CUDA device here; --rehearse tries the stages on a CPU")
    folder = made(options.out or RESULTS)
    os.environ["APOLLO_RESULTS"] = str(folder)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.pop("TRITON_INTERPRET", None)  # left over from a rehearsal: nothing would run on the GPU
    carry_over(RESULTS, folder)
    outcomes = in_order(CHECKS, seconds, lambda check: run_stage(check, fresh=False))
    return finished(outcomes, not_right(folder, "cuda"))


def rehearse(out: Path | None, seconds: float) -> int:
    """All stages at toy sizes, with their results in ``out`` or nowhere."""
    os.environ["TRITON_INTERPRET"] = "1"  # before anything imports triton
    from ..results_file import RESULTS
    from . import rehearsal

    if out is not None and out.resolve() == RESULTS:
        raise SystemExit("--rehearse --out bench/results: figures of a rehearsal mean nothing; name another folder")
    with contextlib.ExitStack() as stack:
        folder = made(out or Path(stack.enter_context(tempfile.TemporaryDirectory())))
        stack.enter_context(rehearsal.rehearsing(folder))
        outcomes = in_order(CHECKS, seconds, rehearsal.run)
        return finished(outcomes, [name for name in not_right(folder, "cpu") if "on_purpose" not in name])


def made(folder: Path) -> Path:
    """``folder``, which exists from now on. If no file can be written there, the program ends before a stage starts."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        tempfile.TemporaryFile(dir=folder).close()
    except OSError as error:
        raise SystemExit(f"--out: no file can be written to {folder}: {error.strerror}") from None
    return folder.resolve()


def carry_over(earlier: Path, folder: Path) -> None:
    """Copy this machine's files of an earlier check, which may be unfinished, to where it goes on."""
    from ..results_file import describe, folder_name

    machine = folder_name(describe("cuda"))
    for name in FILES:
        source, target = (each / machine / f"{name}.json" for each in (earlier, folder))
        if source.exists() and not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, target)


def in_order(
    checks: tuple[Check, ...],
    seconds: float,
    run: Callable[[Check], str],
    clock: Callable[[], float] = time.monotonic,
) -> dict[str, str]:
    """Run the stages in their order, each within its share of ``seconds``, then those that were cut off, with all the
    time that is left. Returns each stage's last outcome."""
    end = clock() + seconds
    share = min(1.0, seconds / (60 * MINUTES - RESERVE))
    outcomes: dict[str, str] = {}
    for goes_on in (False, True):
        for check in checks:
            left = end - clock()
            limit = left if goes_on else min(check.seconds * share, left)
            if (goes_on and outcomes[check.name] != CUT_OFF) or limit < min(LEAST, check.seconds * share):
                outcomes.setdefault(check.name, CUT_OFF)
                continue
            outcomes[check.name] = run(dataclasses.replace(check, seconds=limit))
    return outcomes


def not_right(folder: Path, device: str) -> list[str]:
    """The rows of this machine's files that say that something is wrong. A peer that is not installed is not."""
    from ..results_file import describe, folder_name

    found = []
    for name in FILES:
        path = folder / folder_name(describe(device)) / f"{name}.json"
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else ():
            did_not_run = "skipped" in row and name.startswith("gpu_check")
            wrong = row.get("right") is False or row.get("missed") or row["id"].startswith("failed: ")
            found += [row["id"]] if did_not_run or wrong else []
    return found


def finished(outcomes: dict[str, str], wrong: list[str]) -> int:
    """Print what became of the stages, and what they found wrong. Returns 1 if a stage failed or something is wrong."""
    print()
    for name, outcome in outcomes.items():
        print(f"{name:30s} {outcome}{': call again, and it goes on' if outcome == CUT_OFF else ''}")
    print(f"\n{len(wrong)} not right{':' if wrong else ''}")
    for name in wrong[:MOST_LISTED]:
        print(f"  {name}")
    if len(wrong) > MOST_LISTED:
        print(f"  and {len(wrong) - MOST_LISTED} more, see the report")
    return 1 if wrong or any(outcome not in (DONE, CUT_OFF) for outcome in outcomes.values()) else 0


if __name__ == "__main__":
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a stage is a session of its own
    try:
        raise SystemExit(main())
    except KeyboardInterrupt:
        raise SystemExit("\nInterrupted. Rows so far are kept: call again, and it goes on.") from None
    finally:
        signal.signal(signal.SIGTERM, before)  # of a process that goes on: a test's
