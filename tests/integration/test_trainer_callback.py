"""What this package gives Hugging Face's Trainer, in this process: layer-wise updates that accumulate, and the pair of
``optimizer_cls_and_kwargs``. Programs of their own are in test_trainer.py."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate_states import forget_accelerate

pytest.importorskip("transformers")
pytest.importorskip("accelerate")

from accelerate.state import PartialState
from accelerate.utils import DistributedType
from tiers import tiers
from trainer_program import Text, losses, make_model, trainer, weights
from transformers import Trainer, TrainerCallback, TrainingArguments

from apollo_triton import APOLLOAdamW, attach_layerwise
from apollo_triton.trainer import LayerwiseCallback, optimizer_for_trainer

# 64 sequences in micro-batches of 6 are 11 an epoch: three steps of three, and one of two.
ACCUMULATED = {"gradient_accumulation_steps": 3, "per_device_train_batch_size": 6, "max_grad_norm": 0}


@pytest.fixture(autouse=True)
def _no_state_is_left() -> Iterator[None]:
    """Accelerate has one state for a process, which says after a Trainer whether it accumulated last."""
    yield
    forget_accelerate()


class Witness(TrainerCallback):
    """How many parameters have a gradient after each micro-batch, step by step; raises after the n-th, if told to."""

    def __init__(self, fail_after: int | None = None) -> None:
        self.steps: list[list[int]] = [[]]
        self.left = fail_after

    def on_substep_end(self, args: Any, state: Any, control: Any, **running: Any) -> None:
        self.steps[-1].append(sum(p.grad is not None for p in running["model"].parameters()))
        if self.left is not None:
            self.left -= 1
            if not self.left:
                raise InterruptedError("a user's code")

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **running: Any) -> None:
        self.on_substep_end(args, state, control, **running)
        self.steps.append([])


def run(
    folder: Path, layerwise: bool, more: Sequence[TrainerCallback] = (), data: Any = None, **options: Any
) -> Trainer:
    """A Trainer that has not trained yet."""
    callbacks = [*more, *([LayerwiseCallback()] if layerwise else [])]
    found = trainer(
        folder,
        trained={"callbacks": callbacks, "eval_dataset": Text()},
        **{"steps": 6, "weight_decay": 0.1} | ACCUMULATED | options,
    )
    found.optimizer_cls_and_kwargs = optimizer_for_trainer(APOLLOAdamW.apollo, found.args, found.model, rank=4)
    found.train_dataset = data or found.train_dataset
    return found


def optimizer_of(trained: Trainer) -> APOLLOAdamW:
    return getattr(trained.optimizer, "optimizer", trained.optimizer)


def assert_same(ours: Trainer, plain: Trainer) -> None:
    """Losses, weights and the state of the optimizer are equal, bit for bit."""
    assert losses(ours) == losses(plain)
    assert all(map(torch.equal, weights(ours), weights(plain)))
    states = [optimizer_of(each).state_dict()["state"] for each in (ours, plain)]
    assert states[0].keys() == states[1].keys()
    for index, state in states[0].items():
        for name, value in state.items():
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(states[1][index][name])), (index, name)


class Ending(torch.utils.data.IterableDataset):
    """Twenty sequences whose number nobody knows: in micro-batches of 6 two steps of three would take 36."""

    def __iter__(self) -> Iterator[dict[str, torch.Tensor]]:
        return (Text()[index] for index in range(20))


EVALUATED = {"eval_strategy": "steps", "eval_steps": 1}
REPETITIONS: dict[str, dict[str, Any]] = {
    "bfloat16": {"bf16": True},
    "the rest dropped": {"dataloader_drop_last": True, "num_train_epochs": 2, "steps": -1},
    "no accumulation": {"gradient_accumulation_steps": 1},
    "checkpointed": {"gradient_checkpointing": True},
    "one step an epoch": {"gradient_accumulation_steps": 20, "steps": 3},
    "data that end within a step": {"data": Ending(), "steps": 2},
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        pytest.param(EVALUATED, id="evaluated"),
        *(pytest.param(each, id=name, marks=pytest.mark.full) for name, each in REPETITIONS.items()),
    ],
)
def test_accumulated_layer_by_layer(options: dict[str, Any], tmp_path: Path) -> None:
    """A step's last micro-batch that is not found, above all at an epoch's end, where it comes early: the weights would
    move twice a step, or after backward, when all gradients are there. Evaluation comes in between."""
    witness = Witness()
    ours, plain = (run(tmp_path, layerwise, more=[witness][:layerwise], **options) for layerwise in (True, False))
    for each in (ours, plain):
        each.train()
    assert_same(ours, plain)
    if options is EVALUATED:
        everything = len(weights(ours))
        three, two = [everything, everything, 0], [everything, 0]
        assert witness.steps == [three, three, three, two, three, three, []]
    assert optimizer_of(ours)._layerwise is None
    assert not any(p._post_accumulate_grad_hooks for p in ours.model.parameters())


@pytest.mark.slow
def test_resumed_within_an_epoch(tmp_path: Path) -> None:
    """A count of micro-batches that starts at the epoch's begin: step 5 is the second of the second epoch."""
    saved = {"save_strategy": "steps", "save_steps": 5}
    whole = run(tmp_path / "whole", False, **saved)
    whole.train()
    again = run(tmp_path / "again", True)
    again.train(resume_from_checkpoint=str(tmp_path / "whole" / "checkpoint-5"))
    assert_same(again, whole)


