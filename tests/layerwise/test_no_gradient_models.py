"""Steps without a gradient of whole models: the trajectories of ordinary steps."""

from __future__ import annotations

import pytest
import torch
from no_gradient_cases import GROUPS, assert_close, copies, language_model, low_rank, optimizer_of, train
from tiers import INTERPRETER_FULL

from apollo_triton import attach_layerwise

pytest.importorskip("transformers")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "name", "steps"),
    [
        ("llama", "mini", 10),
        ("qwen2", "rank 16", 10),
        *(
            pytest.param(kind, name, 30, marks=pytest.mark.full)
            for kind in ("llama", "qwen2", "gemma")
            for name in ("mini", "rank 16")
        ),
    ],
)
def test_a_whole_model_goes_the_ordinary_way(kind, name, steps):
    """Across one refresh, or four: input gradients of weights that have moved already, biases or norms left out, a
    weight that is moved twice or not at all."""
    models = [language_model(kind) for _ in range(2)]
    start = copies(models[0])
    for model, gradients in zip(models, ("plain", "none"), strict=True):
        optimizer = optimizer_of(model, **(GROUPS[name] | ({"scale": 16.0} if name == "mini" else {})))
        check = None
        if gradients == "none":
            handle = attach_layerwise(model, optimizer, gradients="none")
            assert len(handle.without_gradient) == len(low_rank(model)) == 14
            check = lambda model=model: all_none(model)  # noqa: E731
        train(model, optimizer, steps, check=check)
    assert_close(*models, start)


def all_none(model):
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("backend", INTERPRETER_FULL, indirect=True)
def test_a_whole_model_on_either_backend(backend):
    models = [language_model() for _ in range(2)]
    start = copies(models[0])
    for model, gradients in zip(models, ("plain", "none"), strict=True):
        optimizer = optimizer_of(model, rank=16, update_proj_gap=2)
        if gradients == "none":
            attach_layerwise(model, optimizer, gradients="none")
        train(model, optimizer, 4)
    assert_close(*models, start)


@pytest.mark.slow
@pytest.mark.parametrize("reentrant", [False, True])
def test_checkpointed_layers_go_the_ordinary_way(reentrant):
    """Recomputed forwards are no second use, and see the old weights."""
    models = [language_model("qwen2") for _ in range(2)]
    start = copies(models[0])
    for model, gradients in zip(models, ("plain", "none"), strict=True):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
        model.enable_input_require_grads()
        optimizer = optimizer_of(model)
        if gradients == "none":
            attach_layerwise(model, optimizer, gradients="none")
        train(model, optimizer, 8)  # P is refreshed at the last
    assert_close(*models, start)


@pytest.mark.slow
@pytest.mark.parametrize("autocast", [False, True])
def test_a_whole_model_under_autocast_and_in_bfloat16(autocast):
    """As far from a float32 run as the ordinary one, give or take what rounding decides. A gradient of the wrong dtype,
    a weight whose copy in bfloat16 is that of another step."""
    runs = {}
    for run in ("float32", "plain", "none"):
        model = language_model("qwen2").to(torch.bfloat16 if run != "float32" and not autocast else torch.float32)
        start = copies(model)
        optimizer = optimizer_of(model, rank=16)
        if run == "none":
            attach_layerwise(model, optimizer, gradients="none")
        train(model, optimizer, 4, autocast=autocast and run != "float32")
        moved = [(p.detach() - before).float().flatten() for p, before in zip(model.parameters(), start, strict=True)]
        runs[run] = torch.cat(moved)
    far = {run: (runs[run] - runs["float32"]).norm() / runs["float32"].norm() for run in ("plain", "none")}
    assert far["none"] < 1.2 * far["plain"]
