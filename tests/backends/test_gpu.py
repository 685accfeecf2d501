"""What only a CUDA device can show: real graphs, streams, allocated memory, 7B shapes. ``pytest -m gpu`` runs these and
the tests of the algorithm there."""

from __future__ import annotations

import implicit_cases as cases
import pytest
import torch
from kernel_cases import assert_same_bits, drawn, optimizer_of, parameters_of
from torch import nn

from apollo_triton import APOLLOAdamW
from apollo_triton.layerwise import attach_layerwise

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")]

MINI = {"rank": 1, "scale_type": "tensor", "scale": 128.0}
LLAMA_7B = [(4096, 4096), (11008, 4096), (4096, 11008)]


@pytest.mark.parametrize("group", [MINI, {"rank": 16}])
@pytest.mark.parametrize("limit", [None, 0.05])
def test_a_captured_graph_replays_the_eager_steps_bit_for_bit(group, limit):
    """Under a scheduler, across refreshes, and again after an eager step with gradients elsewhere."""

    def trained(captured):
        shapes = [(256, 128), (128, 256), (2, 64, 48)]
        weights = [nn.Parameter(each.detach().clone()) for each in parameters_of(shapes, torch.bfloat16)]
        dense = [nn.Parameter(each.detach().clone()) for each in parameters_of([(64,)], torch.bfloat16)]
        everything = weights + dense
        constructor = {"capturable": True, "max_grad_norm": limit, "stochastic_rounding": True}
        optimizer = optimizer_of(weights, dense, constructor=constructor, update_proj_gap=3, **group)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        static = [torch.zeros_like(each) for each in everything]
        graph = torch.cuda.CUDAGraph()
        for step in range(9):
            for offset, gradient in enumerate(static):
                gradient.copy_(drawn(gradient.shape, 1000 * step + offset, torch.bfloat16, 1e-2))
            for parameter, gradient in zip(everything, static, strict=True):
                parameter.grad = gradient.clone() if step == 4 else gradient
            if captured and step == 1:
                torch.cuda.synchronize()
                with torch.cuda.graph(graph):
                    optimizer.step()
            if captured and step not in (0, 4):
                graph.replay()
            else:
                optimizer.step()
            scheduler.step()
        return everything, optimizer

    (plain, first), (replayed, second) = trained(False), trained(True)
    assert_same_bits(plain, replayed, (first, second))


def test_a_step_on_another_stream():
    weights = parameters_of([(256, 128)] * 3, torch.bfloat16)
    copies = [nn.Parameter(each.detach().clone()) for each in weights]
    for copy, weight in zip(copies, weights, strict=True):
        copy.grad = weight.grad.clone()
    optimizers = [optimizer_of(each, rank=16) for each in (weights, copies)]
    side = torch.cuda.Stream()
    for _ in range(5):
        optimizers[0].step()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            optimizers[1].step()
        torch.cuda.current_stream().wait_stream(side)
    assert_same_bits(weights, copies, optimizers)


def test_layers_on_two_streams_share_P():
    """The one that comes first in a step writes P, while its stream has other work to do."""

    def trained(streams):
        weights = [nn.Parameter(drawn((rows, 128), rows, torch.bfloat16)) for rows in (256, 128)]
        optimizer = APOLLOAdamW([{"params": weights, "rank": 16, "update_proj_gap": 1}], lr=1e-2)
        attach_layerwise(nn.ParameterList(weights), optimizer)
        for step in range(6):
            for index in (0, 1) if step % 2 else (1, 0):
                gradient = drawn(weights[index].shape, 10 * step + index, torch.bfloat16)
                with torch.cuda.stream(streams[index]):
                    torch.cuda._sleep(1_000_000)
                    (weights[index] * gradient).sum().backward()
            optimizer.step()
        torch.cuda.synchronize()
        return weights

    one = torch.cuda.current_stream()
    assert_same_bits(trained([one, one]), trained([torch.cuda.Stream(), torch.cuda.Stream()]))


def test_a_step_waits_for_nothing():
    weights, dense = parameters_of([(256, 128)] * 3, torch.bfloat16), parameters_of([(64,)], torch.bfloat16)
    optimizer = optimizer_of(weights, dense, rank=16, constructor={"max_grad_norm": 1.0})
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            for each in weights + dense:
                each.grad = each.grad.clone()
            optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("group", [MINI, {"rank": 256}])
