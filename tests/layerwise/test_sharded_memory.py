"""How many bytes of gradients layer-wise updates keep alive on each rank, how often they communicate, and for how long
things live."""

from __future__ import annotations

import gc
import itertools
import weakref
from collections import OrderedDict

import pytest
import torch
import torch.distributed as dist
from distributed_cases import Collectives, local, needs_fsdp_on_a_cpu, whole
from distributed_harness import run
from sharded_layerwise_cases import APOLLO, Model, groups_of, sharded, words_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn.parallel import DistributedDataParallel

from apollo_triton import APOLLOAdamW, attach_layerwise
from apollo_triton.layerwise.fsdp2 import sharded_modules


def without_what_is_unused(model):
    """All that is not frozen gets a gradient; each block has a parameter that is."""
    model.spare.requires_grad_(False)
    for block in model.blocks:
        block.uses_spare = True
        block.gate.bias.requires_grad_(False)
    return model


def buffers_of(model, ranks):
    """Bytes of the buffer into which FSDP2 reduces each module's gradients, in the order of backward."""

    def bytes_of(parameters):
        return sum(-(-p.shape[0] // ranks) * p.shape[1:].numel() * 4 for p in parameters if p.requires_grad)

    blocks = [[*block.parameters()] for block in reversed(model.blocks)]
    inner = {p for block in blocks for p in block}
    return [*map(bytes_of, blocks), bytes_of(p for p in model.parameters() if p not in inner)]


def most_alive(kind, hooks):
    """The most bytes of reduced gradients that are alive when one has come, and collectives of the last step."""
    model, rank = sharded(kind)
    without_what_is_unused(model)
    optimizer = APOLLOAdamW(groups_of(model, APOLLO), lr=1e-2)
    sizes, most = {}, 0

    def watch(parameter):
        nonlocal most
        storage = local(parameter.grad).untyped_storage()
        sizes[StorageWeakRef(storage)] = storage.nbytes()
        most = max(most, sum(size for each, size in sizes.items() if not each.expired()))

    for parameter in model.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(watch)
    if hooks:
        attach_layerwise(model, optimizer)
    for step in range(2):
        with Collectives() as collectives:
            model(words_of(step, rank)).backward()
            optimizer.step()
        optimizer.zero_grad()
    return most, collectives.total


def peaks(kinds):
    return {kind: [most_alive(kind, hooks) for hooks in (False, True)] for kind in kinds}


@needs_fsdp_on_a_cpu
@pytest.mark.parametrize(
    ("world", "kinds"),
    [
        pytest.param(2, ["fsdp", "replicas"], marks=pytest.mark.slow),
        pytest.param(3, ["fsdp"], marks=pytest.mark.full),
        pytest.param(4, ["hsdp", "both"], marks=pytest.mark.full),
    ],
)
def test_one_modules_gradients_are_alive_at_a_time(world, kinds):
    """Under HSDP also those of the module before, which FSDP2 keeps for the sum over replicas: all of them, if nobody
    lets them go. A step takes two collectives a module, and one for the root, whose parameters are dense."""
    for result in run(peaks, world, kinds=kinds):
        for kind, ((plain, sent), (ours, ours_sent)) in result.items():
            if kind == "both":  # whose shards are cut twice
                assert ours < 0.6 * plain
            else:
                sizes = buffers_of(without_what_is_unused(Model()), {"hsdp": 2, "replicas": 1}.get(kind, world))
                assert plain == sum(sizes), kind
                pairs = [one + other for one, other in itertools.pairwise(sizes)]
                assert ours == (max(sizes) if kind == "fsdp" else max(pairs)), kind
            if kind == "fsdp":
                assert ours_sent - sent == (2 * 3 + 1) - 2


def tensor_parallel_peaks():
    return [most_alive("tensor", hooks)[0] for hooks in (False, True)]


@pytest.mark.slow
def test_one_weights_gradient_is_alive_at_a_time_under_tensor_parallelism():
    for plain, ours in run(tensor_parallel_peaks, 2):
        assert ours == 13 * 13 * 4  # a spare weight, which is whole on each rank
        assert plain > 10 * ours


def averaged(kind, hooks):
    """Three steps as DDP averages, or as ``fully_shard`` on a mesh of replicas."""
    if kind == "ddp":
        model = without_what_is_unused(Model())
        parallel = DistributedDataParallel(model)
    else:
        parallel, _ = sharded("replicas")
        model = without_what_is_unused(parallel)
    optimizer = APOLLOAdamW(groups_of(model, APOLLO), lr=1e-2)
    if hooks:
        attach_layerwise(model, optimizer)
    for step in range(3):
        parallel(words_of(step, dist.get_rank())).backward()
        optimizer.step()
        optimizer.zero_grad()
    return {name: whole(p) for name, p in model.named_parameters()}


def averaged_both_ways():
    return averaged("ddp", False), averaged("replicas", True)


@needs_fsdp_on_a_cpu
@pytest.mark.slow
def test_a_mesh_of_replicas_trains_as_ddp_does():
    """What the refusal of DistributedDataParallel sends its users to."""
    for theirs, ours in run(averaged_both_ways, 2):
        for name, value in ours.items():
            torch.testing.assert_close(value, theirs[name], rtol=1e-6, atol=1e-7, msg=name)


def lives():
    """What is still alive without the garbage collector's help."""
    gc.disable()
    model, rank = sharded("fsdp")
    optimizer = APOLLOAdamW(groups_of(model, APOLLO), lr=1e-2)
    handle = attach_layerwise(model, optimizer)

    model(words_of(0, rank)).backward()
    optimizer.step()
    weight = model.blocks[0].up.weight
    gone = {"moments of a weight that left": weakref.ref(optimizer.state[weight]["exp_avg"])}
    optimizer.param_groups[0]["params"].remove(weight)
    optimizer.param_groups[0]["param_names"].remove("blocks.0.up.weight")
    del optimizer.state[weight]
    model(words_of(0, rank)).backward()
    optimizer.step()
    alive = [name for name, each in gone.items() if each() is not None]
    moments = optimizer.state[model.blocks[1].up.weight]["exp_avg"]
    gone = {name: weakref.ref(each) for name, each in (("optimizer", optimizer), ("moments", moments))}
    del optimizer, moments, handle, weight
    return alive + [name for name, each in gone.items() if each() is not None]


@needs_fsdp_on_a_cpu
@pytest.mark.slow
def test_nothing_outlives_its_optimizer_or_its_group():
    """A unit that keeps what has left it, or the optimizer, until the collector runs."""
    assert run(lives, 2) == [[], []]


@needs_fsdp_on_a_cpu
def test_a_sharded_module_has_what_no_other_one_manages(tmp_path):
    """Modules that are sharded together, with a weight that two of them hold, or within another one."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        embed, norm, head = nn.Embedding(6, 4), nn.LayerNorm(4), nn.Linear(4, 6, bias=False)
        head.weight = embed.weight
        block, free, bare = nn.Sequential(nn.Linear(4, 4)), nn.Linear(4, 4), nn.ParameterList([torch.ones(4)])
        model = nn.Sequential(OrderedDict(embed=embed, block=block, free=free, norm=norm, head=head, bare=bare))
        fully_shard(block, mesh=mesh)
        fully_shard([embed, norm, head], mesh=mesh)
        fully_shard(model, mesh=mesh, ignored_params={*bare.parameters()})
        names = {parameter: name for name, parameter in model.named_parameters()}
        found = [sorted(names[each] for each in module.parameters) for module in sharded_modules(model)]
    finally:
        dist.destroy_process_group()
    expected = [
        ["block.0.bias", "block.0.weight"],
        ["embed.weight", "norm.bias", "norm.weight"],
        ["free.bias", "free.weight"],
    ]
    assert sorted(found) == expected


@needs_fsdp_on_a_cpu
def test_what_fsdp2_replicates_moves_module_by_module(tmp_path):
    """The state of a replicated module is not where ``fully_shard`` keeps its own."""
    replicate = pytest.importorskip("torch.distributed._composable.replicate_with_fsdp").replicate
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,), mesh_dim_names=("replicate",))
        model = nn.Sequential(nn.Linear(6, 4), nn.LayerNorm(4))
        replicate(model[0], mesh=mesh)
        replicate(model, mesh=mesh)
        names = {parameter: name for name, parameter in model.named_parameters()}
        found = [sorted(names[each] for each in module.parameters) for module in sharded_modules(model)]
        before = [whole(parameter) for parameter in model.parameters()]
        optimizer = APOLLOAdamW(model.named_parameters(), lr=1e-2)
        attach_layerwise(model, optimizer)
        model(torch.ones(3, 6)).square().sum().backward()
        assert all(parameter.grad is None for parameter in model.parameters())
        moved = [not torch.equal(whole(p), old) for p, old in zip(model.parameters(), before, strict=True)]
    finally:
        dist.destroy_process_group()
    assert sorted(found) == [["0.bias", "0.weight"], ["1.bias", "1.weight"]]
    assert any(moved)
