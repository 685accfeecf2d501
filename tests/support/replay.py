"""A CUDA graph for a machine without CUDA. It records what a step launches, and runs it again without the host's code.

A captured graph replays kernels and tensor operations with the arguments of the capture. Numbers that the host computed
stay as they were, and what is in memory is read again. This class does the same with Triton launches and torch
operations.
"""

from __future__ import annotations

from contextlib import ExitStack
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from apollo_triton.core import gpu
from apollo_triton.engine import engine


class Graph(TorchDispatchMode):
    """``with Graph() as graph: optimizer.step()`` records and launches no kernel. ``graph.replay()`` runs it all."""

    def __init__(self):
        super().__init__()
        self._calls = []

    def __enter__(self):
        self._patches = ExitStack()
        self._patches.enter_context(mock.patch.object(engine, "_is_capturing", return_value=True))
        self._patches.enter_context(mock.patch.object(gpu, "launch", self._launch))
        return super().__enter__()

    def __exit__(self, *exception):
        self._patches.close()
        return super().__exit__(*exception)

    def _launch(self, kernel, grid, device, *arguments, **constants):
        self._calls.append((lambda: kernel[grid](*arguments, **constants), []))

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func.namespace == "profiler":
            return result
        results = [leaf for leaf in tree_leaves(result) if isinstance(leaf, torch.Tensor)]
        self._calls.append((lambda: func(*args, **kwargs), results))
        return result

    def replay(self):
        """Run everything again in order. Each result goes into the memory that it had in the capture."""
        for call, results in self._calls:
            again = [leaf for leaf in tree_leaves(call()) if isinstance(leaf, torch.Tensor)]
            for old, new in zip(results, again, strict=True):
                if old.data_ptr() != new.data_ptr():
                    old.copy_(new)