def test_a_step_allocates_next_to_nothing_at_7b_shapes(group):
    weights = [nn.Parameter(torch.randn(shape, device="cuda").to(torch.bfloat16)) for shape in LLAMA_7B]
    for weight in weights:
        weight.grad = torch.randn_like(weight) * 1e-3
    before = [weight.detach().clone() for weight in weights]
    optimizer = optimizer_of(weights, lr=1e-2, **group)
    optimizer.step()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    allocated = torch.cuda.memory_allocated()
    optimizer.step()
    torch.cuda.synchronize()
    assert torch.cuda.max_memory_allocated() - allocated <= 1 << 20
    assert all(not torch.equal(weight, old) for weight, old in zip(weights, before, strict=True))


@pytest.mark.parametrize("shape", LLAMA_7B)
@pytest.mark.parametrize("group", [MINI, {"rank": 256}])
def test_7b_shapes_against_the_reference_path(shape, group):
    (weight,) = parameters_of([shape], torch.bfloat16)
    results = []
    for backend in ("triton", "reference"):
        copy = nn.Parameter(weight.detach().clone())
        optimizer = optimizer_of([copy], backend=backend, **group)
        for step in range(3):
            copy.grad = drawn(shape, step, torch.bfloat16, 1e-3)
            optimizer.step()
        results.append(copy.detach())
    # Both round the same float32 number but for the order of sums.
    assert (results[0] != results[1]).double().mean() <= 3e-3


@pytest.mark.parametrize("tokens", [200, 2048])
@pytest.mark.parametrize("shape", LLAMA_7B)
@pytest.mark.parametrize("group", [MINI, {"rank": 256}])
def test_7b_shapes_from_operands_against_the_reference_path(shape, group, tokens):
    """Also that a step waits for nothing, and allocates no more than an eighth of the weight, or
    than the weight at rank 256, of which R and its parts take a good half."""
    mine = cases.layer_of(shape, torch.bfloat16, constructor={"stochastic_rounding": True}, **group)
    theirs = cases.copy_of(mine)
    for number in (1, 2):
        operands = cases.operands_of(tokens, shape, torch.bfloat16, seed=number)
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        allocated = torch.cuda.memory_allocated()
        torch.cuda.set_sync_debug_mode("error" if number == 2 else "default")  # the first compiles
        try:
            cases.step(mine, operands, number)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        torch.cuda.synchronize()
        extra = torch.cuda.max_memory_allocated() - allocated
        assert extra <= mine.weight.nbytes / (1 if group.get("rank") == 256 else 8)
        cases.reference_step(theirs, cases.gradient_of(operands, torch.float32), number)
        # R has 16 bits and G, summed on tensor cores, 15: of the entries that half an update takes to the next number
        # of 8 bits, so many fall to the other side.
        assert (mine.weight != theirs.weight).double().mean() <= 1e-2
        torch.testing.assert_close(mine.state["update_norm"], theirs.state["update_norm"], rtol=1e-3, atol=0)
        with torch.no_grad():
            theirs.weight.copy_(mine.weight)
    assert mine.table.skipped.tolist() == [0]


def test_the_same_bits_every_time():
    runs = []
    for _ in range(2):
        weights = parameters_of([(512, 384), (384, 512)], torch.bfloat16)
        optimizer = optimizer_of(weights, rank=64)
        for step in range(4):
            for offset, weight in enumerate(weights):
                weight.grad = drawn(weight.shape, 1000 * step + offset, torch.bfloat16, 1e-2)
            optimizer.step()
        runs.append((weights, optimizer))
    assert_same_bits(runs[0][0], runs[1][0], (runs[0][1], runs[1][1]))


def test_the_benchmarks_measure_a_gpu(tmp_path, monkeypatch):
    """Events, graph replays, launches and peaks, of every contender that is installed."""
    from bench import whole_step
    from bench.contenders import CONTENDERS
    from bench.results_file import Results

    case = whole_step.Case("60M", torch.bfloat16, 3, layers=1)
    results = Results("whole_step", "cuda", folder=tmp_path)
    whole_step.measure(case, "cuda", results)
    rows = {row["contender"]: row for row in results.rows.values()}
    assert rows.keys() == CONTENDERS.keys()
    assert all("failed" not in row.get("skipped", "") for row in rows.values())
    # Four for the matrices, two for the rest. In a graph step counts are on the device: one more, and one a group.
    for name, launches in (("APOLLO-Mini", 6), ("APOLLO-Mini, graph replay", 9)):
        assert rows[name]["launches"] == launches
        assert 0 < rows[name]["ms"][1] < 100
        assert rows[name]["extra_bytes"] < 1 << 22
    assert rows["PyTorch AdamW, fused"]["state_bytes"] > 4 * case.shapes.parameters
