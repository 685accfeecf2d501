"""DistributedDataParallel and ZeRO: plain tensors, where the optimizer itself must not communicate.

DDP averages gradients; what it leaves in ``p.grad`` is recorded, and a single process, here the pytest process, is fed
the same. The weights must be the same to the bit.
"""

from __future__ import annotations

import pytest
import torch
import torch.distributed as dist
from distributed_cases import Collectives, Weights, assert_ranks_agree, assert_same_bits, drawn, gradient_of
from distributed_harness import optimizer_class, run
from torch import nn
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn.parallel import DistributedDataParallel

APOLLO = {"rank": 2, "update_proj_gap": 4, "weight_decay": 0.05}
MINI = {"rank": 1, "scale_type": "tensor", "scale": 4.0, "update_proj_gap": 4, "distribution": "rademacher"}


class Net(nn.Module):
    """Wide, tall and square weights, an embedding and a gain."""

    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(33, 6)
        self.up, self.middle, self.down = nn.Linear(6, 10), nn.Linear(10, 10), nn.Linear(10, 3, bias=False)
        self.gain = nn.Parameter(torch.ones(3))
        for name, parameter in self.named_parameters():
            with torch.no_grad():
                parameter.copy_(drawn(tuple(parameter.shape), name) * 0.3)

    def forward(self, tokens):
        hidden = torch.tanh(self.middle(torch.tanh(self.up(self.embedding(tokens)))))
        return self.down(hidden) * self.gain


def groups_of(model):
    chosen = {"up.weight": APOLLO, "down.weight": APOLLO, "middle.weight": MINI}
    groups = [
        {"params": [each for name, each in model.named_parameters() if chosen.get(name) is keys], **keys}
        for keys in (APOLLO, MINI)
    ]
    return [*groups, {"params": [each for name, each in model.named_parameters() if name not in chosen]}]


def loss_of(model, step, rank):
    batch = torch.randint(33, (4, 5), generator=torch.Generator().manual_seed(1000 * step + rank))
    return model(batch).square().mean() + model(batch).mean()


def under_ddp(steps, ddp, accumulate, options):
    """Weights, state and recorded gradients after some steps, and the collectives of the optimizer's part."""
    model = DistributedDataParallel(Net(), **ddp)
    optimizer = optimizer_class()(groups_of(model.module), lr=1e-2, **options)
    gradients, collectives = [], []
    for step in range(steps):
        for part in range(accumulate - 1):
            with model.no_sync():
                loss_of(model, 100 * step + part, dist.get_rank()).backward()
        loss_of(model, 100 * step + accumulate, dist.get_rank()).backward()
        gradients.append([(each.grad.clone(), each.grad.data_ptr() % 64) for each in model.parameters()])
        with Collectives() as seen:
            optimizer.step()
        collectives.append(seen.total)
        optimizer.zero_grad()
    values = {**ends(model.module, optimizer), "norm": optimizer.gradient_norm}
    return values, gradients, collectives


def ends(model, optimizer):
    values = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for name, parameter in model.named_parameters():
        values |= {f"{name}.{key}": value for key, value in optimizer.state[parameter].items()}
    return values


def alone(gradients, options):
    """The single process, fed the gradients of one rank."""
    model = Net()
    optimizer = optimizer_class()(groups_of(model), lr=1e-2, **options)
    for step in gradients:
        for parameter, gradient in zip(model.parameters(), step, strict=True):
            parameter.grad = aligned_alike(*gradient)
        optimizer.step()
    return {**ends(model, optimizer), "norm": optimizer.gradient_norm}


def aligned_alike(values, alignment):
    """``values`` at an address of that remainder by 64: views of buckets start anywhere, and BLAS sums accordingly."""
    memory = torch.zeros(values.numel() + 16)
    start = (alignment - memory.data_ptr()) % 64 // 4
    return memory[start : start + values.numel()].view(values.shape).copy_(values)


DDP = {
    "as it is": ({}, 1, {}),
    "no_sync": ({}, 3, {}),
    "static graph": ({"static_graph": True}, 1, {"max_grad_norm": 0.05}),
    "gradients are views of buckets": ({"gradient_as_bucket_view": True, "bucket_cap_mb": 0.0005}, 1, {}),
    "all of it": ({"gradient_as_bucket_view": True}, 2, {"max_grad_norm": 0.05}),
}


@pytest.mark.slow
# The last has accumulation, views of buckets and clipping. A static graph takes another way through DDP.
@pytest.mark.parametrize(
    "case",
    [pytest.param(each, marks=[] if each in ("static graph", "all of it") else pytest.mark.full) for each in DDP],
)
@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.full)])
def test_ddp_is_a_single_process_bit_for_bit(world, case):
    """Needless communication on plain tensors, a plan that keeps a bucket's address, anything drawn from the random
    state of a rank."""
    ddp, accumulate, options = DDP[case]
    results = run(under_ddp, world, steps=10, ddp=ddp, accumulate=accumulate, options=options)
    assert_ranks_agree([values for values, _, _ in results])
    assert_same_bits(results[0][0], alone(results[0][1], options), case)
    assert all(collectives == [0] * 10 for _, _, collectives in results)


