"""When parameters that move together do so, by hooks of a model that nothing shards: FSDP2 calls the same hooks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from apollo_triton import APOLLOAdamW, attach_layerwise
from apollo_triton.engine.engine import Engine
from apollo_triton.layerwise import units
from apollo_triton.layerwise.fsdp2 import ShardedModule


class State:
    """Stands for what FSDP2 keeps of a module: nothing that could be let go of."""


@pytest.fixture
def attached(monkeypatch):
    """A way to attach to a stack of layers each of which moves as if sharded, and the names that each step moved."""

    def attach(stack):
        states = [State() for _ in stack]
        modules = [ShardedModule(state) for state in states]
        for module, layer in zip(modules, stack, strict=True):
            module.add([*layer.parameters()])
        monkeypatch.setattr(units, "sharded_modules", lambda model: modules)
        optimizer = APOLLOAdamW([*stack.named_parameters()], lr=1e-2)
        attach_layerwise(stack, optimizer)
        moved, run = [], Engine.run

        def recording(engine, groups, *arguments, **options):
            moved.append([param.name for param in groups.params] if hasattr(groups, "params") else "step()")
            run(engine, groups, *arguments, **options)

        monkeypatch.setattr(Engine, "run", recording)
        return optimizer, moved

    return attach


class Half(nn.Linear):
    """A layer whose bias is not used."""

    def forward(self, x):
        return x @ self.weight.mT


def test_what_waits_moves_when_the_next_module_does(attached):
    """Gradients that are kept until the end of backward, since the modules after have all that they wait for."""
    stack = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False), Half(4, 4))
    _, moved = attached(stack)
    alive = []
    stack[0].weight.register_post_accumulate_grad_hook(lambda _: alive.append(stack[2].weight.grad is not None))
    stack(torch.ones(2, 4)).sum().backward()
    assert moved == [["2.weight"], ["1.weight"], ["0.weight"]]
    assert alive == [False]


def test_a_backward_that_raises_does_not_keep_the_next_from_moving_what_waits(attached):
    """An end of backward that nobody is called at, since a unit was left waiting by the backward before."""
    stack = nn.Sequential(Half(4, 4))
    optimizer, moved = attached(stack)
    x = torch.ones(2, 4)
    fault = stack[0].weight.register_post_accumulate_grad_hook(lambda _: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        stack(x).sum().backward()
    assert moved == []
    fault.remove()
    optimizer.zero_grad()
    stack(x).sum().backward()
    assert moved == [["0.weight"]]
    assert stack[0].weight.grad is None
