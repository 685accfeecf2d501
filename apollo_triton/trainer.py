"""For Hugging Face's Trainer: the optimizer by its arguments, and layer-wise updates with gradient accumulation.

transformers is imported with this module, and only with it.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from contextlib import ExitStack
from typing import TYPE_CHECKING, Any

from torch import nn

from .core.extras import require
from .layerwise.handle import Layerwise, attach_layerwise
from .optimizer import APOLLOAdamW

require("transformers", "trainer")
from transformers import TrainerCallback  # noqa: E402

if TYPE_CHECKING:
    from transformers import TrainerControl, TrainerState, TrainingArguments

_attached_here: weakref.WeakSet[Layerwise] = weakref.WeakSet()


def optimizer_for_trainer(
    make: Callable[..., APOLLOAdamW], args: TrainingArguments, model: nn.Module | None = None, **options: Any
) -> tuple[Callable[..., Any], dict[str, Any]]:
    """What the Trainer takes as ``optimizer_cls_and_kwargs``: it makes its optimizer by ``make(model, ...)``.

    ``args.learning_rate``, ``weight_decay``, ``adam_beta1``, ``adam_beta2`` and ``adam_epsilon`` count, as with the
    Trainer's own optimizers, unless ``options`` say otherwise. They are read when the Trainer makes the optimizer, once
    for each model, so that ``model_init`` works.

    Args:
        make: ``APOLLOAdamW.apollo`` or ``APOLLOAdamW.mini``, or a function that takes a model and these options.
        args: the Trainer's ``TrainingArguments``.
        model: the Trainer's model, for transformers below 5.2. Later versions say themselves which model they train.
        options: those of ``make``, such as ``rank``, ``target_modules`` and ``state_dtype``.

    Raises, when the Trainer makes the optimizer, what ``make`` raises, and ValueError below transformers 5.2 without
    ``model`` or for another model than the Trainer's.

    >>> pair = optimizer_for_trainer(APOLLOAdamW.apollo, args, rank=256)  # doctest: +SKIP
    >>> trainer = Trainer(model, args, train_dataset=data, optimizer_cls_and_kwargs=pair)  # doctest: +SKIP
    """

    def made(trained: Any = None) -> Any:
        if trained is None:  # transformers makes the factory first, and then calls it with its model
            return made
        if not isinstance(trained, nn.Module):  # before 5.2 it has two groups of parameters for an optimizer's class
            trained = _model_of(trained, model)
        from_args = {
            "lr": args.learning_rate,
            "weight_decay": args.weight_decay,
            "betas": (args.adam_beta1, args.adam_beta2),
            "eps": args.adam_epsilon,
        }
        return make(trained, **from_args | options)

    return made, {}


def _model_of(groups: list[dict[str, Any]], model: nn.Module | None) -> nn.Module:
    """``model``, of whose parameters the Trainer has made ``groups``. Raises ValueError if they are not."""
    if model is None:
        raise ValueError(
            "this version of transformers gives an optimizer parameters without names: use "
            "optimizer_for_trainer(make, args, model=model), or transformers 5.2 or newer"
        )
    if not {parameter for group in groups for parameter in group["params"]} <= set(model.parameters()):
        raise ValueError(
            "optimizer_for_trainer was given another model than the Trainer trains: give it the Trainer's; with "
            "model_init use transformers 5.2 or newer"
        )
    return model


class LayerwiseCallback(TrainerCallback):
    """Layer-wise updates while ``Trainer.train()`` runs: each weight moves within backward, and its gradient is freed.

    At the beginning it calls ``attach_layerwise`` for the Trainer's model and optimizer, and at the end it takes the
    hooks away. With ``gradient_accumulation_steps`` above 1 gradients add up, and move the weights in the backward of a
    step's last micro-batch. Losses, weights and state are those of plain steps, bit for bit. Gradients are not clipped:
    set ``max_grad_norm=0``.

    If ``train()`` raises, the Trainer tells nobody. The hooks stay until the next ``train()`` with such a callback, or
    until ``remove()``.

    Args:
        gradients: "freed", "none" or "auto", as in ``attach_layerwise``. Only "freed" can accumulate.
        limiter_norm: as in ``attach_layerwise``.

    Raises, from ``train()`` before the first step, what ``attach_layerwise`` raises, and ValueError for several
    processes that FSDP2 does not shard, float16, and accumulation without gradients.

    >>> optimizer = APOLLOAdamW.mini(model, lr=2e-4)  # doctest: +SKIP
    >>> trainer = Trainer(..., optimizers=(optimizer, None), callbacks=[LayerwiseCallback()])  # doctest: +SKIP
    """

    def __init__(self, gradients: str = "freed", limiter_norm: str = "exact") -> None:
        self._gradients, self._limiter_norm = gradients, limiter_norm
        self._attached = ExitStack()

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **running: Any
    ) -> None:
        self.remove()
        model, optimizer = running["model"], running["optimizer"]
        _check_run(args, optimizer, self._gradients)
        optimizer = getattr(optimizer, "optimizer", optimizer)  # without Accelerate's wrapper
        for left in [*_attached_here]:  # by the callback of a Trainer whose train() has raised
            if left is getattr(optimizer, "_layerwise", None):
                left.remove()
        handle = attach_layerwise(model, optimizer, self._gradients, self._limiter_norm)
        _attached_here.add(handle)
        self._attached.enter_context(handle)
        if args.gradient_accumulation_steps > 1:
            # The Trainer sets this before each micro-batch, and steps after those that have it. To count micro-batches
            # would take an epoch's length, where it was resumed, and whether the data ended early.
            accelerate = require("accelerate.state", "trainer")
            self._attached.enter_context(handle.accumulate(lambda: not accelerate.GradientState().sync_gradients))

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **running: Any
    ) -> None:
        self.remove()

    def remove(self) -> None:
        """Take the hooks away, if there are any. Only needed after a ``train()`` that has raised."""
        self._attached.close()


def _check_run(args: TrainingArguments, optimizer: Any, gradients: str) -> None:
    """Raise ValueError if the Trainer runs in a way in which hooks do not see whole, final gradients."""
    state = require("accelerate.state", "trainer").AcceleratorState()
    kind = state.distributed_type.value
    # FSDP2 sums gradients before its hooks. Accelerate 1.1 to 1.5 know no version of FSDP, and shard by the first.
    if kind != "NO" and not getattr(state, "is_fsdp2", False):
        raise ValueError(
            f"LayerwiseCallback works on one process or with FSDP2, and Accelerate trains by {kind}, whose gradients "
            "are summed over processes after layer-wise updates would have used them; use fsdp_config={'version': 2} "
            "(docs/trainer.md), or leave the callback out"
        )
    if getattr(optimizer, "scaler", None) is not None:
        raise ValueError(
            "LayerwiseCallback with fp16=True: GradScaler scales all gradients, and layer-wise updates would use them "
            "before it unscales them; train with bf16=True, or leave the callback out"
        )
    if args.gradient_accumulation_steps > 1 and gradients != "freed":
        raise ValueError(
            f'LayerwiseCallback(gradients="{gradients}") has no gradients that could accumulate, and '
            f"gradient_accumulation_steps={args.gradient_accumulation_steps}; use larger batches, with activation "
            'checkpointing if need be, or LayerwiseCallback(gradients="freed")'
        )
