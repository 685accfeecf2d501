"""A whole step of this optimizer and of its peers: LLaMA's parameters, one run, all contenders once a round.

    python -m bench.whole_step                     # what suits this machine: minutes on a CPU
    python -m bench.whole_step --cases '7B.*'      # the cases whose names match
    python -m bench.whole_step --contenders 'APOLLO.*'
    python -m bench.whole_step --list

All contenders update the same weights with the same gradients, in an order that rotates. If they all fit into memory,
they run together. Otherwise each peer runs alone beside ours.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import gc
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch

from apollo_triton.tools.llama import default_rank

from .clock import RunFailed, Times, copy_bandwidth, interleaved, median_ratio, quartiles, rounded, seconds
from .contenders import CONTENDERS, OURS, Contender, bytes_to_move, state_bytes
from .parameter_sets import Shapes, Weights, llama_shapes, make_weights
from .results_file import Results, Row, default_device
from .step_measures import Extra, launches

GROWTH = (*OURS, "PyTorch AdamW, fused", "apollo-torch")
RANKS = (1, 4, 16, 64, 128, 256, 512)


@dataclass(frozen=True)
class Case:
    """A parameter set and its contenders. ``curve`` names the picture of growth in which the case is a point."""

    size: str
    dtype: torch.dtype
    rounds: int
    contenders: tuple[str, ...] = tuple(CONTENDERS)
    layers: int | None = None
    matrices_only: bool = False
    rank: int | None = None
    curve: str = ""

    @property
    def name(self) -> str:
        parts = [self.size]
        parts += ["matrices"] if self.matrices_only else []
        parts += [f"{self.layers} layers"] if self.layers else []
        parts += [f"rank {self.rank}"] if self.rank else []
        return " ".join([*parts, str(self.dtype).removeprefix("torch.")])

    @property
    def shapes(self) -> Shapes:
        return llama_shapes(self.size, self.layers, self.matrices_only)

    @property
    def used_rank(self) -> int:
        return self.rank or default_rank(self.size)


def cases(device: str) -> list[Case]:
    """What is measured by default: LLaMA's parameter sets, then growth with the rank and with the number of layers."""
    float32, bfloat16 = torch.float32, torch.bfloat16
    by_rank, by_layers = {"matrices_only": True, "curve": "rank"}, {"matrices_only": True, "curve": "layers"}
    if device.startswith("cuda"):
        return [
            *(Case(size, bfloat16, 50) for size in ("60M", "130M", "350M", "1B", "7B")),
            Case("7B", bfloat16, 30, matrices_only=True),
            Case("7B", float32, 20, (*OURS, "PyTorch SGD, fused", "PyTorch AdamW, fused"), matrices_only=True),
            Case("7B", bfloat16, 15, (*OURS, "PyTorch Muon"), layers=4, matrices_only=True),
            Case("60M", float32, 50),
            *(Case("7B", bfloat16, 30, GROWTH, layers=4, rank=rank, **by_rank) for rank in (*RANKS, 1024)),
            *(Case("350M", bfloat16, 30, GROWTH, layers=layers, **by_layers) for layers in (1, 2, 4, 8, 16, 32, 64)),
        ]
    return [
        *(Case("60M", dtype, 15, matrices_only=True) for dtype in (float32, bfloat16)),
        *(Case("60M", dtype, 10) for dtype in (float32, bfloat16)),
        Case("130M", bfloat16, 5, GROWTH),
        Case("350M", bfloat16, 3),
        *(Case("60M", float32, 7, GROWTH, rank=rank, **by_rank) for rank in RANKS),
        *(Case("60M", float32, 7, GROWTH, layers=layers, **by_layers) for layers in (1, 2, 4, 8, 16)),
    ]


