"""A real ``torch.optim.Optimizer``: schedulers, hooks, scalers, clipping, and what stays as it was given."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from apollo_triton import APOLLOAdamW, apollo_param_groups

OPTIONS = {
    "channel": {"rank": 4, "scale_type": "channel", "update_proj_gap": 5},
    "tensor": {"rank": 1, "scale_type": "tensor", "scale": 128.0, "update_proj_gap": 5},
    "svd": {"rank": 4, "proj": "svd", "update_proj_gap": 5},
}


def make_model(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    model = nn.ModuleDict({"mlp": nn.Sequential(nn.Linear(12, 24), nn.Linear(24, 12)), "norm": nn.LayerNorm(12)})
    return model.to(dtype)


def train(model, optimizer, steps, first=0):
    for step in range(first, first + steps):
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(step)).to(next(model.parameters()).dtype)
        loss = (model["norm"](model["mlp"](x)) - x.flip(1)).float().square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item()


def same_weights(first, second):
    return all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


@pytest.mark.parametrize("group", OPTIONS.values(), ids=OPTIONS.keys())
def test_training_reduces_the_loss(group):
    model = make_model()
    optimizer = APOLLOAdamW(apollo_param_groups(model, **group), lr=1e-2)
    first = train(model, optimizer, 1)
    assert train(model, optimizer, 150, first=1) < 0.7 * first


def test_schedulers_drive_the_learning_rate():
    models = [make_model() for _ in range(2)]
    by_hand = APOLLOAdamW(apollo_param_groups(models[0], rank=4), lr=1e-2)
    scheduled = APOLLOAdamW(apollo_param_groups(models[1], rank=4), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(scheduled, lambda step: 1 / (1 + step))
    for step in range(4):
        for group in by_hand.param_groups:
            group["lr"] = 1e-2 / (1 + step)
        train(models[0], by_hand, 1, first=step)
        train(models[1], scheduled, 1, first=step)
        scheduler.step()
    assert same_weights(*models)


def test_one_cycle_moves_the_momentum_of_betas():
    model = make_model()
    optimizer = APOLLOAdamW(apollo_param_groups(model, rank=4), lr=1e-3)
    scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=1e-2, total_steps=10)
    betas = set()
    for step in range(5):
        train(model, optimizer, 1, first=step)
        scheduler.step()
        betas.add(optimizer.param_groups[0]["betas"][0])
    assert len(betas) == 5


def test_tensor_learning_rate_equals_a_float():
    models = [make_model() for _ in range(2)]
    plain = APOLLOAdamW(apollo_param_groups(models[0], rank=4), lr=0.0078125, weight_decay=0.1)
    tensor = APOLLOAdamW(apollo_param_groups(models[1], rank=4), lr=torch.tensor(0.0078125), weight_decay=0.1)
    for model, optimizer in zip(models, (plain, tensor), strict=True):
        train(model, optimizer, 6)
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


def test_hooks_run_around_a_step():
    model = make_model()
    optimizer = APOLLOAdamW(apollo_param_groups(model, rank=4))
    calls = []
    optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
    optimizer.register_step_post_hook(lambda *_: calls.append("post"))
    train(model, optimizer, 2)
    assert calls == ["pre", "post"] * 2


def test_grad_scaler_skips_and_unscales():
    models = [make_model() for _ in range(2)]
    optimizers = [APOLLOAdamW(apollo_param_groups(model, rank=4), lr=1e-2) for model in models]
    train(models[0], optimizers[0], 1)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
    x = torch.randn(8, 12, generator=torch.Generator().manual_seed(0))
    for poison in (True, False):
        optimizers[1].zero_grad()
        loss = (models[1]["norm"](models[1]["mlp"](x)) - x.flip(1)).float().square().mean()
        scaler.scale(loss).backward()
        if poison:
            models[1]["norm"].bias.grad[0] = torch.inf
        scaler.step(optimizers[1])
        scaler.update()
        if poison:
            assert not optimizers[1].state
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("limit", [1e-3, 1e3])
@pytest.mark.parametrize("group", OPTIONS.values(), ids=OPTIONS.keys())
def test_clipping_equals_clip_grad_norm(limit, group):
    models = [make_model() for _ in range(2)]
    inside = APOLLOAdamW(apollo_param_groups(models[0], **group), lr=1e-2, max_grad_norm=limit)
    outside = APOLLOAdamW(apollo_param_groups(models[1], **group), lr=1e-2)
    for step in range(6):
        for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(step))
            q.grad = p.grad.clone()
        given = [p.grad.clone() for p in models[0].parameters()]
        norm = nn.utils.clip_grad_norm_(models[1].parameters(), limit)
        inside.step()
        outside.step()
        torch.testing.assert_close(inside.gradient_norm, norm)
        for p, gradient in zip(models[0].parameters(), given, strict=True):
            assert torch.equal(p.grad, gradient)  # gradients are read, never written
    for p, q in zip(models[0].parameters(), models[1].parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2e-5, atol=1e-6)


def test_clipping_ignores_gradients_that_are_not_finite():
    models = [make_model() for _ in range(2)]
    optimizers = [APOLLOAdamW(apollo_param_groups(model, rank=4), max_grad_norm=0.01) for model in models]
    for model in models:
        for p in model.parameters():
            p.grad = torch.ones_like(p)
    models[0]["norm"].weight.grad[3] = torch.nan
    models[1]["norm"].weight.grad = None
    for optimizer in optimizers:
        optimizer.step()
    assert optimizers[0].skipped_updates.item() == 1
    assert same_weights(*models)


def test_seed_per_param_gives_each_weight_its_own_projection():
    gradient = torch.randn(20, 10, generator=torch.Generator().manual_seed(0))
    for own in (False, True):
        weights = [nn.Parameter(torch.zeros(20, 10)) for _ in range(2)]
        optimizer = APOLLOAdamW([{"params": weights, "rank": 2}], seed_per_param=own)
        for weight in weights:
            weight.grad = gradient
        optimizer.step()
        moments = [optimizer.state[weight]["exp_avg"] for weight in weights]
        seeds = [optimizer.state[weight]["seed"] for weight in weights]
        assert torch.equal(*moments) != own
        assert (seeds[0] == seeds[1]) != own


def test_a_weight_moves_alike_alone_and_in_company():
    """Grouping is for speed: alone, in a batch of many, or in another order, the bits are the same."""
    shapes = [(24, 10)] * 9 + [(10, 24)] * 3 + [(24, 12)]
    for group in ({"rank": 1, "scale_type": "tensor"}, {"rank": 3}):
        results = []
        for order in (range(len(shapes)), reversed(range(len(shapes))), None):
            weights = [
                nn.Parameter(torch.randn(s, generator=torch.Generator().manual_seed(i))) for i, s in enumerate(shapes)
            ]
            if order is None:
                optimizers = [APOLLOAdamW([{"params": [weight], **group}], lr=1e-2) for weight in weights]
            else:
                optimizers = [APOLLOAdamW([{"params": [weights[i] for i in order], **group}], lr=1e-2)]
            for step in range(4):
                for i, weight in enumerate(weights):
                    weight.grad = torch.randn(shapes[i], generator=torch.Generator().manual_seed(100 * step + i))
                for optimizer in optimizers:
                    optimizer.step()
            results.append([weight.detach() for weight in weights])
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


def test_block_and_part_sizes_do_not_show(monkeypatch):
    from apollo_triton.backends.reference import matrices as batches
    from apollo_triton.backends.reference import verbs as reference
    from apollo_triton.core import scratch

    results = []
    for size in (None, 64):
        if size:
            for module, name in (
                (scratch, "BLOCK_ELEMENTS"),
                (reference, "BLOCK_ELEMENTS"),
                (batches, "STACK_ELEMENTS"),
            ):
                monkeypatch.setattr(module, name, size)
        model = make_model(torch.bfloat16)
        groups = apollo_param_groups(model, rank=4)
        optimizer = APOLLOAdamW(
            groups, lr=1e-2, stochastic_rounding=True, state_dtype=torch.bfloat16, max_grad_norm=1.0
        )
        train(model, optimizer, 1)
        results.append((model, optimizer))
    (model, optimizer), (other_model, other) = results
    # Sums over the width are made in another order, so a value may fall to the other side of its random threshold:
    # an ulp of bfloat16, and rarely.
    for p, q in zip(model.parameters(), other_model.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=2**-7, atol=1e-6)
        assert (p != q).double().mean() < 0.02
        for name in ("exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(optimizer.state[p][name], other.state[q][name], rtol=2**-7, atol=1e-9)
            assert (optimizer.state[p][name] != other.state[q][name]).double().mean() < 0.05


def test_a_step_inside_autocast_is_the_same_step():
    results = []
    for enabled in (False, True):
        model = make_model()
        optimizer = APOLLOAdamW(apollo_param_groups(model, rank=4), lr=1e-2)
        for p in model.parameters():
            p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(0))
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            optimizer.step()
        results.append(model)
    assert same_weights(*results)


def test_float32_weights_take_bfloat16_gradients():
    if not hasattr(torch.Tensor, "grad_dtype"):
        pytest.skip("this torch keeps a gradient in its parameter's dtype")
    gradient = torch.randn(20, 12, generator=torch.Generator().manual_seed(0)).bfloat16()
    weights = [nn.Parameter(torch.ones(20, 12)) for _ in range(2)]
    weights[0].grad_dtype = torch.bfloat16
    weights[0].grad, weights[1].grad = gradient, gradient.float()
    for scale_type in ("channel", "tensor"):
        for weight in weights:
            APOLLOAdamW([{"params": [weight], "rank": 4, "scale_type": scale_type}], weight_decay=0.1).step()
    torch.testing.assert_close(*weights, rtol=1e-6, atol=1e-7)


def test_backend_for_names_the_backend_and_the_reason():
    model = make_model()
    optimizer = APOLLOAdamW(apollo_param_groups(model, rank=4))
    backend = optimizer.backend_for(model["norm"].weight)
    assert backend.name == "reference"
    assert backend.reason
    asked = APOLLOAdamW(model.parameters(), backend="reference").backend_for(model["norm"].weight)
    assert "asked" in asked.reason or "backend=" in asked.reason
    with pytest.raises(ValueError, match=r"shape \(3,\) is not in this optimizer"):
        optimizer.backend_for(torch.zeros(3))


def test_given_groups_are_not_written_to():
    model = make_model()
    groups = apollo_param_groups(model, rank=4)
    keys = [set(group) for group in groups]
    APOLLOAdamW(groups)
    assert [set(group) for group in groups] == keys


@pytest.mark.parametrize("make", [APOLLOAdamW.apollo, APOLLOAdamW.mini])
def test_whole_model_constructors_pass_everything_on(make):
    options = {"lr": 0.5, "weight_decay": 0.25, "target_modules": ["mlp.1"], "update_proj_gap": 17, "scale": 3.0}
    if make == APOLLOAdamW.apollo:
        options["rank"] = 6
    model = make_model()
    optimizer = make(model, **options)
    low_rank, dense = optimizer.param_groups
    assert [p is model["mlp"][1].weight for p in low_rank["params"]] == [True]
    assert (low_rank["update_proj_gap"], low_rank["scale"], low_rank["lr"], dense["weight_decay"]) == (
        17,
        3.0,
        0.5,
        0.25,
    )
    assert (low_rank["rank"], low_rank["scale_type"]) == ((6, "channel") if "rank" in options else (1, "tensor"))
    assert "rank" not in dense
