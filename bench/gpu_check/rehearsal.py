"""The rehearsal: every stage on a CPU, in one process, at toy sizes. Its figures say nothing but that the stage runs.

The kernels run in Triton's interpreter. The stages, their arguments' names, their files and the report are those of a
GPU. What it cannot rehearse: graphs, events, and the compiler.
"""

from __future__ import annotations

import contextlib
import gc
import importlib
import os
import traceback
from collections.abc import Iterator
from pathlib import Path
from unittest import mock

import torch

from apollo_triton.core import device_backend
from apollo_triton.tools.llama import paper_figures

from .. import clock, pretrain, training, whole_step
from ..stage import DONE, FAILED
from . import changes, compilation, exactness, processes, suite, validation
from .stages import Check

# A LLaMA that steps in milliseconds, under a name that no results of a GPU have.
TOY = {"hidden": 32, "intermediate": 88, "layers": 2, "heads": 2, "vocab": 256}
MODULES = {module.__name__.removeprefix("bench."): module for module in (pretrain, training, whole_step)}
MODULES |= {
    module.__name__.removeprefix("bench."): module for module in (changes, compilation, exactness, suite, validation)
}


def run(check: Check) -> str:
    """Run a stage with its arguments of a rehearsal. Returns DONE or FAILED."""
    print(f"\n== {check.name}: python -m bench.{check.module} {' '.join(check.rehearsal)}", flush=True)
    # Where parts of kernels are what is timed, "auto" means them. Of whole models the interpreter would make minutes.
    on_kernels = check.module == "gpu_check.changes"
    backends = mock.patch.object(device_backend, "_obstacle", return_value=None)
    try:
        with backends if on_kernels else contextlib.nullcontext():
            MODULES[check.module].main(list(check.rehearsal))
    except (Exception, SystemExit):  # of which the second is argparse's, for a wrong argument
        traceback.print_exc()
        return FAILED
    return DONE


@contextlib.contextmanager
def rehearsing(folder: Path) -> Iterator[None]:
    """Toy sizes, and results in ``folder``."""
    figures, toy = paper_figures(), whole_step.Case("TOY", torch.bfloat16, 1)
    matrices = whole_step.Case("TOY", torch.bfloat16, 1, layers=1, matrices_only=True)
    for name in processes.PRELOADED:  # once, and not in each process that is forked
        importlib.import_module(name)
    torch.set_num_threads(1)  # a process that is forked from one with threads would wait for them
    with contextlib.ExitStack() as stack:
        for patch in (
            mock.patch.dict(os.environ, {"APOLLO_RESULTS": str(folder)}),
            mock.patch.dict(figures["llama"], {"TOY": TOY}),
            mock.patch.dict(figures["rank"], {"TOY": 8}),
            mock.patch.object(whole_step, "cases", return_value=[matrices, toy]),
            mock.patch.object(clock, "FLUSHED_BYTES", 1 << 10),
            mock.patch.object(clock, "COPIED_BYTES", {"cpu": 1 << 20}),
            mock.patch.object(training, "SIZES", {"cpu": ("TOY",), "cuda": ()}),
            *(mock.patch.object(module, "START_METHOD", "fork") for module in (processes, pretrain, training)),
        ):
            stack.enter_context(patch)
        gc.freeze()  # or the collection after each contender looks at all that was imported, for half a second
        stack.callback(gc.unfreeze)
        yield
