"""Engines on several streams: what is read is written by then, and nothing is freed while a stream still uses it."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import parameters_of
from torch import nn

pytest.importorskip("triton")
if torch.cuda.is_available():
    pytest.skip("the model of streams takes CPU tensors for a device's", allow_module_level=True)

from stream_model import Streams

from apollo_triton import APOLLOAdamW
from apollo_triton.layerwise import attach_layerwise

SHAPES = [(32, 16), (40, 16)]  # of one width, and so of one P


@pytest.mark.parametrize("backend", ["triton", "reference"])
def test_layers_on_two_streams_share_P_in_order(backend):
    """P that a layer reads before the other has written it, or rewrites while the other still reads; and blocks of
    memory that both take at once."""
    layers = [nn.Linear(16, rows, bias=False, dtype=torch.bfloat16) for rows, _ in SHAPES]
    inputs = [torch.ones(3, 16, dtype=torch.bfloat16) for _ in layers]
    weights = [layer.weight for layer in layers]
    group = {"params": weights, "rank": 16, "update_proj_gap": 2}
    optimizer = APOLLOAdamW([group], lr=1e-2, backend=backend)
    attach_layerwise(nn.ModuleList(layers), optimizer)
    streams = Streams(["main", "A", "B"])
    with streams:
        for step in range(5):
            for index in (0, 1) if step % 4 < 2 else (1, 0):  # both layers come first in a step of a refresh
                with streams.on("AB"[index]):
                    layers[index](inputs[index]).sum().backward()
            optimizer.step()
    held = [x for state in optimizer.state.values() for x in state.values() if torch.is_tensor(x)]
    assert not streams.faults(callers=held + weights + inputs)


OPTIONS = {
    "mini": ({"rank": 1, "scale_type": "tensor"}, {}),
    "P in memory, clipped": ({"rank": 16}, {"max_grad_norm": 1.0}),
    "step count on the device": ({"rank": 16}, {"capturable": True}),
    "svd": ({"rank": 4, "proj": "svd", "update_proj_gap": 2}, {}),
}


@pytest.mark.parametrize(("group", "options"), OPTIONS.values(), ids=OPTIONS.keys())
def test_what_a_plan_keeps_may_be_freed_while_another_stream_runs(group, options):
    """A table that is replaced, a P that is dropped: their memory was given away under running kernels."""
    parameters = parameters_of([*SHAPES, (8,)], torch.bfloat16)
    parameters.append(nn.Parameter(torch.ones(16, 8, 3, 3).to(memory_format=torch.channels_last)))  # has copies
    parameters[-1].grad = torch.ones_like(parameters[-1])
    groups = [{"params": [*parameters[:2], parameters[3]], **group}, {"params": parameters[2:3]}]
    optimizer = APOLLOAdamW(groups, lr=1e-2, backend="triton", **options)
    streams = Streams(["A", "B", "C"])
    with streams:
        optimizer.step()
        with streams.on("B") as stream:
            stream.wait_stream(streams.of["A"])  # the caller's order
            for _ in range(3):
                optimizer.step()
        with streams.on("C") as stream:
            stream.wait_stream(streams.of["B"])
            assert optimizer.skipped_updates == 0
    held = [x for state in optimizer.state.values() for x in state.values() if torch.is_tensor(x)]
    given = [x for group in optimizer.param_groups for x in group.values() if torch.is_tensor(x)]
    assert not streams.faults(callers=[*held, *given, *parameters, *(each.grad for each in parameters)])
