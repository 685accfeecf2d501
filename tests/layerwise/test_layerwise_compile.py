"""Layer-wise updates of compiled models: the numbers of plain steps, and the gradients that are alive at a time."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.distributed as dist
from compile_cases import batch, bits, breaks, graphs, loss_of, model_of, optimizer_of, same, start_counting, train
from distributed_cases import needs_fsdp_on_a_cpu
from distributed_harness import run
from no_gradient_cases import NewTensors
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from apollo_triton import attach_layerwise

BLOCKS = 5


@pytest.fixture
def counters():
    yield start_counting()
    torch._dynamo.reset()


def compiled(model, how, **options):
    """The model's forward: as it is, as one graph, or with a graph a block."""
    if how == "whole":
        return torch.compile(model, backend="aot_eager", **options)
    if how == "blocks":
        for block in model.layers:
            block.compile(backend="aot_eager", **options)
    return model


def peak_of_a_backward(forward, optimizer):
    """The most bytes that were alive of what backward and step allocated."""
    loss = loss_of(forward, batch(9))
    allocated = NewTensors()
    with allocated:
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()
    return allocated.peak


@pytest.mark.slow
@pytest.mark.parametrize("int8", [False, pytest.param(True, marks=pytest.mark.full)])
def test_gradients_are_alive_a_graph_at_a_time(int8, counters):
    """All gradients of a graph come out of it together: of a whole model all, of blocks those of one. The bits are
    those of plain steps, whether hooks or graphs come first, and no hook is a reason to compile anew."""
    plain = model_of(int8, blocks=BLOCKS)
    optimizer = optimizer_of(plain)
    train(plain, optimizer, 3)
    peak_of_a_backward(plain, optimizer)
    gradients = 4 * sum(p.numel() for p in plain.parameters())
    peaks, many = {}, {}
    for how, hooks_first in (("eager", True), ("whole", True), ("blocks", True), ("blocks", False)):
        counters.clear()
        model = model_of(int8, blocks=BLOCKS)
        optimizer = optimizer_of(model)
        if hooks_first:
            attach_layerwise(model, optimizer)
        forward = compiled(model, how, fullgraph=True)
        if not hooks_first:
            attach_layerwise(model, optimizer)
        train(forward, optimizer, 3)
        peaks[how] = peak_of_a_backward(forward, optimizer)
        assert same(bits(model), bits(plain)), how
        many[how] = graphs(counters)
        torch._dynamo.reset()
    assert many == {"eager": 0, "whole": 1, "blocks": 2}  # of the blocks only the first has an input without a gradient
    assert peaks["whole"] - peaks["eager"] > 0.8 * gradients * (BLOCKS - 1) / BLOCKS
    assert peaks["blocks"] - peaks["eager"] < 1.2 * gradients / BLOCKS


def test_accumulating_and_removing_within_compiled_blocks(counters):
    """Hooks that a graph keeps as they were when it was compiled."""
    models = [model_of(blocks=1) for _ in range(2)]
    optimizers = [optimizer_of(model) for model in models]
    handle = attach_layerwise(models[1], optimizers[1])
    compiled(models[1], "blocks", fullgraph=True)

    def steps(accumulating):
        for model, optimizer in zip(models, optimizers, strict=True):
            with accumulating() if model is models[1] else torch.enable_grad():
                loss_of(model, batch(0)).backward()
            loss_of(model, batch(1)).backward()
            optimizer.step()
            optimizer.zero_grad()
        assert same(*map(bits, models))

    steps(handle.accumulate)
    assert models[1].layers[0].up.weight.grad is None
    handle.remove()
    steps(torch.enable_grad)
    assert graphs(counters) == 1


@pytest.mark.parametrize("int8", [False, pytest.param(True, marks=pytest.mark.full)])
def test_layers_without_a_gradient_break_the_graph(int8, counters):
    """One break a layer, which its error names; what is between is compiled, and the numbers are those of eager."""
    ends = []
    for how in ("eager", "blocks"):
        model = model_of(int8, blocks=1)
        optimizer = optimizer_of(model)
        forward = compiled(model, how)
        attach_layerwise(model, optimizer, gradients="none")
        train(forward, optimizer, 2)
        ends.append(bits(model))
    assert same(*ends)
    assert breaks(counters) == 2
    with pytest.raises(Exception, match=r"LinearForward\.__call__"):
        torch.compile(model, backend="aot_eager", fullgraph=True)(batch(0))


def distributed_runs(cases):
    """Of each (how, int8, layerwise): the losses, this rank's bits, the graphs after each step, and the breaks."""
    found = {}
    for how, int8, layerwise in cases:
        counters = start_counting()
        model = model_of(int8, bias=False)
        if how.startswith("blocks"):
            compiled(model, "blocks", fullgraph=True)
        forward = WAYS[how.split(", ")[-1]](model)
        if how.startswith("after"):
            compiled(model, "blocks", fullgraph=True)
        elif how.startswith("whole"):
            forward = compiled(model, "whole")
        optimizer = optimizer_of(model)
        if layerwise:
            attach_layerwise(model, optimizer)
        rank = 0 if how.endswith("tensor parallel") else dist.get_rank()
        ends = [(train(forward, optimizer, 1, first=2 * step + rank), graphs(counters)) for step in range(3)]
        losses, many = zip(*ends, strict=True)
        assert not layerwise or all(p.grad is None for p in model.parameters())
        found[how, int8, layerwise] = [losses, bits(model), many, breaks(counters)]
    return found


def under_fsdp2(model):
    for block in model.layers:
        fully_shard(block)
    return fully_shard(model)


def under_tensor_parallel(model):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in model.layers:
        parallelize_module(block, mesh, {"up": ColwiseParallel(), "down": RowwiseParallel()})
    return model


WAYS = {"FSDP2": under_fsdp2, "tensor parallel": under_tensor_parallel, "DDP": nn.parallel.DistributedDataParallel}
FAST = ("blocks, FSDP2", True, True)
HOW = ("blocks, FSDP2", "after, FSDP2", "whole, FSDP2", "after, tensor parallel")
ALL = [
    *itertools.product(HOW, (False, True), (False, True)),
    *itertools.product(["blocks, DDP"], (False, True), [False]),
]


@needs_fsdp_on_a_cpu
@pytest.mark.slow
@pytest.mark.parametrize("cases", [[FAST], pytest.param(ALL, marks=pytest.mark.full)], ids=["one", "all"])
def test_compiled_blocks_on_several_ranks(cases):
    """Compiled before or after they are sharded, with int8 weights, with layer-wise updates, with both: the bits of
    eager, and no graph for what is gathered anew in each step. A whole model under FSDP2 falls into the same graphs,
    since its hooks are between the blocks."""
    eager = {(f"eager, {how.split(', ')[1]}", *savings) for how, *savings in cases}
    for found in run(distributed_runs, 2, timeout=300, cases=[*sorted(eager), *cases]):
        for how, *savings in cases:
            losses, parts, many, broken = found[(how, *savings)]
            expected = found[(f"eager, {how.split(', ')[1]}", *savings)]
            assert losses == expected[0], (how, savings)
            assert same(parts, expected[1]), (how, savings)
            assert many == (2, 2, 2), (how, savings)
            assert broken == 0, (how, savings)
