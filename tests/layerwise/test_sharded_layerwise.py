"""Layer-wise updates of sharded models: the bits of plain sharded steps.

Every run has parameters that get no gradient in some backward passes, in a block and in the root, one that is frozen at
first, and one that is frozen for a step.
"""

from __future__ import annotations

import copy
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from distributed_cases import local, needs_fsdp_on_a_cpu
from distributed_harness import run
from sharded_layerwise_cases import APOLLO, MINI, groups_of, sharded, words_of
from torch.distributed.fsdp import MixedPrecisionPolicy

from apollo_triton import APOLLOAdamW, attach_layerwise

STEPS = 4


@dataclass
class Case:
    """A way to train. ``parts``: backward passes of a step, all but the last of which accumulate, by ``by``."""

    low_rank: dict[str, Any] = field(default_factory=lambda: APOLLO)
    options: dict[str, Any] = field(default_factory=dict)
    shard: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    parts: int = 1
    by: str = ""
    checkpoints: bool = False
    runs_twice: bool = False
    resumes: bool = False


CASES = {
    "apollo": Case(),
    "mini, in bfloat16": Case(MINI, {"stochastic_rounding": True, "state_dtype": "bfloat16"}, dtype=torch.bfloat16),
}
MORE = {
    "mini": Case(MINI, {"seed_per_param": True}),
    "mixed precision": Case(shard={"mp_policy": MixedPrecisionPolicy(torch.bfloat16, torch.float32)}),
    "resharded late, checkpointed": Case(shard={"reshard_after_forward": False}, checkpoints=True),
    "checkpointed": Case(checkpoints=True),
    "synchronised once": Case(parts=2, by="set_requires_gradient_sync"),
    "accumulated shards": Case(parts=3, by="accumulate"),
    "a block that runs twice": Case(runs_twice=True),
    "resumed in the middle": Case(resumes=True),
}
HYBRID = {"reduced once": Case(parts=2, by="set_requires_all_reduce")}


def trained(kind, case, hooks):
    """The model and its optimizer at the end."""
    model, rank = sharded(kind, case.dtype, **(case.shard if kind != "tensor" else {}))
    optimizer = APOLLOAdamW(groups_of(model, case.low_rank), lr=1e-2, seed=3, **case.options)
    if case.runs_twice:
        model.blocks.append(model.blocks[0])
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (1 + step))
    late = dict(model.named_parameters())["blocks.1.up.bias"].requires_grad_(False)
    handle = attach_layerwise(model, optimizer) if hooks else None
    for step in range(STEPS):
        for block in model.blocks:
            block.uses_spare, block.checkpoints = bool(step % 2), case.checkpoints
        late.requires_grad_(step > 1)
        model.blocks[2].gate.bias.requires_grad_(step != 1)
        if case.resumes and step == 2:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for part in range(case.parts):
            is_last = part == case.parts - 1
            if case.by.startswith("set"):
                getattr(model, case.by)(is_last)
            keeps = hooks and case.by == "accumulate" and not is_last
            with handle.accumulate() if keeps else nullcontext():
                model(words_of(step, rank, part)).backward()
        left = [name for name, parameter in model.named_parameters() if parameter.grad is not None]
        if hooks:
            # one that came late is updated by step() once, except if its hook came with a checkpoint
            assert left == (["blocks.1.up.bias"] if step == 2 and not case.resumes else []), left
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return model, optimizer


def held(model, optimizer):
    """This rank's parts of all weights and state."""
    found = {name: local(p.detach()) for name, p in model.named_parameters()}
    for name, p in model.named_parameters():
        found |= {f"{name}.{key}": local(torch.as_tensor(value)) for key, value in optimizer.state[p].items()}
    return found


def compared(kind, cases):
    """For each case the names of what differs between plain steps and layer-wise ones."""
    answers = {}
    for name, case in cases.items():
        ends = [trained(kind, case, hooks) for hooks in (False, True)]
        plain, ours = (held(model, optimizer) for model, optimizer in ends)
        assert plain.keys() == ours.keys()
        assert any("exp_avg" in each and "spare" in each for each in plain), "the spare weights never moved"
        answers[name] = [each for each, value in plain.items() if not torch.equal(value, ours[each])]
    return answers


WORLDS = [
    pytest.param("fsdp", 2, CASES, marks=pytest.mark.slow, id="fsdp-2"),
    pytest.param("fsdp", 3, CASES, marks=pytest.mark.full, id="fsdp-3"),
    pytest.param("hsdp", 4, CASES | HYBRID, marks=pytest.mark.full, id="hsdp-2x2"),
    pytest.param("tensor", 2, CASES, marks=pytest.mark.full, id="tensor-2"),
    pytest.param("both", 4, CASES, marks=pytest.mark.full, id="both-2x2"),
    pytest.param("fsdp", 3, MORE, marks=pytest.mark.full, id="fsdp-3-more"),
    pytest.param("hsdp", 4, MORE, marks=pytest.mark.full, id="hsdp-2x2-more"),
    pytest.param("both", 4, MORE, marks=pytest.mark.full, id="both-2x2-more"),
]


@needs_fsdp_on_a_cpu
@pytest.mark.parametrize(("kind", "world", "cases"), WORLDS)
def test_the_result_is_that_of_plain_sharded_steps(kind, world, cases):
    for answers in run(compared, world, kind=kind, cases=cases):
        assert answers == {name: [] for name in cases}
