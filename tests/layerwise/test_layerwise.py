"""Layer-wise updates: the bits of a plain step, one gradient at a time."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from contextlib import nullcontext

import pytest
import torch
from layerwise_cases import assert_same, loss_of, make_model, make_optimizer, pair, train
from tiers import backend_params
from torch import nn
from torch.utils.checkpoint import checkpoint

from apollo_triton import APOLLOAdamW, attach_layerwise
from apollo_triton.core import projection

GROUPS = {
    "channel": {"rank": 4},
    "rank of tensor cores": {"rank": 16},
    "tensor": {"rank": 1, "scale_type": "tensor", "scale": 128.0},
    "svd": {"rank": 4, "proj": "svd"},
    "a seed each": {"rank": 17, "seed_per_param": True},
}


RUNS = {
    f"{name}, {str(dtype).removeprefix('torch.')}": (group, dtype)
    for name, group in GROUPS.items()
    for dtype in (torch.float32, torch.bfloat16)
}
# On the kernels: one P for all columns, P made in the launch, and svd's in memory, in both dtypes.
ON_KERNELS = {"rank of tensor cores, bfloat16", "tensor, float32", "svd, float32"}


@pytest.mark.parametrize(
    ("backend", "run"), backend_params(RUNS, {"interpreter": RUNS.keys() - ON_KERNELS}), indirect=["backend"]
)
def test_the_result_is_that_of_plain_steps(backend, run):
    """Across two refreshes; svd and seeds of their own, both orientations, dense vectors, several groups."""
    group, dtype = RUNS[run]
    models, optimizers, _ = pair(dtype, **group)
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, 5)
    assert_same(*models, optimizers)


def test_backward_itself_moves_the_weights_and_leaves_no_gradient():
    model = make_model()
    optimizer = make_optimizer(model, rank=4)
    attach_layerwise(model, optimizer)
    before = [p.detach().clone() for p in model.parameters()]
    loss_of(model, 0).backward()
    assert all(p.grad is None for p in model.parameters())
    assert not any(torch.equal(p, b) for p, b in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize(("hooks", "layers"), [(False, 6), (True, 1)])
def test_one_layers_gradients_are_alive_at_a_time(hooks, layers):
    """Bytes of all gradients whenever one is complete; the next test shows that what is let go is freed."""
    model = nn.Sequential(*[nn.Linear(32, 32, bias=False) for _ in range(6)])
    parameters = list(model.parameters())
    optimizer = APOLLOAdamW([{"params": parameters, "rank": 4}])
    alive = []

    def watch(_):
        alive.append(sum(p.grad.untyped_storage().nbytes() for p in parameters if p.grad is not None))

    for parameter in parameters:
        parameter.register_post_accumulate_grad_hook(watch)
    if hooks:
        attach_layerwise(model, optimizer)
    for _ in range(2):
        model(torch.ones(2, 32)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(alive) == 12
    assert max(alive) == layers * 32 * 32 * 4


def test_no_gradient_outlives_its_hook(backend):
    """Neither a plan nor a table nor a batch holds one."""
    model = make_model()
    optimizer = make_optimizer(model, rank=16)
    freed = []

    def watch(parameter):
        freed.append(weakref.ref(parameter.grad))

    for parameter in model.parameters():
        parameter.register_post_accumulate_grad_hook(watch)
    attach_layerwise(model, optimizer)
    for step in range(3):
        loss_of(model, step).backward()
        assert len(freed) == 6
        assert all(gradient() is None for gradient in freed)
        freed.clear()
        optimizer.step()


def test_a_scheduler_and_edits_of_groups_drive_the_hooks():
    models, optimizers, _ = pair(rank=4)
    for model, optimizer in zip(models, optimizers, strict=True):
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
        for step in range(4):
            optimizer.param_groups[1]["weight_decay"] = 0.1 * step
            train(model, optimizer, 1, first=step)
            scheduler.step()
    assert_same(*models, optimizers)


def test_accumulation_updates_once_with_the_sum():
    models, optimizers, handle = pair(rank=4)
    for step in range(3):
        for micro in range(2):
            loss_of(models[0], 10 * step + micro).backward()
            with handle.accumulate():
                loss_of(models[1], 10 * step + micro).backward()
        assert all(p.grad is not None for p in models[1].parameters())
        for model, optimizer in zip(models, optimizers, strict=True):
            train(model, optimizer, 1, first=10 * step + 2)
    assert_same(*models, optimizers)


def test_a_condition_says_which_backward_accumulates():
    """One that is asked once instead of at each gradient; an accumulation inside that the condition overrules, or that
    ends the one around it."""
    models, optimizers, handle = pair(rank=4)
    moves = True
    with handle.accumulate(lambda: not moves):
        for step in range(2):
            for micro in range(3):
                moves = micro != 1
                loss_of(models[0], 10 * step + micro).backward()
                with handle.accumulate() if micro == 0 else nullcontext():
                    loss_of(models[1], 10 * step + micro).backward()
                assert all((p.grad is None) == (micro == 2) for p in models[1].parameters())
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
        moves = False
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, 1, first=20)
    assert_same(*models, optimizers)


def test_a_gradient_that_only_an_accumulated_backward_has_waits_for_step():
    models, optimizers, handle = pair(rank=4)
    for model, hooked in zip(models, (False, True), strict=True):
        first = model["norm"].weight.square().sum()
        if hooked:
            with handle.accumulate():
                first.backward()
        else:
            first.backward()
        model["mlp"](torch.ones(2, 24)).sum().backward()
    for optimizer in optimizers:
        optimizer.step()
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        assert torch.equal(p, q)


def test_removing_brings_plain_steps_back(backend):
    models, optimizers, handle = pair(rank=16)
    train(models[0], optimizers[0], 5)
    with handle:
        train(models[1], optimizers[1], 3)
    handle.remove()
    loss_of(models[1], 3).backward()
    assert all(p.grad is not None for p in models[1].parameters())
    optimizers[1].step()
    optimizers[1].zero_grad()
    with attach_layerwise(models[1], optimizers[1]):
        train(models[1], optimizers[1], 1, 4)
    assert_same(*models, optimizers)


def test_skipped_updates_are_counted_over_all_hooks_and_kept(backend):
    model = make_model()
    optimizer = make_optimizer(model, rank=4)
    handle = attach_layerwise(model, optimizer)
    assert optimizer.skipped_updates.item() == 0
    for step in range(2):
        (loss_of(model, step) * torch.nan).backward()
        optimizer.step()
    assert optimizer.skipped_updates.item() == 12  # six parameters
    optimizer.load_state_dict(optimizer.state_dict())
    assert optimizer.skipped_updates.item() == 0
    (loss_of(model, 2) * torch.nan).backward()
    optimizer.step()
    handle.remove()
    assert optimizer.skipped_updates.item() == 6


def test_each_projection_is_made_once_a_period(monkeypatch):
    made = []
    original = projection.projection_matrix
    monkeypatch.setattr(projection, "projection_matrix", lambda *a, **k: made.append(a[1]) or original(*a, **k))
    models = nn.ModuleDict({"mlp": nn.Sequential(*[nn.Linear(24, 24) for _ in range(3)])})
    optimizer = make_optimizer(models, rank=4)
    attach_layerwise(models, optimizer)
    for _ in range(6):
        models["mlp"](torch.ones(2, 24)).sum().backward()
        optimizer.step()
    assert made == [0, 1, 2]
    assert len(optimizer._caches.projections._matrices) == 1


def test_the_kernels_projection_is_one_a_width(backend):
    """None on the reference path, which has its own."""
    model = nn.ModuleDict({"mlp": nn.Sequential(*[nn.Linear(24, 24) for _ in range(3)])})
    optimizer = make_optimizer(model, rank=16)
    handle = attach_layerwise(model, optimizer)
    for _ in range(3):
        model["mlp"](torch.ones(2, 24)).sum().backward()
        optimizer.step()
    assert len(optimizer._caches.projection_buffers) == (0 if backend == "reference" else 1)
    handle.remove()
    gc.collect()
    assert len(optimizer._caches.projection_buffers) == 0


def test_a_tied_weight_moves_once_by_its_whole_gradient():
    weights = []
    for hooks in (False, True):
        torch.manual_seed(0)
        tied = nn.Linear(12, 12)
        model = nn.Sequential(tied, nn.Tanh(), tied)
        optimizer = APOLLOAdamW([{"params": [tied.weight], "rank": 4}, {"params": [tied.bias]}], lr=1e-2)
        if hooks:
            attach_layerwise(model, optimizer)
        for step in range(3):
            model(torch.full((2, 12), 0.1 + step)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append(tied.weight.detach())
    assert torch.equal(*weights)


@pytest.mark.parametrize("shared", [False, True])
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointing_is_right_or_refused(reentrant, shared):
    """Reentrant checkpointing runs a backward for each part, and so a hook for each part that shares a weight."""
    weights = []
    for hooks in (False, True):
        torch.manual_seed(0)
        first, second = nn.Linear(12, 12), nn.Linear(12, 12)
        model = nn.Sequential(first, first if shared else second)
        parameters = list(model.parameters())
        optimizer = APOLLOAdamW([{"params": parameters, "rank": 4}], lr=1e-2)
        if hooks:
            attach_layerwise(model, optimizer)
        for step in range(2):
            x = torch.full((2, 12), 0.1 + step, requires_grad=True)
            for layer in model:
                x = checkpoint(lambda x, layer=layer: layer(x).tanh(), x, use_reentrant=reentrant)
            if hooks and shared and reentrant:
                with pytest.raises(RuntimeError, match="use_reentrant=False"):
                    x.sum().backward()
                return
            x.sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        weights.append([p.detach() for p in parameters])
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_autograd_notices_a_weight_that_moved_too_early(backend):
    """A use that takes no gradient may still need the old value; kernels write unseen by autograd."""
    weight = nn.Parameter(torch.ones(12, 8))
    model = nn.ParameterList([weight])
    optimizer = APOLLOAdamW([{"params": [weight], "rank": 2}])
    attach_layerwise(model, optimizer)
    x = torch.ones(3, 8, requires_grad=True)
    hidden = (x * 2) @ weight.detach().t()  # its backward needs the weight, and comes last
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        (hidden @ weight).sum().backward()


def test_late_parameters_are_updated_by_step_and_then_by_hooks():
    models = [make_model() for _ in range(2)]
    optimizers = []
    for model, hooks in zip(models, (False, True), strict=True):
        model["mlp"][0].weight.requires_grad_(False)
        optimizer = APOLLOAdamW([{"params": list(model["mlp"].parameters()), "rank": 4}], lr=1e-2, seed_per_param=True)
        optimizers.append(optimizer)
        if hooks:
            attach_layerwise(model, optimizer)
        train(model, optimizer, 1)
        model["mlp"][0].weight.requires_grad_()
        optimizer.add_param_group({"params": list(model["norm"].parameters())})
        train(model, optimizer, 3, 1)
    loss_of(models[1], 4).backward()
    assert all(p.grad is None for p in models[1].parameters())
    optimizers[1].step()
    train(models[0], optimizers[0], 1, 4)
    assert_same(*models, optimizers)


def test_a_closure_may_run_backward():
    models, optimizers, _ = pair(rank=4)
    for step in range(3):
        for model, optimizer in zip(models, optimizers, strict=True):

            def closure(model=model, optimizer=optimizer, step=step):
                optimizer.zero_grad()
                loss = loss_of(model, step)
                loss.backward()
                return loss

            assert optimizer.step(closure).item() > 0
    assert_same(*models, optimizers)


def test_copies_and_pickles_are_not_attached():
    model = make_model()
    optimizer = make_optimizer(model, rank=4)
    attach_layerwise(model, optimizer)
    train(model, optimizer, 2)
    copies = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    train(model, optimizer, 2, 2)
    for other, other_optimizer in copies:
        loss_of(other, 2).backward()
        assert all(p.grad is not None for p in other.parameters())
        other_optimizer.step()
        other_optimizer.zero_grad()
        attach_layerwise(other, other_optimizer)
        train(other, other_optimizer, 1, 3)
        assert_same(model, other, (optimizer, other_optimizer))


def test_an_optimizer_that_is_gone_leaves_the_gradients():
    """A hook that held it would keep it, and all its state, for as long as the model lives."""
    model = make_model()
    optimizer = make_optimizer(model, rank=4)
    attach_layerwise(model, optimizer)
    gone = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert gone() is None
    loss_of(model, 0).backward()
    assert all(p.grad is not None for p in model.parameters())