@pytest.mark.slow
@pytest.mark.parametrize("moved", [False, pytest.param(True, marks=pytest.mark.full)])
def test_training_again_after_an_exception(moved: bool, tmp_path: Path) -> None:
    """What a train() that raised leaves behind: hooks that are refused because they are attached, gradients that count
    once more, weights that have moved already. It raises in the second step, at its begin or once the weights moved."""
    trained = []
    for layerwise in (True, False):
        again = run(tmp_path, layerwise, more=[Witness(6 if moved else 4)], steps=2)
        with pytest.raises(InterruptedError):
            again.train()
        again.train()
        assert optimizer_of(again).state_dict()["state"][0]["step"] == 1 + 2 + (layerwise and moved)
        trained.append(again)
    if not moved:
        assert_same(*trained)


@pytest.mark.slow
def test_another_trainer_after_an_exception(tmp_path: Path) -> None:
    """Hooks that only the callback which attached them could take away: a notebook's cell that is run again."""
    model = make_model()
    optimizer = APOLLOAdamW.apollo(model, rank=4, lr=1e-2)
    given: dict[str, Any] = {"optimizers": (optimizer, None), "callbacks": [LayerwiseCallback, Witness(1)]}
    with pytest.raises(InterruptedError):
        trainer(tmp_path, model, 2, given, **ACCUMULATED).train()
    assert optimizer._layerwise is not None
    trainer(tmp_path, model, 2, given | {"callbacks": [LayerwiseCallback]}, **ACCUMULATED).train()
    assert optimizer._layerwise is None
    assert optimizer.state_dict()["state"][0]["step"] == 2


@pytest.mark.slow
def test_without_gradients_it_is_what_was_asked_for(tmp_path: Path) -> None:
    """An option of the callback that attach_layerwise does not get."""
    found = []

    class Look(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **running: Any) -> None:
            handle = running["optimizer"].optimizer._layerwise
            found.append((handle.gradients, handle._limiter_norm, len(handle.without_gradient)))

    run(tmp_path, False, [LayerwiseCallback("none", "sketch"), Look()], gradient_accumulation_steps=1, steps=1).train()
    assert found == [("none", "sketch", 2 * 7)]


# ---- what is refused


def attached_by_hand(folder: Path) -> Trainer:
    found = run(folder, True)
    attach_layerwise(found.model, found.create_optimizer())
    return found


def of_another_model(folder: Path) -> Trainer:
    optimizer = APOLLOAdamW.apollo(make_model(), rank=4)
    return trainer(folder, trained={"optimizers": (optimizer, None), "callbacks": [LayerwiseCallback]})


def without_gradients(folder: Path) -> Trainer:
    return run(folder, False, [LayerwiseCallback("none")])


def with_torchs_adamw(folder: Path) -> Trainer:
    return trainer(folder, trained={"callbacks": [LayerwiseCallback]})


class Prepared(TrainerCallback):
    """What Accelerate has made of the run: on this machine it does not, and that is pretended."""

    def __init__(self, change: Callable[[Any], None]) -> None:
        self.change = change

    def on_train_begin(self, args: Any, state: Any, control: Any, **running: Any) -> None:
        self.change(running["optimizer"])


def in_float16(folder: Path) -> Trainer:
    """On a CPU it has no scaler."""
    return run(folder, True, [Prepared(lambda optimizer: setattr(optimizer, "scaler", torch.amp.GradScaler("cpu")))])


def on_many_gpus(folder: Path) -> Trainer:
    """On two processes in test_trainer.py."""
    kind = {"distributed_type": DistributedType.MULTI_GPU}
    return run(folder, True, [Prepared(lambda optimizer: PartialState._shared_state.update(kind))])


