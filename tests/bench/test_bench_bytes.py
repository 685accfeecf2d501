"""The bytes that the microbenchmarks divide by are those that the kernels move."""

from __future__ import annotations

import itertools

import pytest
import torch

pytest.importorskip("triton")
from sanitizer import Recorder

from bench.verbs import VERBS, verbs

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the recorder sees the interpreter's launches")


# Each value of each argument has a case in make test; all combinations have one in make test-all.
FAST = {
    ((192, 128), 1, torch.bfloat16),
    ((128, 192), 4, torch.float32),
    ((128, 192), 16, torch.bfloat16),
    ((192, 128), 32, torch.float32),
}
ALL = itertools.product([(192, 128), (128, 192)], [1, 4, 16, 32], [torch.bfloat16, torch.float32])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("shape", "rank", "dtype"),
    [pytest.param(*case, marks=() if case in FAST else pytest.mark.full) for case in ALL],
)
def test_declared_bytes_are_counted_bytes(shape, rank, dtype):
    made = verbs(shape, rank, dtype, "cpu", backend="triton")
    for name in VERBS:
        with Recorder() as recorder:
            made[name].run()
        counted = sum(launch.loaded_once + launch.stored_once for launch in recorder.launches)
        # On top come the table's rows and the partial sums, a few hundred bytes here.
        assert made[name].bytes <= counted <= made[name].bytes + 0.02 * made[name].bytes + 1024, name
