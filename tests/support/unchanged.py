"""Everything that a refused call must leave alone."""

from __future__ import annotations

import copy

import torch

from apollo_triton.int8 import Int8Weight


def snapshot(optimizer):
    """Groups, weights and state, as copies."""
    weights = [p.detach().clone() for group in optimizer.param_groups for p in group["params"]]
    states = [copy.deepcopy(optimizer.state.get(p, {})) for group in optimizer.param_groups for p in group["params"]]
    groups = [{k: v for k, v in group.items() if k != "params"} for group in optimizer.param_groups]
    return weights, states, groups


def _parts(weight):
    """What an int8 weight holds; any other weight itself."""
    return (weight.q, weight.scale, weight.zero) if isinstance(weight, Int8Weight) else (weight,)


def assert_unchanged(optimizer, before):
    weights, states, groups = snapshot(optimizer)
    assert groups == before[2]
    for now, then in zip(weights, before[0], strict=True):
        assert all(torch.equal(a, b) for a, b in zip(_parts(now), _parts(then), strict=True))
    for now, then in zip(states, before[1], strict=True):
        assert now.keys() == then.keys()
        for name, value in now.items():
            if isinstance(value, torch.Tensor) and value.is_meta:  # has no values
                assert then[name].is_meta, name
            else:
                assert torch.equal(torch.as_tensor(value), torch.as_tensor(then[name])), name
