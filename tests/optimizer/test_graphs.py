"""What a step may not do for graphs' and scalers' sake: read the device. Captured steps, replayed; GradScaler."""

from __future__ import annotations

import pytest
import torch
from kernel_cases import (
    DEVICE,
    assert_same_bits,
    drawn,
    kernels_everywhere,
    new_gradients,
    optimizer_of,
    parameters_of,
    set_gradient,
    train,
)
from tiers import pairs
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

pytest.importorskip("triton")

from apollo_triton import APOLLOAdamW
from apollo_triton.core import gpu

pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []


class NoHostRead(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func not in (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default), func
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("capturable", "limit", "rank", "lr"), pairs([False, True], [None, 1.0], [1, 16], [1e-2, torch.tensor(1e-2)])
)
def test_a_step_never_reads_the_device(capturable, limit, rank, lr, monkeypatch):
    """Nor does it look into host tensors by a path that would wait for a device."""
    monkeypatch.setattr(gpu, "launch", lambda *arguments, **constants: None)
    parameters = parameters_of([(24, 16), (16, 24), (2, 20, 16)])
    constructor = {"max_grad_norm": limit, "capturable": capturable}
    optimizer = optimizer_of(parameters, parameters_of([(8,)]), lr=lr, constructor=constructor, rank=rank)
    with NoHostRead():
        for step in range(3):
            new_gradients(parameters, step)
            optimizer.step()
    if not capturable:
        assert optimizer.state[parameters[0]]["step"] == 3


@pytest.mark.slow
@pytest.mark.parametrize(
    ("scale_type", "rank"),
    [
        ("channel", 16),
        ("tensor", 1),
        pytest.param("channel", 1, marks=pytest.mark.full),
        pytest.param("tensor", 16, marks=pytest.mark.full),
    ],
)
def test_capturable_computes_the_same(scale_type, rank):
    """t and lr from the device: bias correction in float32 by expm1, and P refreshed by the kernel itself."""
    weights, dense = parameters_of([(24, 16), (16, 24)]), parameters_of([(8,)])
    options = {"rank": rank, "scale_type": scale_type, "update_proj_gap": 2, "weight_decay": 0.1, "steps": 5}
    plain, _ = train(weights, dense, **options)
    captured, optimizer = train(weights, dense, constructor={"capturable": True}, **options)
    for mine, other in zip(captured, plain, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-6, atol=1e-7)
    assert optimizer.state[captured[0]]["step"].device.type == DEVICE
    assert optimizer.state[captured[0]]["step"] == 5
    assert isinstance(optimizer.param_groups[0]["lr"], torch.Tensor)


@pytest.mark.skipif(DEVICE != "cpu", reason="there is a real graph to try")
@pytest.mark.slow
@pytest.mark.parametrize(
    ("rank", "limit"),
    [
        (16, None),
        (1, 0.05),
        pytest.param(16, 0.05, marks=pytest.mark.full),
        pytest.param(1, None, marks=pytest.mark.full),
    ],
)
def test_a_replayed_step_follows_scheduler_step_count_and_refresh(rank, limit):
    from replay import Graph

    def trained(captured):
        weights = [nn.Parameter(each.detach().clone()) for each in parameters_of([(24, 16), (16, 24), (2, 20, 16)])]
        dense = [nn.Parameter(each.detach().clone()) for each in parameters_of([(8,)])]
        optimizer = optimizer_of(
            weights,
            dense,
            constructor={"capturable": True, "max_grad_norm": limit, "stochastic_rounding": True},
            rank=rank,
            update_proj_gap=2,
            weight_decay=0.1,
        )
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        static = [drawn(each.shape, 0, scale=1e-2) for each in weights + dense]
        graph = None
        for step in range(6):  # replays write a new P before the eager step and after it
            for offset, gradient in enumerate(static):
                gradient.copy_(drawn(gradient.shape, 1000 * step + offset, scale=1e-2))
            if step in (1, 4):  # once more after an eager step with gradients elsewhere
                for parameter, gradient in zip(weights + dense, static, strict=True):
                    parameter.grad = gradient
            if captured and step == 1:
                with Graph() as graph:
                    optimizer.step()
                for each in optimizer.state.values():
                    each["step"] -= 1  # a capture launches nothing
            if step == 3:
                for parameter, gradient in zip(weights + dense, static, strict=True):
                    parameter.grad = gradient.clone()
                optimizer.step()
            elif step == 0:
                for parameter, gradient in zip(weights + dense, static, strict=True):
                    parameter.grad = gradient
                optimizer.step()
            elif captured:
                graph.replay()
            else:
                optimizer.step()
            scheduler.step()
        return weights + dense, optimizer

    (plain, first), (replayed, second) = trained(False), trained(True)
    assert_same_bits(plain, replayed)
    for mine, other in zip(plain, replayed, strict=True):
        assert torch.equal(first.state[mine]["exp_avg_sq"], second.state[other]["exp_avg_sq"])
        assert first.state[mine]["step"] == second.state[other]["step"] == 6