class Stepper:
    """A contender with its optimizer, which has made two or three steps. ``step`` is what is timed."""

    def __init__(self, contender: Contender, weights: Weights, rank: int, device: str) -> None:
        self.contender, self._weights, self._rank, self._device = contender, weights, rank, device
        extra = Extra(device)
        with extra.profiled():
            self.optimizer = contender.make(weights, rank, {})
            self.optimizer.step()
            with extra.measured():
                self.optimizer.step()
        self.step: Callable[[], object] = self.optimizer.step
        if contender.captured:
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.optimizer.step()
            self.step = graph.replay
        self.step()
        state, _ = state_bytes(self.optimizer)
        self.figures: Row = {
            "launches": launches(self.step, device),
            "state_bytes": state,
            "extra_bytes": extra.peak - state,
            "bytes": bytes_to_move(contender, self.optimizer),
        }

    def refresh_ms(self) -> float | None:
        """The time of a step that makes a new projection. The timed optimizer does so at every step."""
        if not self.contender.refreshes:
            return None
        optimizer = self.contender.make(self._weights, self._rank, {"update_proj_gap": 1})
        optimizer.step()
        tries = 1 if self.contender.needs == "svd" else 3
        return 1e3 * min(seconds(optimizer.step, self._device, ahead=0.01) for _ in range(tries))


def reason(error: Exception) -> str:
    """An error in one line."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return "it does not fit into the memory of this device"
    return f"it failed: {type(error).__name__}: {(str(error) or 'no message').splitlines()[0][:200]}"


def batches(contenders: list[Contender], weights: Weights, device: str) -> Iterator[list[Contender]]:
    """The contenders that are in memory together.

    All are, if two moments for each of them and work space for one leave a fifth of the memory free.
    """
    peers = [contender for contender in contenders if contender.name not in OURS]
    ours = [contender for contender in contenders if contender.name in OURS]
    if device.startswith("cuda"):
        free = torch.cuda.mem_get_info(device)[0]
    else:
        free = available_memory()
    if 2 * weights.bytes * (len(peers) + 1) <= 0.8 * free:
        yield contenders
    elif peers:
        yield from ([*ours, peer] for peer in peers)
    else:
        yield ours


def available_memory() -> int:
    """Bytes of main memory that a program may still take. 0 if the system does not tell."""
    try:
        with open("/proc/meminfo") as lines:
            return next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return 0


@functools.cache
def bandwidth(device: str) -> float:
    """The bandwidth of a copy, measured once per run."""
    return copy_bandwidth(device)


def measure(case: Case, device: str, results: Results) -> None:
    """Time the contenders of a case that have no row yet, beside ours, and write a row for each."""
    shapes = case.shapes
    about = {
        **{"case": case.name, "size": case.size, "dtype": str(case.dtype).removeprefix("torch.")},
        **{"layers": case.layers, "matrices_only": case.matrices_only, "rank": case.used_rank, "curve": case.curve},
        **{"parameters": shapes.parameters, "rounds": case.rounds, "threads": torch.get_num_threads()},
    }
    runnable = []
    for name in case.contenders:
        if obstacle := CONTENDERS[name].obstacle(device, shapes):
            results.add(f"{case.name}: {name}", contender=name, skipped=obstacle, **about)
        elif f"{case.name}: {name}" not in results:
            runnable.append(CONTENDERS[name])
    if not runnable:
        return
    peers = [contender for contender in runnable if contender.name not in OURS]
    peers.sort(key=lambda peer: peer.package not in ("apollo-triton", "torch"))  # last what a time limit may cut off
    runnable = [CONTENDERS[name] for name in OURS] + peers
    bandwidth(device)  # now, while there is memory for it
    multiply_once(device)
    weights = make_weights(shapes, case.dtype, device)
    release(device)
    for batch in batches(runnable, weights, device):
        rows = measure_together(batch, weights, case, device)
        for name, row in rows.items():
            if f"{case.name}: {name}" not in results:  # ours are in every batch, and the first one counts
                results.add(f"{case.name}: {name}", contender=name, **about, **row)
                print(f"  {case.name}: {name:38s} {summary(row)}", flush=True)
        release(device)


@functools.cache
def multiply_once(device: str) -> None:
    """Make cuBLAS allocate the 32 MB that it keeps, so that they do not count as the first contender's."""
    for dtype in (torch.float32, torch.bfloat16):
        matrix = torch.ones(64, 64, dtype=dtype, device=device)
        torch.mm(matrix, matrix)


