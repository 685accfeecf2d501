"""Clipping under layer-wise updates finds no gradient and returns 0: who calls it is told, once, and nobody else."""

from __future__ import annotations

import warnings

import pytest
import torch
from layerwise_cases import loss_of, make_model, make_optimizer
from torch import nn
from torch.nn.utils import clip_grad_norm_
from torch.nn.utils import clip_grad_norm_ as clip

from apollo_triton import attach_layerwise


class Loop:
    """A training loop of three steps, in several hands."""

    def __init__(self, gradients="freed"):
        self.model = make_model()
        self.optimizer = make_optimizer(self.model, rank=4)
        self.handle = None
        if gradients != "kept":
            self.handle = attach_layerwise(self.model, self.optimizer, gradients=gradients)

    def backward(self, step):
        loss_of(self.model, step).backward()

    def end(self):
        self.optimizer.step()
        self.optimizer.zero_grad()


def by_torch(loop):
    for step in range(3):
        loop.backward(step)
        torch.nn.utils.clip_grad_norm_(loop.model.parameters(), 1.0)
        loop.end()


def by_its_name(loop):
    for step in range(3):
        loop.backward(step)
        clip_grad_norm_(loop.model.parameters(), 1.0)
        loop.end()


def imported_there(loop):
    from torch.nn.utils import clip_grad_norm_

    for step in range(3):
        loop.backward(step)
        clip_grad_norm_(loop.model.parameters(), 1.0)
        loop.end()


def by_another_name(loop):
    for step in range(3):
        loop.backward(step)
        clip(loop.model.parameters(), 1.0)
        loop.end()


def from_a_closure(loop):
    clip_grad_norm_ = nn.utils.clip_grad_norm_

    def one(step):
        loop.backward(step)
        clip_grad_norm_(loop.model.parameters(), 1.0)
        loop.end()

    for step in range(3):
        one(step)


def by_accelerate(loop):
    class Accelerator:
        def clip_grad_norm_(self, parameters, limit):
            return nn.utils.clip_grad_norm_(parameters, limit)

    accelerator = Accelerator()
    for step in range(3):
        loop.backward(step)
        accelerator.clip_grad_norm_(loop.model.parameters(), 1.0)
        loop.end()


def warned(run, *arguments):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(*arguments)
    return [each for each in caught if "clips nothing" in str(each.message)]


@pytest.mark.parametrize("run", [by_torch, by_its_name, by_another_name, imported_there, from_a_closure, by_accelerate])
@pytest.mark.parametrize("gradients", ["freed", "none"])
def test_whoever_clips_is_told_once(run, gradients):
    (found,) = warned(run, Loop(gradients))
    where = "one" if run is from_a_closure else run.__name__
    assert str(found.message).startswith(
        f"clip_grad_norm_ in {where} ({__file__}) finds no gradient of this optimizer's parameters and clips nothing: "
    )
    assert "max_grad_norm=1.0" in str(found.message)
    assert found.filename == __file__


def not_at_all(loop):
    for step in range(3):
        loop.backward(step)
        loop.end()


def imported_for_others(loop):
    """As a script imports it, whose function that runs clips nothing."""
    from torch.nn.utils import clip_grad_norm_  # noqa: F401

    not_at_all(loop)


@pytest.mark.parametrize(
    ("run", "gradients"),
    [(not_at_all, "freed"), (not_at_all, "none"), (by_torch, "kept"), (imported_for_others, "freed")],
)
def test_nobody_else_is(run, gradients):
    assert warned(run, Loop(gradients)) == []


def test_after_remove_clipping_works_and_is_no_news():
    loop = Loop()
    loop.handle.remove()
    assert warned(by_torch, loop) == []


TRAINER = """
class Trainer:
    def __init__(self, **options):
        vars(self).update(options)

    def train(self, loop):
        for step in range(3):
            self.training_step(loop, step)

    def training_step(self, loop, step):
        loop.backward(step)
        if self.limit:  # the name is there whether it runs or not
            self.accelerator.clip_grad_norm_(loop.model.parameters(), self.limit)
        loop.end()
"""
PROGRAMS = {
    "transformers.trainer": lambda limit: {"args": type("Arguments", (), {"max_grad_norm": limit})},
    "lightning.pytorch.trainer.trainer": lambda limit: {"gradient_clip_val": limit},
    "pytorch_lightning.trainer.trainer": lambda limit: {"gradient_clip_val": limit},
}


@pytest.mark.parametrize("limit", [1.0, 0.0, None])
@pytest.mark.parametrize("module", PROGRAMS)
def test_a_trainer_that_clips_by_default_is_seen_by_its_option(module, limit):
    """Hugging Face's Trainer clips at 1.0 unless it is told otherwise, and logs a norm of 0."""
    names = {"__name__": module}
    exec(compile(TRAINER, "trainer.py", "exec"), names)
    trainer = names["Trainer"](limit=None, **PROGRAMS[module](limit))
    found = [str(each.message) for each in warned(trainer.train, Loop())]
    if not limit:
        assert found == []
        return
    call = "TrainingArguments(max_grad_norm=1.0)" if "transformers" in module else "Trainer(gradient_clip_val=1.0)"
    off = "max_grad_norm=0" if "transformers" in module else "gradient_clip_val=None"
    assert len(found) == 1
    assert found[0].startswith(f"{call} clips nothing: use {off}.")
