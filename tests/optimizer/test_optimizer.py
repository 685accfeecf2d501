"""A real ``torch.optim.Optimizer``: schedulers, hooks, scalers, groups, and what a script has set or done around it:
default dtypes and devices, tensor learning rates, frozen and late parameters."""

from __future__ import annotations

import pytest
import torch
from optimizer_cases import OPTIONS, make_model, same_weights, train
from torch import nn

from apollo_triton import APOLLOAdamW, apollo_param_groups
from apollo_triton.core import projection


@pytest.fixture(autouse=True)
def restore_defaults():
    yield
    torch.set_default_dtype(torch.float32)
    torch.set_default_device(None)


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
    low_rank, dense, vectors = optimizer.param_groups
    assert [p is model["mlp"][1].weight for p in low_rank["params"]] == [True]
    assert (low_rank["update_proj_gap"], low_rank["scale"], low_rank["lr"], dense["weight_decay"]) == (
        17,
        3.0,
        0.5,
        0.25,
    )
    assert (low_rank["rank"], low_rank["scale_type"]) == ((6, "channel") if "rank" in options else (1, "tensor"))
    assert "rank" not in dense
    assert (vectors["lr"], vectors["weight_decay"]) == (0.5, 0.0)


def test_a_group_without_names_can_join_named_ones():
    optimizer = APOLLOAdamW(apollo_param_groups(nn.ModuleDict({"mlp": nn.Linear(8, 8)}), rank=2))
    late = [nn.Parameter(torch.ones(5)), nn.Parameter(torch.ones(6, 4))]
    optimizer.add_param_group({"params": late, "rank": 2})
    for weight in late:
        weight.grad = torch.ones_like(weight)
    optimizer.step()
    assert all((weight < 1).any() for weight in late)


def test_frozen_weights_may_have_any_dtype_until_they_are_trained():
    frozen = nn.Parameter(torch.zeros(4, 4, dtype=torch.float64), requires_grad=False)
    quantised = nn.Parameter(torch.zeros(4, dtype=torch.uint8), requires_grad=False)
    weight = nn.Parameter(torch.zeros(4))
    weight.grad = torch.ones(4)
    optimizer = APOLLOAdamW([weight, frozen, quantised])
    optimizer.step()
    frozen.requires_grad_().grad = torch.ones(4, 4, dtype=torch.float64)
    with pytest.raises(ValueError, match=r"parameter 1 of shape \(4, 4\) has dtype torch.float64"):
        optimizer.step()
    assert optimizer.state[weight]["step"].item() == 1


def parameters(dtype=torch.float32):
    """Two orientations of a matrix, and a vector, with gradients; the second matrix's gradient is broken."""
    generator = torch.Generator().manual_seed(0)
    made = []
    for shape in ((24, 10), (10, 24), (24, 10), (7,)):
        weight = nn.Parameter(torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype))
        weight.grad = torch.randn(shape, generator=generator, dtype=torch.float32, device="cpu").to(dtype)
        made.append(weight)
    made[1].grad[2, 3] = torch.nan
    return made


def after_two_steps(dtype, **options):
    weights = parameters(dtype)
    optimizer = APOLLOAdamW([{"params": weights[:3], "rank": 3}, {"params": weights[3:]}], weight_decay=0.1, **options)
    optimizer.step()
    optimizer.step()
    state = [optimizer.state[w][name] for w in weights for name in ("exp_avg", "exp_avg_sq")]
    return [*(weight.detach() for weight in weights), *state], optimizer


@pytest.mark.parametrize("default", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "options", [{}, {"max_grad_norm": 0.5, "state_dtype": torch.bfloat16, "stochastic_rounding": True}]
)
def test_the_default_dtype_does_not_matter(default, dtype, options):
    expected, _ = after_two_steps(dtype, **options)
    torch.set_default_dtype(default)
    found, optimizer = after_two_steps(dtype, **options)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert optimizer.gradient_norm is None or optimizer.gradient_norm.dtype == torch.float32


@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 0.5, "seed_per_param": True}])
def test_the_default_device_does_not_matter(options):
    expected, _ = after_two_steps(torch.float32, **options)
    torch.set_default_device("meta")  # whatever is made there can neither be computed with nor read
    found, optimizer = after_two_steps(torch.float32, **options)
    assert all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))
    assert optimizer.skipped_updates.item() == 2
    assert APOLLOAdamW(parameters()).skipped_updates.item() == 0


@pytest.mark.parametrize("shape", [(), (1,), (1, 1)])
@pytest.mark.parametrize("lr_dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_tensor_learning_rate_of_any_shape_is_the_number_in_it(shape, lr_dtype, dtype):
    expected, _ = after_two_steps(dtype, lr=2**-7)
    found, _ = after_two_steps(dtype, lr=torch.full(shape, 2**-7, dtype=lr_dtype))
    for a, b in zip(found, expected, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=2**-7 if dtype == torch.bfloat16 else 1e-6, atol=1e-8)


def count_projections(monkeypatch):
    made = []
    original = projection.projection_matrix

    def counted(seed, epoch, *args, **kwargs):
        made.append(epoch)
        return original(seed, epoch, *args, **kwargs)

    monkeypatch.setattr(projection, "projection_matrix", counted)
    return made


def test_each_projection_is_made_once_however_many_epochs_are_under_way(monkeypatch):
    made = count_projections(monkeypatch)
    early, late = (nn.Parameter(torch.ones(12, 8)) for _ in range(2))
    other = nn.Parameter(torch.ones(12, 8))
    groups = [{"params": [early, late], "rank": 2, "update_proj_gap": 10}]
    optimizer = APOLLOAdamW([*groups, {"params": [other], "rank": 2, "update_proj_gap": 5}])
    for step in range(30):
        early.grad, other.grad = torch.ones(12, 8), torch.ones(12, 8)
        late.grad = torch.ones(12, 8) if step >= 5 else None
        optimizer.step()
    # Epochs 0 to 2 of the gap of 10, from step 0 and again from step 5, are under way as 0 to 5 of the gap of 5 pass.
    # One whose last user has gone on may be needed again by a late parameter: 0, 1 and 2 at most twice.
    assert sorted(set(made)) == [0, 1, 2, 3, 4, 5]
    assert len(made) <= 9


def test_projections_that_are_over_are_forgotten():
    weight = nn.Parameter(torch.ones(12, 8))
    optimizer = APOLLOAdamW([{"params": [weight], "rank": 2, "update_proj_gap": 1}])
    for _ in range(5):
        weight.grad = torch.ones(12, 8)
        optimizer.step()
    assert len(optimizer._caches.projections._matrices) == 1
