"""What layer-wise updates of sharded models refuse, and ranks that differ: an error on every rank, and no waiting."""

from __future__ import annotations

import re
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from distributed_cases import drawn, local, needs_fsdp_on_a_cpu
from distributed_harness import run
from layerwise_cases import loss_of, make_model, make_optimizer
from sharded_layerwise_cases import APOLLO, Model, groups_of, sharded, words_of
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import Shard, distribute_tensor

from apollo_triton import APOLLOAdamW, attach_layerwise
from apollo_triton.core import streams
from apollo_triton.engine.caches import Caches
from apollo_triton.layerwise import handle as handle_module
from apollo_triton.layerwise.fsdp2 import wait_for_offloaded
from apollo_triton.layerwise.units import Unit
from apollo_triton.params.member import params_of


def error_of(act):
    try:
        act()
    except (ValueError, RuntimeError) as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def attached(kind="fsdp", spoil=None):
    model, rank = sharded(kind)
    optimizer = APOLLOAdamW(groups_of(model, APOLLO), lr=1e-2)
    if spoil is not None:
        spoil(model)
    attach_layerwise(model, optimizer)
    return model, optimizer, lambda step=0: model(words_of(step, rank)).backward()


def other_settings():
    _, optimizer, backward = attached()
    optimizer.param_groups[0]["lr"] = 0.01 * (1 + dist.get_rank())
    return error_of(backward)


def two_backwards():
    _, _, backward = attached()
    backward()
    return error_of(backward)


def state_that_cannot_be():
    model, optimizer, backward = attached()
    backward()
    optimizer.step()
    state = optimizer.state[model.blocks[1].down.weight]
    state["exp_avg_sq"] = local(state["exp_avg_sq"])
    return error_of(lambda: backward(1))


def without_gradients():
    model, _ = sharded("fsdp")
    optimizer = APOLLOAdamW(groups_of(model, APOLLO), lr=1e-2)
    found = [error_of(partial(attach_layerwise, model, optimizer, each)) for each in ("none", "auto")]
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
    return "\n".join(found)


def after_a_forward():
    model, rank = sharded("fsdp")
    optimizer = APOLLOAdamW(groups_of(model, APOLLO), lr=1e-2)
    model(words_of(0, rank))
    text = error_of(lambda: attach_layerwise(model, optimizer))
    model.reshard()
    attach_layerwise(model, optimizer)
    return text


def optimizer_before_sharding():
    model = Model()
    optimizer = APOLLOAdamW(groups_of(model, APOLLO), lr=1e-2)
    fully_shard(model)
    return error_of(partial(attach_layerwise, model, optimizer))


def a_missing_gradient(missing):
    """Two sharded weights without FSDP2. Backward comes by ``first`` first. Rank 1 has no gradient of one of them."""
    mesh = init_device_mesh("cpu", (2,))
    model = nn.ParameterDict(
        {name: nn.Parameter(distribute_tensor(drawn((8, 6), name), mesh, [Shard(0)])) for name in ("first", "last")}
    )
    optimizer = APOLLOAdamW([{"params": [*model.named_parameters()], "rank": 2}], lr=1e-2)
    attach_layerwise(model, optimizer)
    used = [name for name in ("last", "first") if name != missing or dist.get_rank() == 0]

    def step():
        x = torch.zeros(6, requires_grad=True)
        for name in used:
            x = (model[name].to_local() @ x).sum() + torch.ones(6)
        x.sum().backward()
        optimizer.step()

    return error_of(step)


def first_missing():
    return a_missing_gradient("first")


def last_missing():
    return a_missing_gradient("last")


def frozen_on_one(kind):
    """Of FSDP2 the reduction would be of other sizes on rank 1; under tensor parallelism rank 1 would go on to the next
    activation's sum, while rank 0 exchanges what an update needs."""

    def freeze(model):
        model.blocks[1].up.weight.requires_grad_(dist.get_rank() == 0)

    _, _, backward = attached(kind, freeze)
    return error_of(backward)


def frozen_on_one_under_fsdp():
    return frozen_on_one("fsdp")


def frozen_on_one_under_tensor_parallelism():
    return frozen_on_one("tensor")


