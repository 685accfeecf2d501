"""One engine that is given gradients and factors of gradients, and what it keeps from one step to the next."""

from __future__ import annotations

import weakref

import pytest
import torch
from drawn_tensors import normals
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from apollo_triton import APOLLOAdamW, attach_layerwise
from apollo_triton.backends.interface import Sketch, StepScalars
from apollo_triton.backends.reference import verbs
from apollo_triton.backends.reference.matrices import Batch
from apollo_triton.core.implicit_gradient import ImplicitGradient
from apollo_triton.core.scratch import Scratch
from apollo_triton.engine.caches import Caches
from apollo_triton.engine.engine import Engine

SHAPES = [(16, 12), (12, 20), (18, 12)]
STEPS = 3  # P is refreshed at the last


def factors_of(shape, step):
    """X and dY of six tokens, growing so that the limiter works."""
    rows, columns = shape
    X, dY = (normals((6, n), 10 * step + index) * 1.5**step for index, n in enumerate((columns, rows)))
    return ImplicitGradient(X, dY)


def run_of(indices, group):
    """The weights of these indices in one group, an optimizer that keeps their state, and an engine."""
    weights = {index: nn.Parameter(normals(SHAPES[index], 100 + index)) for index in indices}
    keys = {"update_proj_gap": 2, "weight_decay": 0.1, **group}
    return weights, APOLLOAdamW([{"params": [*weights.values()], **keys}], lr=1e-2), Engine(Caches())


def step(run, number, implicit):
    """A step of ``run`` from drawn gradients; those of the ``implicit`` indices are given as their factors."""
    weights, optimizer, engine = run
    given = {}
    for index, weight in weights.items():
        gradient = factors_of(SHAPES[index], number)
        if index in implicit:
            weight.grad, given[weight] = None, gradient
        else:
            weight.grad = gradient.output_gradient.T @ gradient.inputs
    with torch.no_grad():
        engine.run(optimizer.param_groups, optimizer.state, given=given)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("group", "implicit"),
    [
        pytest.param({"rank": 4}, (1, 2), id="channel, two of three"),
        pytest.param({"rank": 1, "scale_type": "tensor"}, (0,), id="tensor, one of three"),
    ],
)
def test_each_moves_in_company_as_it_does_alone(backend, group, implicit):
    """A table or batch that takes one member's factors for another's gradient, sums or factors under another index."""
    together = run_of(range(3), group)
    alone = [run_of([index], group) for index in range(3)]
    for number in range(STEPS):
        for run in (together, *alone):
            step(run, number, implicit)
    for index, (weights, optimizer, _) in enumerate(alone):
        mine, theirs = together[0][index], weights[index]
        assert torch.equal(mine, theirs), index
        for name, value in optimizer.state[theirs].items():
            found = together[1].state[mine][name]
            assert torch.equal(torch.as_tensor(found), torch.as_tensor(value)), f"{index}.{name}"


def test_an_engine_keeps_no_factor_alive(backend):
    """X and dY of a layer are as large as its activations: a plan, table or batch that holds them costs the memory that
    steps without a gradient save."""
    weights, optimizer, engine = run_of([0], {"rank": 4})
    for number in range(2):  # with a new plan, and with the kept one
        gradient = factors_of(SHAPES[0], number)
        held = [weakref.ref(each) for each in gradient[:2]]
        with torch.no_grad():
            engine.run(optimizer.param_groups, optimizer.state, given={weights[0]: gradient})
        del gradient
        assert [each() for each in held] == [None, None], number


@pytest.mark.slow
@pytest.mark.parametrize("first", ["implicit", "plain"])
def test_the_other_kind_of_gradient_is_planned_anew(backend, first):
    """A kept plan reads factors that are gone, or a gradient that was never made."""
    runs = [run_of([0, 1], {"rank": 4}) for _ in range(2)]
    ways = [(0, 1), ()] if first == "implicit" else [(), (0, 1)]
    for number, implicit in enumerate([*ways, ways[0]]):
        for fresh, (weights, optimizer, engine) in enumerate(runs):
            step((weights, optimizer, Engine(Caches()) if fresh else engine), number, implicit)
    (kept, *_), (anew, *_) = runs
    assert all(torch.equal(kept[index], anew[index]) for index in kept)


