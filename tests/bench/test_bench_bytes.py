"""The bytes that the microbenchmarks divide by are those that the kernels move."""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("triton")
from sanitizer import Recorder

from bench.verbs import VERBS, verbs

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the recorder sees the interpreter's launches")


@pytest.mark.parametrize("shape", [(192, 128), (128, 192)])
@pytest.mark.parametrize("rank", [1, 4, 16, 32])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_declared_bytes_are_counted_bytes(shape, rank, dtype):
    made = verbs(shape, rank, dtype, "cpu", backend="triton")
    for name in VERBS:
        with Recorder() as recorder:
            made[name].run()
        counted = sum(launch.loaded_once + launch.stored_once for launch in recorder.launches)
        # On top come the table's rows and the partial sums, a few hundred bytes here.
        assert made[name].bytes <= counted <= made[name].bytes + 0.02 * made[name].bytes + 1024, name
