"""What a run is refused with gradients that are kept, freed, or never made: what the error says, and that nothing has
moved by then. What cannot be attached at all is in test_refused_attaching.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from layerwise_cases import make_optimizer
from torch import nn
from unchanged import assert_unchanged, snapshot

from apollo_triton import APOLLOAdamW, attach_layerwise

LAYER_WISE = pytest.mark.parametrize("gradients", ["freed", "none"])


class Run:
    """Two linear layers, each weight in a group of its own, after two steps. Backward comes by parameter 1 first."""

    def __init__(self, gradients: str, steps: int = 2) -> None:
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(12, 8, bias=False), nn.Linear(8, 12, bias=False)
        self.model = nn.Sequential(self.first, nn.Tanh(), self.last)
        groups = [{"params": [each], "rank": 4} for each in self.model.named_parameters()]
        self.optimizer = APOLLOAdamW(groups, lr=1e-2)
        self.handle = None
        if gradients != "kept":
            self.handle = attach_layerwise(self.model, self.optimizer, gradients=gradients)
        for _ in range(steps):
            self.step()

    def loss(self) -> torch.Tensor:
        return self.model(torch.linspace(-1, 1, 36).view(3, 12)).square().mean()

    def step(self) -> None:
        self.loss().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def by_gradients(rows: dict[str, dict[str, str]]) -> Any:
    """A case for each row and each way to handle gradients that refuses it, with what the error says there."""
    return [
        pytest.param(gradients, name, text, id=f"{name}-{gradients}")
        for name, texts in rows.items()
        for gradients, text in texts.items()
    ]


def everywhere(text: str) -> dict[str, str]:
    return dict.fromkeys(("kept", "freed", "none"), text)


def layer_wise(text: str) -> dict[str, str]:
    return dict.fromkeys(("freed", "none"), text)


# ---- settings and state that change between steps


CHANGED: dict[str, tuple[str, Any]] = {
    "rank": ("rank", 3),
    "proj_type": ("proj_type", "reverse_std"),
    "lr": ("lr", -1.0),
    "betas": ("betas", (0.9, 1.0)),
    "eps": ("eps", -1.0),
    "max_grad_norm": ("max_grad_norm", 1.0),
    "capturable": ("capturable", True),
    "svd": ("proj", "svd"),
}


@pytest.mark.parametrize(
    ("gradients", "name", "text"),
    by_gradients(
        {
            "rank": everywhere(r"parameter 1 \('2.weight'\).*exp_avg.* has shape .12, 4., not .12, 3."),
            "proj_type": everywhere(r"parameter 1 \('2.weight'\).*exp_avg"),
            "lr": everywhere("parameter group 1: Invalid learning rate: -1.0"),
            "betas": everywhere("parameter group 1: Invalid beta parameter at index 1: 1.0"),
            "eps": {
                "kept": "parameter group 1: Invalid epsilon",
                **layer_wise(r"parameter 1 \('2.weight'\).*parameter group 1: Invalid epsilon"),
            },
            "max_grad_norm": {
                "kept": "max_grad_norm differs between parameter groups",
                **layer_wise("parameter group 1: max_grad_norm=1.0"),
            },
            "capturable": {
                "kept": "parameter 0 .*capturable=True needs the Triton kernels",
                **layer_wise("parameter group 1: capturable=True"),
            },
            "svd": {"none": "parameter group 1: proj='svd'"},
        }
    ),
)
def test_settings_changed_between_steps(gradients, name, text):
    """Settings that were checked once and are taken for granted; traces that a refused step leaves."""
    run = Run(gradients)
    key, value = CHANGED[name]
    group = run.optimizer.param_groups[1]
    old, group[key] = group[key], value
    before = snapshot(run.optimizer)
    with pytest.raises(ValueError, match=text):
        run.step()
    assert_unchanged(run.optimizer, before)
    if gradients != "kept" and key in ("max_grad_norm", "capturable"):
        with pytest.raises(ValueError, match=f"group 1: {key}"):  # also where no hook has seen it
            run.optimizer.step()
        assert_unchanged(run.optimizer, before)
    group[key] = old
    run.optimizer.zero_grad()
    run.step()
    assert [run.optimizer.state[p]["step"].item() for p in run.model.parameters()] == [3, 3]


@pytest.mark.parametrize("gradients", ["kept", "freed", "none"])
def test_state_that_was_moved_between_steps(gradients):
    """A kept plan that hands kernels an address on another device."""
    run = Run(gradients)
    state = run.optimizer.state[run.last.weight]
    state["exp_avg_sq"] = state["exp_avg_sq"].to("meta")
    before = snapshot(run.optimizer)
    with pytest.raises(ValueError, match=r"'2.weight'.* 'exp_avg_sq' is on meta, and the parameter on cpu; .*load_sta"):
        run.step()
    assert_unchanged(run.optimizer, before)


# ---- backward passes that would move a weight by a part of its gradient


@dataclass(frozen=True)
class Misuse:
    """``act`` is refused with ``texts`` by way to handle gradients; ``prepare`` is not."""

    texts: dict[str, str]
    act: Callable[[Run], Any]
    prepare: Callable[[Run], Any] = lambda run: None
    kind: type[Exception] = RuntimeError


def backward(run, **options):
    run.loss().backward(**options)


def backward_keeping_the_graph(run):
    run.kept = run.loss()
    run.kept.backward(retain_graph=True)


def last_layer_twice(run):
    hidden = run.first(torch.ones(2, 12))
    (run.last(hidden) * run.last(hidden.tanh())).sum().backward()


def backward_before_attaching(run):
    run.handle.remove()
    run.loss().backward()
    run.handle = attach_layerwise(run.model, run.optimizer, gradients="none")


def scaled_backward(run):
    run.scaler = torch.amp.GradScaler("cpu")
    run.scaler.scale(run.loss()).backward()


def accumulate(run):
    with run.handle.accumulate():
        run.loss().backward()


MISUSES = {
    "a second backward": Misuse(
        {
            "freed": r"parameter 1 .*second time.*handle.accumulate\(\)",
            "none": r"parameter 1 .*second time.*call optimizer.step\(\) after each backward",
        },
        backward,
        backward,
    ),
    "a second backward of one graph": Misuse(
        layer_wise("modified by an inplace operation|second time"),
        lambda run: run.kept.backward(),
        backward_keeping_the_graph,
    ),
    "a layer that runs twice": Misuse(
        {"none": r"parameter 1 .*ran forward more than once.*gradients=\"freed\""}, last_layer_twice
    ),
    "a gradient that is there already": Misuse(
        {"none": r"parameter 1 .*has a gradient of an earlier backward.*zero_grad"}, backward, backward_before_attaching
    ),
    "second derivatives": Misuse(
        {"none": r"create_graph=True.*freed"},
        lambda run: backward(run, create_graph=True),
        kind=NotImplementedError,
    ),
    "accumulation": Misuse({"none": "has no gradients that could accumulate"}, accumulate),
    "an input of another dtype": Misuse(
        everywhere("dtype"), lambda run: run.model(torch.ones(2, 12, dtype=torch.bfloat16)).sum().backward()
    ),
    "GradScaler": Misuse(
        layer_wise("GradScaler.*bfloat16"),
        lambda run: run.scaler.step(run.optimizer),
        scaled_backward,
        kind=ValueError,
    ),
}


@pytest.mark.parametrize(
    ("gradients", "name", "text"), by_gradients({name: misuse.texts for name, misuse in MISUSES.items()})
)
def test_what_a_backward_pass_cannot_do(gradients, name, text):
    """Weights that move by a part of their gradient, or twice, and training that goes on wrong without an error."""
    run, misuse = Run(gradients), MISUSES[name]
    misuse.prepare(run)
    before = snapshot(run.optimizer)
    with pytest.raises(misuse.kind, match=text):
        misuse.act(run)
    assert_unchanged(run.optimizer, before)


@LAYER_WISE
def test_autograd_notices_a_weight_that_moved_too_early(gradients):
    """Another use of the weight whose backward comes later, and would see the new one."""
    run = Run(gradients)
    x = torch.ones(3, 8, requires_grad=True)
    hidden = (x * 2) @ run.first.weight.detach()  # its backward needs the old weight, and comes last
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        run.first(hidden).sum().backward()


@LAYER_WISE
def test_a_scaler_works_again_once_the_handle_is_removed(gradients):
    run = Run(gradients)
    with pytest.raises(ValueError, match="GradScaler"):  # where the scaler asks
        _ = run.optimizer._step_supports_amp_scaling
    run.handle.remove()
    assert run.optimizer._step_supports_amp_scaling is False


@LAYER_WISE
def test_a_sparse_gradient_changes_nothing(gradients):
    model = nn.ModuleDict({"mlp": nn.Linear(8, 8), "embedding": nn.Embedding(8, 8, sparse=True)})
    optimizer = make_optimizer(model, rank=2)
    attach_layerwise(model, optimizer, gradients=gradients)
    embedding = model["embedding"].weight
    before = embedding.detach().clone()
    with pytest.raises(RuntimeError, match=r"parameter 1 \('embedding.weight'\).*sparse"):
        model["mlp"](model["embedding"](torch.tensor([1]))).sum().backward()
    assert torch.equal(embedding, before)
    assert embedding not in optimizer.state
    embedding.grad = None
    optimizer.step()


@LAYER_WISE
def test_autograd_grad_gives_a_gradient_and_moves_nothing(gradients):
    plain, run = Run("kept"), Run(gradients)
    expected = torch.autograd.grad(plain.loss(), list(plain.model.parameters()))
    before = snapshot(run.optimizer)
    found = torch.autograd.grad(run.loss(), list(run.model.parameters()))
    for mine, other in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=1e-4, atol=1e-6)
    assert_unchanged(run.optimizer, before)
