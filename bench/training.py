"""Peak memory and speed of real training steps of a LLaMA, and the largest batch under 80 GB.

    python -m bench.training                            # 1B, 7B and 13B on a GPU; 60M on a CPU
    python -m bench.training --sizes 7B --sequence 256

The weights are random, the batches are text in bytes, and activations are not checkpointed. Every run has its own
process. Beside each figure stands what ``apollo-triton memory`` counts for weights, gradients and state.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import resource
import statistics
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from apollo_triton import APOLLOAdamW, attach_layerwise
from apollo_triton.core.extras import require
from apollo_triton.tools.demo.corpus import load_corpus
from apollo_triton.tools.llama import default_rank, meta_model, named_sizes
from apollo_triton.tools.memory.count import adamw, apollo, apollo_mini

from .clock import rounded, wait
from .parameter_sets import llama_shapes
from .results_file import Results, Row, default_device
from .whole_step import reason, release

CAP = 80e9  # bytes: the memory of the paper's GPUs
METHODS = ("AdamW", "APOLLO", "APOLLO-Mini", "APOLLO-Mini, layer-wise")
# The paper is about these three. A CPU could train them too, but would need far more than minutes.
SIZES = {"cuda": ("1B", "7B", "13B"), "cpu": ("60M",)}
MOST_BATCHES = 256
START_METHOD = "spawn"  # of processes; CUDA does not survive a fork


def make_optimizer(method: str, model: nn.Module, size: str) -> torch.optim.Optimizer:
    if method == "AdamW":
        return torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
    if method == "APOLLO":
        return APOLLOAdamW.apollo(model, rank=default_rank(size), lr=1e-4)
    return APOLLOAdamW.mini(model, lr=1e-4)


def counted(method: str, size: str, dtype: torch.dtype) -> int:
    """Bytes of weights, gradients (layer-wise: of the largest one) and state, by ``apollo_triton.tools.memory``."""
    model = meta_model(size, dtype)
    if method == "AdamW":
        return adamw(model).total
    if method == "APOLLO":
        return apollo(model, default_rank(size)).total
    mini = apollo_mini(model)
    if method == "APOLLO-Mini":
        return mini.total
    return mini.total - mini.gradients + max(parameter.nbytes for parameter in model.parameters())


class Training:
    """A model and its optimizer, with steps on batches of any size. Make it in a process that does nothing else."""

    def __init__(self, size: str, method: str, sequence: int, dtype: torch.dtype, device: str, tokens: Tensor) -> None:
        self._sequence, self._device, self._tokens = sequence, device, tokens
        if device.startswith("cuda"):
            total = torch.cuda.get_device_properties(device).total_memory
            torch.cuda.set_per_process_memory_fraction(min(1.0, CAP / total))  # of the current device
        transformers = require("transformers", "bench")
        config = meta_model(size).config
        config.max_position_embeddings = max(sequence, config.max_position_embeddings)
        self._before = _resident_bytes()
        default = torch.get_default_dtype()
        torch.set_default_dtype(dtype)  # a 13B in float32 first would not fit
        try:
            with torch.device(device):
                self.model = transformers.AutoModelForCausalLM.from_config(config)
        finally:
            torch.set_default_dtype(default)
        self.optimizer = make_optimizer(method, self.model, size)
        if "layer-wise" in method:
            attach_layerwise(self.model, self.optimizer)

    def step(self, batch: int) -> tuple[float, float]:
        """One step on ``batch`` sequences. Returns the seconds of forward and backward, and of the optimizer.

        Layer-wise updates happen during backward, and count there.
        """
        starts = torch.randint(len(self._tokens) - self._sequence, (batch,))
        windows = torch.stack([self._tokens[start : start + self._sequence] for start in starts]).long()
        windows = windows.to(self._device)
        started = time.perf_counter()
        self.model(input_ids=windows, labels=windows, use_cache=False).loss.backward()
        wait(self._device)
        between = time.perf_counter()
        self.optimizer.step()
        wait(self._device)
        ended = time.perf_counter()
        self.optimizer.zero_grad()
        return between - started, ended - between

    def measured(self, batch: int, steps: int) -> Row:
        """Peak memory and speed at ``batch``. The first step, which makes the state and compiles, is not timed."""
        self.step(batch)
        if self._device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(self._device)
        times = [self.step(batch) for _ in range(steps)]
        backward, optimizer = (statistics.median(column) for column in zip(*times, strict=True))
        return {
            "batch": batch,
            "peak_bytes": self._peak(),
            "tokens_per_second": rounded(batch * self._sequence / (backward + optimizer)),
            "backward_ms": rounded(1e3 * backward),
            "optimizer_ms": rounded(1e3 * optimizer),
        }

    def largest_batch(self) -> int:
        """The largest batch, up to ``MOST_BATCHES``, with which two steps fit into memory."""
        fits, fails = 0, MOST_BATCHES + 1
        batch = 1
        while fails - fits > 1:
            if self._fits(batch):
                fits = batch
            else:
                fails = batch
            batch = min(2 * fits, (fits + fails) // 2) if fits else fails // 2
        return fits

    def _fits(self, batch: int) -> bool:
        try:
            self.step(batch)
            self.step(batch)
        except torch.OutOfMemoryError:
            fits = False
        else:
            fits = True
        self.optimizer.zero_grad()
        release(self._device)
        return fits

    def _peak(self) -> int:
        """The peak by the device's allocator. On a CPU, the most memory of the process above what it started with."""
        if self._device.startswith("cuda"):
            return torch.cuda.max_memory_allocated(self._device)
        most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return most - self._before


