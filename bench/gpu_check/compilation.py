"""Before the stages: compile what they launch, over all cores, so that no stage compiles one kernel after another.

    python -m bench.gpu_check.compilation

Each job is a step of an optimizer on small matrices, which leaves its kernels in Triton's cache on disk. What does not
compile is told here, and has a row with its error in each stage that needs it.
"""

from __future__ import annotations

import argparse
import dataclasses
import re
import time
from collections.abc import Iterator
from typing import NamedTuple

import torch

from .. import whole_step
from ..contenders import CONTENDERS
from ..parameter_sets import Shapes, make_weights
from ..results_file import default_device
from . import changes, races
from .processes import cores, in_parallel
from .stages import MATRICES, MODELS, OPTIMIZERS, REPLAYS

# Wide enough for the ranks and the tiles of large matrices.
SMALL = Shapes([(1024, 640), (640, 1024)], [(512, 64), (64,)])
# Peers that compile kernels of their own at their first step.
PEERS = ("flashoptim", "adafactor8bit")


class Step(NamedTuple):
    """A contender's step."""

    contender: str
    dtype: str
    rank: int


class Job(NamedTuple):
    """What is compiled, on which shapes and device."""

    what: races.Race | changes.Change | Step
    shapes: Shapes
    device: str


def everything() -> Iterator[races.Race | changes.Change | Step]:
    """All that stages (a), (d), (e) and (f) will launch, the kernels of the first ones first."""
    for race in races.races(large=True):
        is_tall = race.shape[0] > race.shape[1]
        yield dataclasses.replace(race, shape=SMALL.matrices[0 if is_tall else 1], repetitions=1)
    for cases, contenders in ((MATRICES, OPTIMIZERS), (MODELS, REPLAYS)):
        for case in whole_step.cases("cuda"):
            for name in case.contenders if re.fullmatch(cases, case.name) else ():
                if re.fullmatch(contenders, name) and CONTENDERS[name].package in ("apollo-triton", *PEERS):
                    yield Step(name, str(case.dtype).removeprefix("torch."), case.used_rank)
    yield from changes.CHANGES


def toy() -> Iterator[races.Race | changes.Change | Step]:
    """One of each kind, and one that fails."""
    yield dataclasses.replace(races.races(large=False)[0], repetitions=1)
    yield from (Step("APOLLO", "bfloat16", 8), Step("fails on purpose", "bfloat16", 8), changes.CHANGES[0])


def compiled(job: Job) -> None:
    """Run the job's step. Raises what the compiler raises."""
    what, shapes, device = job
    if isinstance(what, races.Race):
        races.measured(what, device)
    elif isinstance(what, changes.Change):
        for way in what.ways(shapes, device).values():
            way()
    elif not CONTENDERS[what.contender].obstacle(device, shapes):
        weights = make_weights(shapes, getattr(torch, what.dtype), device)
        CONTENDERS[what.contender].make(weights, what.rank, {}).step()


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--toy", action="store_true", help="a few steps of small matrices")
    options = parser.parse_args(arguments)
    started = time.perf_counter()
    shapes = changes.TOY if options.toy else SMALL
    listed = [Job(what, shapes, options.device) for what in dict.fromkeys(toy() if options.toy else everything())]
    problems = 0
    for done in in_parallel(compiled, listed):
        if done.problem:
            problems += 1
            print(f"{done.job.what}: {done.problem}", flush=True)
    seconds = time.perf_counter() - started
    print(f"{len(listed)} jobs on {cores()} cores took {seconds:.0f} s; {problems} had problems", flush=True)


if __name__ == "__main__":
    main()
