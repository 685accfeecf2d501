"""Stage (e): what waits for a clock, before and after, in turns.

    python -m bench.gpu_check.changes

``CHANGES`` has one or more entries for each row of the table "Waiting for a clock" in docs/performance.md. *After* is
the optimizer as it is. *Before* is the same with some of its parts as they were: block sizes and constants of the
kernels and of their launches are attributes of modules, and are replaced while it steps. Where the old way is gone,
*after* is timed alone.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from types import ModuleType
from typing import Any
from unittest import mock

import torch

from ..clock import Times, interleaved, median_ratio, quartiles, rounded
from ..contenders import CONTENDERS
from ..parameter_sets import Shapes, llama_shapes, make_weights
from ..results_file import Results, Row, default_device
from ..whole_step import reason, release

NAME = "gpu_check-changes"
LAYERS = 6  # of LLaMA-7B: 1.21 G parameters, as in docs/performance.md
# Ranks are at most 4 then: the interpreter takes 20 ms to write a row of P. Int8 groups have 128 elements.
TOY = Shapes([(32, 4)], [])

Patch = Callable[[], contextlib.AbstractContextManager[object]]


def constant(module: str, name: str, value: Any) -> Patch:
    """``name`` of a module of apollo_triton has another value."""
    return lambda: mock.patch.object(_module(module), name, value)


def blocks(module: str, name: str, **sizes: int) -> Patch:
    """The function ``name`` of a module of apollo_triton, which returns tile sizes, returns some others."""

    @contextlib.contextmanager
    def patched() -> Iterator[None]:
        function = getattr(_module(module), name)
        with mock.patch.object(_module(module), name, lambda *rest, **options: function(*rest, **options) | sizes):
            yield

    return patched


def returning(module: str, name: str, value: Any) -> Patch:
    """The function ``name`` of a module of apollo_triton returns ``value``, whatever it is given."""
    return lambda: mock.patch.object(_module(module), name, return_value=value)


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"apollo_triton.{name}")


@dataclass(frozen=True)
class Change:
    """``row``: the first cell of its row in the table. ``contender``: a step of which one of ``CONTENDERS``.
    ``before``: what is replaced for the old way; nothing if it cannot be had any more."""

    row: str
    contender: str
    rank: int = 256
    dtype: str = "bfloat16"
    before: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        return f"{self.row}: {self.contender}, rank {self.rank}, {self.dtype}"

    def ways(self, shapes: Shapes, device: str) -> dict[str, Callable[[], object]]:
        """A step of each way, whose optimizer has made one step."""
        weights = make_weights(shapes, getattr(torch, self.dtype), device)
        found: dict[str, Callable[[], object]] = {}
        for name, patches in (("before", self.before), ("after", ())):
            if name == "before" and not patches:
                continue
            with _patched(patches):
                optimizer = CONTENDERS[self.contender].make(weights, min(self.rank, min(shapes.matrices[0])), {})
                optimizer.step()
            found[name] = functools.partial(_step, optimizer, patches)
        return found


@contextlib.contextmanager
def _patched(names: tuple[str, ...]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        for name in names:
            stack.enter_context(OLD[name]())
        yield


def _step(optimizer: torch.optim.Optimizer, patches: tuple[str, ...]) -> None:
    with _patched(patches):
        optimizer.step()


WARPS, NORM, AHEAD = "apply on 8 warps", "the norm of clipping read from G", "no more than 2 tiles ahead"
ALONE, LOOP = "a block of channels with P to itself", "a loop over the parts of a float32 gradient"
WAITING = "moments fetched when they are needed"
# The old parts, by a name that says what is old.
OLD: dict[str, Patch] = {
    WARPS: blocks("kernels.apply", "blocks", num_warps=8),
    AHEAD: returning("kernels.sketch", "stages", 2),
    ALONE: returning("kernels.sketch", "programs_at_a_time", 1),
    LOOP: returning("kernels.sketch", "unrolls", False),
    WAITING: returning("core.gpu", "has_tensor_memory", True),  # where nothing is fetched ahead
    NORM: returning("backends.triton.updates", "keeps_sketch", False),
    "no handles of launches": returning("core.handles", "_is_watched", True),
}
CHANGES = (
    Change("`apply` of 16-bit weights on 4 warps", "APOLLO-Mini", 1, before=(WARPS,)),
    Change("`apply` of 16-bit weights on 4 warps", "APOLLO-Mini, stochastic", 1, before=(WARPS,)),
    Change("clipping without a third read", "APOLLO-Mini, clipped", 1, before=(NORM,)),
    Change("clipping without a third read", "APOLLO, clipped", 64, before=(NORM,)),
    Change("int8 `apply`", "Q-Mini", 1),
    Change("two blocks of channels share P above rank 128", "APOLLO", before=(ALONE,)),
    Change("moments fetched ahead at rank 256", "APOLLO", before=(WAITING,)),
    Change("copies ahead on sm_100", "APOLLO", before=(AHEAD,)),
    Change("float32 gradients pipelined", "APOLLO", 32, "float32", (LOOP,)),
    Change("float32 gradients pipelined", "APOLLO", 256, "float32", (LOOP,)),
    Change("float16's P in float16", "APOLLO", 256, "float16"),
    Change("ranks 2 to 15 on tensor cores", "APOLLO", 4),
    Change("launches by handles", "APOLLO-Mini", 1, before=("no handles of launches",)),
)


def measured(change: Change, shapes: Shapes, rounds: int, device: str) -> Row:
    """Both ways in turns: the device's milliseconds, and the host's."""
    ways = change.ways(shapes, device)
    times: Times = interleaved(ways, rounds, device)
    row: Row = {"parameters": shapes.parameters, "rounds": rounds}
    for name, seconds in times.device.items():
        row[f"{name}_ms"] = [rounded(1e3 * value) for value in quartiles(seconds)]
        row[f"{name}_host_ms"] = rounded(1e3 * times.host[name])
    if "before" in times.device:
        row["after over before"] = rounded(median_ratio(times.device["after"], times.device["before"]))
    return row


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--toy", action="store_true", help="one small matrix")
    parser.add_argument("--rounds", type=int, default=15, help="(%(default)s)")
    parser.add_argument("--fresh", action="store_true", help="measure everything anew")
    options = parser.parse_args(arguments)
    shapes = TOY if options.toy else llama_shapes("7B", LAYERS, matrices_only=True)
    results = Results(NAME, options.device, fresh=options.fresh, settings={"rounds": options.rounds})
    for change in CHANGES:
        if change.name in results:
            continue
        about = {"contender": change.contender, "rank": change.rank, "dtype": change.dtype, "before": change.before}
        try:
            row = measured(change, shapes, options.rounds, options.device)
        except Exception as error:  # whatever happens in one, the others are measured
            row = {"skipped": reason(error)}
        results.add(change.name, change=change.row, **about, **row)
        print(f"{change.name:60s} {row.get('skipped') or row.get('after over before') or row['after_ms']}", flush=True)
        release(options.device)  # last: after an illegal access it raises
    print(f"written to {results.path}")


if __name__ == "__main__":
    main()
