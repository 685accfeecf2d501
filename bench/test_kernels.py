"""Each verb on each matrix of LLaMA-60M to 13B, with pytest-benchmark: ``pytest bench --benchmark-only``.

On a GPU it times the Triton kernels, by events and with the cache emptied. On a CPU it times the reference backend.
Each round uses the next of three copies of the inputs. ``-k "7B and bfloat16 and apply"`` selects some.
``python -m bench.kernels`` keeps the figures.
"""

from __future__ import annotations

import functools

import pytest
import torch

from apollo_triton.tools.llama import named_sizes

from .clock import Stopwatch, copy_bandwidth, flush, head_start
from .parameter_sets import layer_shapes
from .results_file import default_device
from .verbs import VERBS, Verb, verbs

DEVICE = default_device()
RANKS = (1, 4, 16, 64, 128, 256, 512)
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
ROUNDS = 30 if DEVICE == "cuda" else 7
COPIES = 3
MATRICES = [(size, shape) for size in named_sizes() for shape in dict.fromkeys(layer_shapes(size))]


@functools.lru_cache(maxsize=1)  # all verbs of one matrix run one after another
def inputs(shape: tuple[int, int], rank: int, dtype: str) -> list[dict[str, Verb]]:
    return [verbs(shape, rank, DTYPES[dtype], DEVICE) for _ in range(COPIES)]


@pytest.fixture(scope="session")
def bandwidth():
    return copy_bandwidth(DEVICE)


STOPWATCH = Stopwatch(DEVICE)


@pytest.mark.benchmark(timer=STOPWATCH, disable_gc=True)
@pytest.mark.parametrize("verb", VERBS)
@pytest.mark.parametrize("rank", RANKS, ids=lambda rank: f"rank{rank}")
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("size", "shape"), MATRICES, ids=[f"{size}-{'x'.join(map(str, s))}" for size, s in MATRICES])
def test_verb(benchmark, bandwidth, size, shape, dtype, rank, verb):
    copies = inputs(shape, rank, dtype)
    turn = 0

    def next_copy():
        nonlocal turn
        turn += 1
        STOPWATCH.reset()  # a failed run leaves it started
        head_start(DEVICE, 1e-3)
        flush(DEVICE)
        return (copies[turn % COPIES][verb],), {}

    benchmark.group = f"{size} {shape[0]}x{shape[1]} {dtype}"
    benchmark.pedantic(lambda verb: verb.run(), setup=next_copy, rounds=ROUNDS, warmup_rounds=COPIES)
    if benchmark.stats is None:  # --benchmark-disable
        return
    moved = copies[0][verb].bytes
    rate = moved / benchmark.stats.stats.median
    benchmark.extra_info |= {"size": size, "shape": shape, "dtype": dtype, "rank": rank, "verb": verb, "bytes": moved}
    benchmark.extra_info |= {"GB_per_s": rate / 1e9, "share_of_copy": rate / bandwidth}