def release(device: str) -> None:
    """Return the memory of objects that are no longer used."""
    gc.collect()
    if device.startswith("cuda"):
        torch.cuda.empty_cache()


def measure_together(batch: list[Contender], weights: Weights, case: Case, device: str) -> dict[str, Row]:
    """A row for each contender, timed in the same rounds."""
    rows: dict[str, Row] = {}
    steppers: dict[str, Stepper] = {}
    for contender in batch:
        rows[contender.name] = prepare(contender, weights, case.used_rank, device, steppers)
        if contender.name not in steppers:
            release(device)
    times = Times({}, {})
    while steppers and not times.device:
        try:
            times = interleaved({name: stepper.step for name, stepper in steppers.items()}, case.rounds, device)
        except RunFailed as failure:
            rows[failure.name] = {"skipped": reason(failure.error)}
            del steppers[failure.name]
    for name, on_device in times.device.items():
        row = rows[name]
        row["ms"] = [rounded(1e3 * value) for value in quartiles(on_device)]
        row["host_ms"] = rounded(1e3 * times.host[name])
        row["copy_bandwidth"] = rounded(bandwidth(device))
        for ours in OURS:
            if ours in times.device:
                row[f"times {ours}"] = rounded(median_ratio(on_device, times.device[ours]))
    return rows


def prepare(contender: Contender, weights: Weights, rank: int, device: str, steppers: dict[str, Stepper]) -> Row:
    """Add the contender to ``steppers``. Returns its row without times, or a row that says why it cannot run.

    This is a function of its own so that a contender that failed keeps no memory once it has returned.
    """
    try:
        stepper = Stepper(contender, weights, rank, device)
    except Exception as error:  # whatever happens in a peer, the others are measured
        return {"skipped": reason(error)}
    steppers[contender.name] = stepper
    try:
        refresh = stepper.refresh_ms()
    except torch.OutOfMemoryError:  # it needs a second optimizer
        refresh = None
    return stepper.figures | {"refresh_ms": refresh and rounded(refresh)}


def summary(row: Row) -> str:
    if "skipped" in row:
        return f"skipped: {row['skipped']}"
    first, median, third = row["ms"]
    ratio = f", {row['times APOLLO-Mini']:.2f} times APOLLO-Mini" if "times APOLLO-Mini" in row else ""
    return f"{median:9.2f} ms ({first:.2f} to {third:.2f}){ratio}"


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--cases", default=".*", help="a regular expression that matches whole names (see --list)")
    parser.add_argument("--contenders", default=".*", help="a regular expression that matches whole names")
    parser.add_argument("--list", action="store_true", help="the cases' names, and nothing else")
    parser.add_argument("--name", default="whole_step", help="name of the results file (%(default)s)")
    parser.add_argument("--fresh", action="store_true", help="measure everything anew")
    options: Any = parser.parse_args(arguments)
    chosen = [case for case in cases(options.device) if re.fullmatch(options.cases, case.name)]
    if not chosen:
        raise SystemExit(f"--cases {options.cases!r}: no case matches; see --list")
    if options.list:
        print("\n".join(case.name for case in chosen))
        return
    results = Results(options.name, options.device, fresh=options.fresh)
    for whole in chosen:
        named = tuple(name for name in whole.contenders if re.fullmatch(options.contenders, name))
        case = dataclasses.replace(whole, contenders=named)
        try:
            measure(case, options.device, results)
        except Exception as error:  # for example too little memory for the weights themselves
            for name in case.contenders:
                if f"{case.name}: {name}" not in results:
                    results.add(f"{case.name}: {name}", case=case.name, contender=name, skipped=reason(error))
            print(f"  {case.name}: {reason(error)}", flush=True)
    print(f"written to {results.path}")


if __name__ == "__main__":
    main()