FAULTS = {
    other_settings: r"differ: parameter \d+ [^=]*dim=0\),\): lr=0.01 on rank 0, lr=0.02 on rank 1; .*on all ranks$",
    two_backwards: r"^RuntimeError: parameter \d+ \('blocks.2.*second time.*handle.accumulate\(\)",
    state_that_cannot_be: r"^ValueError: parameter \d+ \('blocks.1.down.weight'\).*exp_avg_sq",
    without_gradients: r"(?s)'blocks.*gradients=\"none\" cannot update what fully_shard manages.*sum over ranks.*"
    r"use gradients=\"freed\".*gradients=\"auto\" cannot",
    after_a_forward: r"^ValueError: not in the model.*model\.reshard\(\)",
    optimizer_before_sharding: r"^ValueError: not in the model.*fully_shard or .*: make the optimizer after it$",
    first_missing: r"^ValueError: ranks 0 and 1 differ.*'(first|last)'",
    last_missing: r"^ValueError: ranks 0 and 1 differ.*1 parameters with gradients|'last'",
    frozen_on_one_under_fsdp: r"^ValueError: ranks 0 and 1 differ.*'blocks.1.up.weight'.* on rank 0",
    frozen_on_one_under_tensor_parallelism: r"^ValueError: ranks 0 and 1 differ.*'blocks.1.up.weight'.* on rank 0",
}


def all_faults():
    return {fault.__name__: fault() for fault in FAULTS}


@pytest.fixture(scope="module")
def texts():
    return run(all_faults, 2, patience=15.0)


@needs_fsdp_on_a_cpu
@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.__name__)
def test_every_rank_is_told(texts, fault):
    """Ranks that wait for each other until a collective gives up, and errors that name no parameter."""
    for found in texts:
        assert re.search(FAULTS[fault], found[fault.__name__]), found[fault.__name__]


def not_a_number():
    """NaN in rank 1's part of one weight. Which weights have moved, and the skips."""
    model, optimizer, backward = attached(spoil=spoil_one)
    before = {name: local(p.detach()).clone() for name, p in model.named_parameters()}
    backward()
    optimizer.step()
    stayed = [name for name, p in model.named_parameters() if torch.equal(local(p.detach()), before[name])]
    return stayed, int(optimizer.skipped_updates)


def spoil_one(model):
    def spoil(parameter):
        if dist.get_rank() == 1:
            local(parameter.grad)[0, 0] = torch.nan

    model.blocks[1].up.weight.register_post_accumulate_grad_hook(spoil)


@needs_fsdp_on_a_cpu
@pytest.mark.slow
def test_a_gradient_that_is_not_finite_on_one_rank_stops_its_matrix_on_all():
    unused = {"spare.weight", "spare.bias", *(f"blocks.{index}.spare.weight" for index in range(3))}
    for stayed, skipped in run(not_a_number, 2):
        assert {*stayed} == unused | {"blocks.1.up.weight"}
        assert skipped == 1


def test_what_names_no_parameter_is_given_those_of_the_module():
    optimizer = make_optimizer(make_model(), rank=4)
    params = [*params_of(optimizer.param_groups)]
    unit = Unit([param.tensor for param in params], None)

    def run_out(*_, **__):
        raise RuntimeError("no memory")

    unit.engine = SimpleNamespace(run=run_out)
    with pytest.raises(RuntimeError, match=r"^parameter 0 \('mlp.0.weight'\).* and 5 more of its module: no memory"):
        unit.step(params[::-1], optimizer.param_groups, optimizer.state, Caches(), {})


def test_a_hook_waits_for_a_gradient_that_is_copied_to_the_cpu(monkeypatch):
    """Before torch 2.13 FSDP2 calls hooks while the copy is under way."""
    model, waited = make_model(), []
    optimizer = make_optimizer(model, rank=4)
    before = {p: p.detach().clone() for p in model.parameters()}
    stream = SimpleNamespace(synchronize=lambda: waited.append("stream"))
    monkeypatch.setattr(streams, "current", lambda device: stream if device.type == "cuda" else None)
    wait_for_offloaded(SimpleNamespace(device_mesh=SimpleNamespace(device_type="cuda"), device=torch.device("cpu")))
    assert waited == ["stream"]
    wait_for_offloaded(SimpleNamespace(device_mesh=SimpleNamespace(device_type="cpu"), device=torch.device("cpu")))
    assert waited == ["stream"]
    calls = []
    monkeypatch.setattr(handle_module, "wait_for_offloaded", lambda p: calls.append(torch.equal(p, before[p])))
    attach_layerwise(model, optimizer)
    loss_of(model, 0).backward()
    assert calls == [True] * 6
