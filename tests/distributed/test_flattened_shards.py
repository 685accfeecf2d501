"""FSDP1 and DeepSpeed ZeRO hand the optimizer vectors for matrices: refused with what to do, or told apart from what
works."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.distributed as dist
from distributed_cases import assert_ranks_agree, assert_same_bits, drawn
from distributed_harness import run
from torch import nn
from torch.distributed.fsdp import FullyShardedDataParallel, ShardingStrategy

from apollo_triton import APOLLOAdamW


def small_model():
    model = nn.Sequential(nn.Linear(6, 10, bias=False), nn.Tanh(), nn.Linear(10, 4, bias=False))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(drawn(tuple(parameter.shape), name))
    return model


def under_fsdp1(use_orig_params, strategy, wrapped_first):
    """What making an optimizer and its first steps say, and the weights of the steps that were taken."""
    model = small_model()
    early = None if wrapped_first else APOLLOAdamW([{"params": list(model.parameters()), "rank": 2}], lr=1e-2)
    wrapped = FullyShardedDataParallel(
        model,
        use_orig_params=use_orig_params,
        sharding_strategy=ShardingStrategy[strategy],
        device_id=torch.device("cpu"),
    )
    try:
        optimizer = early or APOLLOAdamW([{"params": list(wrapped.named_parameters()), "rank": 2}], lr=1e-2)
        for step in range(3):
            wrapped(drawn((5, 6), "batch", step, dist.get_rank())).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()
    except ValueError as error:
        return str(error), {}
    return "", {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("wrapped_first", [True, False], ids=["made after", "made before"])
def test_fsdp1_shards_are_refused(wrapped_first):
    """Vectors of a sharded FSDP1 taken for biases: AdamW for the whole model, and nobody is told."""
    for text, _ in run(under_fsdp1, 2, use_orig_params=True, strategy="FULL_SHARD", wrapped_first=wrapped_first):
        assert text.startswith("parameter 0"), text
        assert "flattened FSDP shard" in text
        assert "fully_shard" in text


def test_the_flat_parameter_of_fsdp1_is_refused():
    """The same where FSDP1 has one vector for all weights."""
    for text, _ in run(under_fsdp1, 2, use_orig_params=False, strategy="FULL_SHARD", wrapped_first=True):
        assert "_flat_param" in text, "the parameter is not named"
        assert "NO_SHARD" in text


def trained_alone():
    """The mean of both ranks' losses on one process."""
    model = small_model()
    optimizer = APOLLOAdamW([{"params": list(model.parameters()), "rank": 2}], lr=1e-2)
    for step in range(3):
        sum(model(drawn((5, 6), "batch", step, rank)).square().mean() / 2 for rank in range(2)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return dict(model.named_parameters())


def test_fsdp1_without_sharding_trains_as_one_process_does():
    """What the refusal recommends has to work."""
    results = run(under_fsdp1, 2, use_orig_params=True, strategy="NO_SHARD", wrapped_first=True)
    assert [text for text, _ in results] == ["", ""]
    assert_ranks_agree([weights for _, weights in results])
    for name, parameter in trained_alone().items():
        torch.testing.assert_close(results[0][1][name], parameter.detach(), rtol=1e-5, atol=1e-6)


def flattened_by_zero(optimizer):
    """As DeepSpeed's ZeRO 1 and 2 do: a flat float32 partition takes the place of each group's parameters."""
    for group in optimizer.param_groups:
        flat = torch.cat([parameter.detach().reshape(-1) for parameter in group["params"]])
        group["params"] = [nn.Parameter(flat[: len(flat) // 2].clone())]
        group["params"][0].grad = torch.ones_like(group["params"][0])


def made(how):
    model = small_model().append(nn.LayerNorm(4, bias=False))
    optimizer = APOLLOAdamW([{"params": [model[0].weight, model[2].weight], "rank": 2}, {"params": [model[3].weight]}])
    if how == "copied":
        return copy.deepcopy(optimizer)
    if how == "unpickled":
        return pickle.loads(pickle.dumps(optimizer))
    return optimizer


@pytest.mark.parametrize("how", ["made", "copied", "unpickled"])
def test_zero_partitions_are_refused_at_the_first_step(how):
    """DeepSpeed 0.19's ZeRO, stages 1 to 3, ran APOLLO as plain AdamW on vectors without a complaint."""
    optimizer = made(how)
    flattened_by_zero(optimizer)
    before = [parameter.detach().clone() for group in optimizer.param_groups for parameter in group["params"]]
    with pytest.raises(ValueError, match=r"parameter group 0 .*vector of shape \(50,\).*ZeRO.*fully_shard"):
        optimizer.step()
    after = [parameter.detach() for group in optimizer.param_groups for parameter in group["params"]]
    assert_same_bits(dict(enumerate(after)), dict(enumerate(before)), "after the refusal")
    assert not optimizer.state


def test_zero_3_partitions_are_refused_when_the_optimizer_is_made():
    """``deepspeed.zero.Init`` leaves empty vectors that know the shape they had."""
    partition = nn.Parameter(torch.empty(0))
    partition.ds_shape = torch.Size((24, 16))
    with pytest.raises(ValueError, match=r"parameter 0 \('w'\).*ZeRO-3.*shape \(24, 16\).*fully_shard"):
        APOLLOAdamW([{"params": [("w", partition)], "rank": 2}])
    APOLLOAdamW([partition])  # dense AdamW needs no rows


def test_vectors_that_a_low_rank_group_was_given_stay_dense():
    """A check that takes biases for flattened weights: they have always been dense in a low-rank group."""
    bias = nn.Parameter(torch.zeros(4))
    optimizer = APOLLOAdamW([{"params": [bias], "rank": 2}], lr=1e-2)
    bias.grad = torch.ones(4)
    optimizer.step()
    assert (bias != 0).all()