def _resident_bytes() -> int:
    """The main memory of this process now. 0 if the system does not tell."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return 0


_training: Training | None = None


def run(size: str, method: str, batch: int, sequence: int, dtype: torch.dtype, device: str, tokens: Tensor) -> Row:
    """Steps at ``batch``. The model stays in this process, for larger ones."""
    global _training
    _training = Training(size, method, sequence, dtype, device, tokens)
    return _training.measured(batch, steps=3)


def run_largest() -> Row:
    """Steps at the largest batch of the model that ``run`` has made. Nothing if no batch fits."""
    assert _training is not None
    largest = _training.largest_batch()
    while largest:  # two steps fitted, but with fragmented memory a few more may not
        try:
            return {f"largest_{name}": figure for name, figure in _training.measured(largest, steps=5).items()}
        except torch.OutOfMemoryError:
            largest -= 1
    return {}


def rows(sizes: list[str], batch: int, sequence: int, device: str, results: Results) -> Iterator[tuple[str, Row]]:
    """The rows that ``results`` lacks. On a GPU each comes twice: first without the largest batch, which takes long to
    find."""
    tokens = None
    on_gpu = device.startswith("cuda")
    # Without a GPU the paper's sizes are counted, and their rows say that they were not measured.
    for size in dict.fromkeys(sizes if on_gpu else [*sizes, *SIZES["cuda"]]):
        # The paper's sizes train in bfloat16. On a CPU float32 is faster.
        dtype = torch.bfloat16 if on_gpu or size in SIZES["cuda"] else torch.float32
        for method in METHODS:
            identity = f"{size} {method}"
            if identity in results and ("largest_batch" in results.rows[identity] or not on_gpu):
                continue
            row: Row = {
                **{"size": size, "method": method, "sequence": sequence},
                **{"dtype": str(dtype).removeprefix("torch."), "parameters": llama_shapes(size).parameters},
            }
            try:
                row["counted_bytes"] = counted(method, size, dtype)
            except ModuleNotFoundError as error:  # transformers, which has the model
                yield identity, row | {"skipped": reason(error)}
                continue
            if size not in sizes:
                yield identity, row | {"skipped": "it needs a CUDA device"}
                continue
            if tokens is None:
                tokens = load_corpus(None, sequence).train
            # One process per run: the peak is that of this run alone, and a run that is killed for its memory stops no
            # other.
            with ProcessPoolExecutor(1, multiprocessing.get_context(START_METHOD)) as pool:
                try:
                    row |= pool.submit(run, size, method, batch, sequence, dtype, device, tokens).result()
                    if on_gpu:
                        yield identity, row
                        row = row | pool.submit(run_largest).result()
                except BrokenProcessPool:
                    problem = "it does not fit into the memory of this machine: its process was killed"
                except Exception as error:
                    problem = reason(error)
                else:
                    problem = ""
            if problem:
                row["largest_skipped" if "peak_bytes" in row else "skipped"] = problem
            yield identity, row


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default=default_device())
    parser.add_argument("--sizes", nargs="*", choices=named_sizes(), help="(default: 1B 7B 13B; on a CPU 60M)")
    parser.add_argument("--batch", type=int, default=1, help="sequences (%(default)s)")
    parser.add_argument("--sequence", type=int, help="tokens in each (1024; on a CPU 256)")
    parser.add_argument("--name", default="training", help="name of the results file (%(default)s)")
    parser.add_argument("--fresh", action="store_true", help="measure everything anew")
    options: Any = parser.parse_args(arguments)
    sizes = options.sizes or list(SIZES[options.device.partition(":")[0]])
    options.sequence = options.sequence or (1024 if options.device.startswith("cuda") else 256)
    about = {"batch": options.batch, "sequence": options.sequence}
    results = Results(options.name, options.device, fresh=options.fresh, settings=about)
    for identity, row in rows(sizes, options.batch, options.sequence, options.device, results):
        results.add(identity, **row)
        figure = row.get("skipped") or f"peak {row['peak_bytes'] / 1e9:.2f} GB, {row['tokens_per_second']} tokens/s"
        figure += f", at most {row['largest_batch']} sequences" if "largest_batch" in row else ""
        print(f"{identity:32s} {figure}", flush=True)
    print(f"written to {results.path}")


if __name__ == "__main__":
    main()