REFUSED: dict[Callable[[Path], Trainer], str] = {
    attached_by_hand: "layer-wise updates are attached to this optimizer already; call remove() on their handle",
    of_another_model: "of the optimizer's 21 parameters; give attach_layerwise the whole model that the optimizer",
    without_gradients: 'LayerwiseCallback(gradients="none") has no gradients that could accumulate, and '
    "gradient_accumulation_steps=3; use larger batches, ",
    with_torchs_adamw: "attach_layerwise(model, optimizer) needs the APOLLOAdamW itself, not <class 'torch.optim.adamw",
    on_many_gpus: "LayerwiseCallback works on one process or with FSDP2, and Accelerate trains by MULTI_GPU, ",
    in_float16: "LayerwiseCallback with fp16=True: GradScaler scales all gradients, ",
}


REFUSED_BY_ATTACHING = (attached_by_hand, of_another_model, with_torchs_adamw)  # whose own tests have cases


@pytest.mark.slow
@pytest.mark.parametrize(
    "made", tiers(REFUSED, lambda made: made not in REFUSED_BY_ATTACHING), ids=lambda made: made.__name__
)
def test_what_is_refused_before_the_first_step(made: Callable[[Path], Trainer], tmp_path: Path) -> None:
    """A run that would train something else than plain steps do, or fail in its middle."""
    refused = made(tmp_path)
    before = weights(refused)
    with pytest.raises((TypeError, ValueError), match=re.escape(REFUSED[made])):
        refused.train()
    assert refused.state.global_step == 0
    assert all(map(torch.equal, before, weights(refused)))


# ---- the pair of optimizer_cls_and_kwargs


def arguments(folder: Path, **options: Any) -> TrainingArguments:
    common = {"output_dir": str(folder), "use_cpu": True, "report_to": [], "save_strategy": "no", "max_steps": 2}
    return TrainingArguments(**common | options)


GIVEN = {"learning_rate": 3e-4, "weight_decay": 0.1, "adam_beta1": 0.8, "adam_beta2": 0.99, "adam_epsilon": 1e-7}


def test_the_arguments_of_the_trainer_count(tmp_path: Path) -> None:
    """A rate of the arguments that the optimizer never gets, and trains at its own."""
    args = arguments(tmp_path, **GIVEN)
    pair = optimizer_for_trainer(APOLLOAdamW.mini, args, scale=32.0, eps=1e-6)
    optimizer = Trainer(make_model(), args, optimizer_cls_and_kwargs=pair).create_optimizer()
    group = optimizer.param_groups[0]
    wanted = {"lr": 3e-4, "weight_decay": 0.1, "betas": (0.8, 0.99), "eps": 1e-6}
    assert {name: group[name] for name in wanted} == wanted
    assert (group["rank"], group["scale_type"], group["scale"]) == (1, "tensor", 32.0)
    assert len(group["params"]) == 2 * 7


@pytest.mark.slow
def test_each_model_gets_an_optimizer(tmp_path: Path) -> None:
    """model_init, of which a pair with "params" trains the first model alone, and all others by AdamW; another model
    that was given. A search sets the learning rate after the pair was made."""
    args = arguments(tmp_path, learning_rate=1e-3)
    pair = optimizer_for_trainer(APOLLOAdamW.apollo, args, make_model(), rank=4)
    trained = Trainer(None, args, train_dataset=Text(), model_init=make_model, optimizer_cls_and_kwargs=pair)
    for rate in (1e-3, 2e-3):
        args.learning_rate = rate
        trained.train()
        groups = optimizer_of(trained).param_groups
        assert groups[0]["initial_lr"] == rate
        assert {p for group in groups for p in group["params"]} == {*trained.model.parameters()}
        assert (groups[0]["rank"], len(groups[0]["params"])) == (4, 2 * 7)


def test_what_older_transformers_give_a_class(tmp_path: Path) -> None:
    """transformers below 5.2: groups without names, of which only a model says what is low-rank."""
    model, args = make_model(), arguments(tmp_path)
    groups = [{"params": [*model.parameters()], "weight_decay": 0.0}, {"params": [], "weight_decay": 0.0}]
    make, keys = optimizer_for_trainer(APOLLOAdamW.apollo, args, model, rank=4)
    optimizer = make(groups, **keys)
    assert len(optimizer.param_groups[0]["params"]) == 2 * 7
    for wrong, text in ((None, "gives an optimizer parameters without names"), (make_model(), "another model than")):
        make, keys = optimizer_for_trainer(APOLLOAdamW.apollo, args, wrong, rank=4)
        with pytest.raises(ValueError, match=text):
            make(groups, **keys)


def test_a_missing_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    """A user without transformers, who is to learn what to install."""
    monkeypatch.setitem(sys.modules, "transformers", None)
    monkeypatch.delitem(sys.modules, "apollo_triton.trainer")
    with pytest.raises(ModuleNotFoundError, match=r"apollo-triton\[trainer\]"):
        import apollo_triton.trainer  # noqa: F401