def test_a_capture_wants_capturable_and_a_step_before_it(monkeypatch):
    weights = parameters_of([(24, 16)])
    monkeypatch.setattr("apollo_triton.engine.engine._is_capturing", lambda: True)
    with pytest.raises(RuntimeError, match="capturable=True"):
        optimizer_of(weights, rank=1).step()
    optimizer = optimizer_of(weights, rank=1, constructor={"capturable": True})
    before = weights[0].detach().clone()
    with pytest.raises(RuntimeError, match="before every capture"):
        optimizer.step()
    assert torch.equal(weights[0], before)


def test_capturable_needs_the_kernels_and_no_svd():
    (weight,) = parameters_of([(24, 16)])
    with pytest.raises(ValueError, match="capturable=True needs the Triton kernels"):
        optimizer_of([weight], backend="reference", constructor={"capturable": True}, rank=1).step()
    with pytest.raises(ValueError, match="svd"):
        optimizer_of([weight], constructor={"capturable": True}, rank=1, proj="svd").step()


@pytest.mark.slow
@pytest.mark.parametrize(("limit", "unscale_first", "capturable"), pairs([None, 0.05], [False, True], [False, True]))
def test_grad_scaler_leaves_unscaling_and_skipping_to_the_step(limit, unscale_first, capturable, monkeypatch):
    """Against gradients that were never scaled; the overflow costs a step that nothing remembers."""
    with kernels_everywhere(monkeypatch):
        shapes = [(24, 16), (16, 24), (8,)]
        scaled, plain = ([nn.Parameter(each.detach().clone()) for each in parameters_of(shapes)] for _ in range(2))
        constructor = {"max_grad_norm": limit, "capturable": capturable}
        optimizers = [
            optimizer_of(each[:2], each[2:], rank=16, update_proj_gap=2, constructor=constructor)
            for each in (scaled, plain)
        ]
        scaler = torch.amp.GradScaler(DEVICE, init_scale=1024.0, growth_interval=2)
        for step in range(4):
            overflow = step == 2
            for offset, (a, b) in enumerate(zip(scaled, plain, strict=True)):
                gradient = drawn(a.shape, 1000 * step + offset, scale=1e-2)
                set_gradient(a, gradient * scaler.get_scale())
                set_gradient(b, gradient)
            scaler.scale(torch.ones(1, device=DEVICE))
            if overflow:
                scaled[1].grad[3, 3] = float("inf")
            if unscale_first:
                scaler.unscale_(optimizers[0])
            with NoHostRead() if not unscale_first else torch.no_grad():
                scaler.step(optimizers[0])
            scaler.update()
            if not overflow:
                optimizers[1].step()
        for mine, other in zip(scaled, plain, strict=True):
            torch.testing.assert_close(mine, other, rtol=2e-6, atol=1e-7)
            assert optimizers[0].state[mine]["step"] == optimizers[1].state[other]["step"] == 3
        assert optimizers[0].skipped_updates == 0  # the scaler's skip is no step


def test_parameters_share_a_launch_by_the_steps_they_have_taken_on_the_device():
    """The host counts a skipped step; by its count both would have taken two, and have the first's t."""
    results = []
    for gap in (200, 201):  # which alone keeps the two apart
        one, other = parameters_of([(16, 16)] * 2)
        optimizer = APOLLOAdamW(
            [{"params": [one], "rank": 2}, {"params": [other], "rank": 2, "update_proj_gap": gap}],
            lr=1e-2,
            backend="triton",
        )
        optimizer.grad_scale = torch.ones((), device=DEVICE)
        for step, (stepping, overflow) in enumerate([([one], 0.0), ([other], 1.0), ([one, other], 0.0)]):
            one.grad = other.grad = None
            new_gradients(stepping, step)
            optimizer.found_inf = torch.tensor(overflow, device=DEVICE)
            optimizer.step()
        assert [optimizer.state[each]["step"].item() for each in (one, other)] == [2, 1]
        results.append([one.detach(), other.detach()])
    assert_same_bits(*results)


def test_scaler_takes_its_own_way_where_the_reference_path_updates():
    assert not optimizer_of(parameters_of([(8, 8)]), rank=1, backend="reference")._step_supports_amp_scaling


@pytest.mark.skipif(DEVICE != "cpu", reason="there is a real graph to try")
def test_an_eager_step_after_a_replay_finds_its_own_gradients():
    """A replay leaves the addresses of its capture in the table; the host remembers those of the step before."""
    from replay import Graph

    results = []
    for captured in (False, True):
        (weight,) = parameters_of([(24, 16)])
        optimizer = optimizer_of([weight], rank=2, constructor={"capturable": True})
        first, second = (drawn((24, 16), seed, scale=1e-2) for seed in (1, 2))
        weight.grad = first
        optimizer.step()
        weight.grad = second
        if captured:
            with Graph() as graph:
                optimizer.step()
            optimizer.state[weight]["step"] -= 1  # a capture launches nothing
            graph.replay()
        else:
            optimizer.step()
        weight.grad = first
        optimizer.step()
        results.append(weight.detach())
    assert torch.equal(*results)