def random_rounding(steps):
    """bfloat16 weights with stochastic rounding, each rank's own generator in another state."""
    torch.manual_seed(dist.get_rank())
    model = Net().to(torch.bfloat16)
    optimizer = optimizer_class()(
        groups_of(model), lr=1e-2, stochastic_rounding=True, state_dtype=torch.bfloat16, seed_per_param=True
    )
    for step in range(steps):
        for name, parameter in model.named_parameters():
            parameter.grad = gradient_of(name, tuple(parameter.shape), step).to(torch.bfloat16)
        optimizer.step()
    return ends(model, optimizer)


def test_stochastic_rounding_is_the_same_on_all_ranks():
    """Bits of the rank's global generator: replicas drift apart without anybody noticing."""
    assert_ranks_agree(run(random_rounding, 2, steps=6))


def under_zero(steps, options):
    """ZeRO-1: every rank has the state of its own parameters alone, and sends them to the others."""
    model = Net()
    optimizer = ZeroRedundancyOptimizer(groups_of(model), optimizer_class=optimizer_class(), lr=1e-2, **options)
    for step in range(steps):
        set_gradients(model, step)
        optimizer.step()
    owned = sum(len(state) > 0 for state in optimizer.optim.state.values())
    weights = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer.consolidate_state_dict(to=0)
    saved = optimizer.state_dict() if dist.get_rank() == 0 else None
    return weights, owned, saved


def set_gradients(model, step):
    for name, parameter in model.named_parameters():
        parameter.grad = gradient_of(name, tuple(parameter.shape), step)


def without_zero(steps):
    model = Net()
    optimizer = optimizer_class()(groups_of(model), lr=1e-2)
    for step in range(steps):
        set_gradients(model, step)
        optimizer.step()
    return model, optimizer


@pytest.mark.parametrize("bucket_view", [False, True])
@pytest.mark.parametrize("world", [2, pytest.param(3, marks=pytest.mark.full)])
def test_zero_redundancy_optimizer(world, bucket_view):
    """Group keys lost when ZeRO makes the optimizer of its part of the groups, an agreement check that stumbles over
    ranks with different parameters (or hangs), state that consolidation mixes up."""
    results = run(under_zero, world, steps=10, options={"parameters_as_bucket_view": bucket_view})
    assert_ranks_agree([weights for weights, _, _ in results])
    model, optimizer = without_zero(10)
    expected = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert_same_bits(results[0][0], expected, "ZeRO")
    owned = [count for _, count, _ in results]
    assert sum(owned) == len(expected)
    assert max(owned) < len(expected), "every rank has everything"
    resumed, ours = Net(), results[0][2]
    fresh = optimizer_class()(groups_of(resumed), lr=1e-2)
    fresh.load_state_dict(ours)
    for name, parameter in resumed.named_parameters():
        original = dict(model.named_parameters())[name]
        assert_same_bits(fresh.state[parameter], optimizer.state[original], f"consolidated state of {name}")


def resumed_under_zero(saved):
    """Goes on from a consolidated state, on another number of ranks."""
    model, _ = without_zero(10)
    optimizer = ZeroRedundancyOptimizer(groups_of(model), optimizer_class=optimizer_class(), lr=1e-2)
    optimizer.load_state_dict(saved)
    for step in range(10, 14):
        set_gradients(model, step)
        optimizer.step()
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def test_zero_resumes_from_a_single_process():
    """Moments cast or left out when ZeRO hands each rank its part of a whole state."""
    _, optimizer = without_zero(10)
    results = run(resumed_under_zero, 2, saved=optimizer.state_dict())
    assert_ranks_agree(results)
    model, _ = without_zero(14)
    expected = {name: parameter.detach() for name, parameter in model.named_parameters()}
    assert_same_bits(results[0], expected, "resumed under ZeRO")


def plain_weights_in_a_group(cases):
    model = Weights(cases)
    with Collectives() as seen:
        model.train_for(5)
    return model.everything(), seen.total


def test_plain_tensors_with_clipping_and_faults_communicate_nothing():
    """An optimizer that agrees with the world as soon as a process group exists, and hangs where ranks differ."""
    cases = {"a": ((10, 3), APOLLO, "plain"), "b": ((7, 7), MINI, "plain"), "c": ((5,), {}, "plain")}
    results = run(plain_weights_in_a_group, 2, cases=cases)
    assert [total for _, total in results] == [0, 0]
    assert_same_bits(results[0][0], Weights(cases).train_for(5).everything(), "in a process group")