def test_a_parameter_that_moved_to_another_group_is_updated_by_that_group():
    """The parameters are the same and in the same order: a plan that is kept would take the old group's settings."""
    weights = [nn.Parameter(torch.ones(8, 6)) for _ in range(2)]
    groups = [{"params": weights, "rank": 2, "lr": 1.0}, {"params": [], "rank": 2, "lr": 0.0}]
    optimizer = APOLLOAdamW(groups)
    for _ in range(2):
        before = weights[1].detach().clone()
        for weight in weights:
            weight.grad = torch.ones(8, 6)
        optimizer.step()
        moved = not torch.equal(weights[1], before)
        assert moved == (weights[1] in set(optimizer.param_groups[0]["params"]))
        optimizer.param_groups[1]["params"].append(optimizer.param_groups[0]["params"].pop())


def test_factors_are_dropped_when_a_step_fails(monkeypatch):
    """A training loop that catches an error of memory would keep a layer's activations until its next step."""
    run = run_of([0], {"rank": 4})
    step(run, 0, (0,))
    weights, optimizer, engine = run
    gradient = factors_of(SHAPES[0], 1)
    alive = weakref.ref(gradient.inputs)

    def fail(*arguments):
        raise MemoryError

    monkeypatch.setattr("apollo_triton.backends.reference.updates.projection_of", fail)
    with torch.no_grad(), pytest.raises(MemoryError):
        engine.run(optimizer.param_groups, optimizer.state, given={weights[0]: gradient})
    del gradient
    assert alive() is None


def test_loading_under_hooks_drops_the_engines_at_once():
    """Engines that outlive the optimizer's caches keep one P for each epoch, and count skips of the run before."""
    layer = nn.Linear(6, 8, bias=False)
    optimizer = APOLLOAdamW([{"params": [layer.weight], "rank": 2, "update_proj_gap": 1}])
    handle = attach_layerwise(layer, optimizer)
    layer.weight.register_hook(lambda gradient: gradient * torch.inf)
    layer(torch.ones(6)).sum().backward()
    assert optimizer.skipped_updates == 1
    seen = []
    optimizer.register_load_state_dict_post_hook(lambda loaded: seen.append(int(loaded.skipped_updates)))
    optimizer.load_state_dict(optimizer.state_dict())
    assert seen == [0]
    layer(torch.ones(6)).sum().backward()
    (engine,) = handle._units.engines
    assert engine._caches is optimizer._caches


def test_summed_sketches_are_rescaled_part_by_part():
    """As many operations for each matrix of a batch, however many there are."""

    class Count(TorchDispatchMode):
        operations = 0

        def __torch_dispatch__(self, function, types, arguments=(), named=None):
            self.operations += 1
            return function(*arguments, **(named or {}))

    def operations(count):
        weights = [nn.Parameter(torch.ones(512, 256)) for _ in range(count)]
        for weight in weights:
            weight.grad = torch.ones(512, 256)
        optimizer = APOLLOAdamW([{"params": weights, "rank": 128}])
        optimizer.step()
        plan = optimizer._engine._plan
        settings, scalars = plan._settings[0], StepScalars(2)
        batch = Batch(plan.members[0].geometry, 1.0, 0, Scratch())
        with torch.no_grad():
            for member in plan.members:
                batch.add(member, torch.ones(128, 256))
            sketch = Sketch(torch.ones(count, 512, 128), torch.ones(count, 512))
            with Count() as counted:
                verbs.rescale(batch, settings, scalars, sketch)
        return counted.operations

    # Beside the operations of each matrix there are few of the whole batch.
    assert operations(32) <= 2 * operations(16)
