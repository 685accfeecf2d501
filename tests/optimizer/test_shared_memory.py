"""Weights whose elements share memory, or that share memory with another weight: a race for kernels."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from optimizer_cases import OPTIONS
from torch import nn
from unchanged import assert_unchanged, snapshot

from apollo_triton import APOLLOAdamW, attach_layerwise
from apollo_triton.int8.weight import Int8Weight
from apollo_triton.params import aliasing


def parameter_of(view):
    return nn.Parameter(view, requires_grad=True)


def int8_weight(**parts):
    whole = {
        "q": torch.ones(16, 16, dtype=torch.uint8),
        "scale": torch.ones(2),
        "zero": torch.zeros(2, dtype=torch.uint8),
    }
    return Int8Weight(**whole | parts, group_size=128, dtype=torch.float32)


OVERLAPPING = {
    "expand": lambda: torch.ones(16, 1).expand(16, 16),
    "as_strided": lambda: torch.ones(300).as_strided((16, 16), (8, 1)),
    "unfold": lambda: torch.ones(20).unfold(0, 16, 1),
    "windows": lambda: torch.ones(64).as_strided((3, 4), (3, 2)),  # 0 2 4 6, 3 5 7 9, 6 ..
    "experts": lambda: torch.ones(1, 16, 16).expand(4, 16, 16),
    "int8": lambda: int8_weight(q=torch.ones(16, 1, dtype=torch.uint8).expand(16, 16)),
    "int8 scale": lambda: int8_weight(scale=torch.ones(1).expand(2)),
}


@pytest.mark.parametrize("name", OVERLAPPING)
def test_elements_that_share_memory_are_refused_at_construction(name, backend):
    weight = parameter_of(OVERLAPPING[name]())
    with pytest.raises(ValueError, match=r"parameter 0 \('w'\) of shape .* has strides .* one place in memory"):
        APOLLOAdamW([{"params": [("w", weight)], "rank": 2}])
    if "int8" not in name:  # is not trained densely
        with pytest.raises(ValueError, match="one place in memory"):
            APOLLOAdamW([{"params": [weight]}])


@pytest.mark.parametrize("kind", ["dense", *OPTIONS])
def test_a_weight_that_comes_to_share_memory_is_refused_before_anything_changes(kind, backend):
    """The kernels trained it, a race on a GPU; the reference path refused after it had moved the state."""
    weights = [nn.Parameter(torch.ones(16, 16)) for _ in range(2)]
    optimizer = APOLLOAdamW([{"params": weights, **OPTIONS.get(kind, {})}])
    for weight in weights:
        weight.grad = torch.ones(16, 16)
    optimizer.step()
    weights[1].data = torch.ones(16, 1).expand(16, 16)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"parameter 1 of shape \(16, 16\) has strides \(1, 0\)"):
        optimizer.step()
    assert_unchanged(optimizer, before)
    weights[1].data = weights[0].data  # two parameters in one place
    with pytest.raises(ValueError, match=r"parameter 0 .* and parameter 1 .* two parameters in one place"):
        optimizer.step()
    weights[1].grad = None  # is only read then
    optimizer.step()


def test_layerwise_updates_refuse_it_too(backend):
    model = nn.ModuleDict({"mlp": nn.Linear(16, 16, bias=False)})
    optimizer = APOLLOAdamW.apollo(model, 4)
    weight = model["mlp"].weight
    with attach_layerwise(model, optimizer):
        weight.data = torch.ones(16, 1).expand(16, 16)
        with pytest.raises(ValueError, match="one place in memory"):
            model["mlp"](torch.ones(2, 16)).sum().backward()
    assert not optimizer.state


@pytest.mark.parametrize("kind", ["dense", *OPTIONS])
def test_an_expanded_gradient_is_only_read(kind, backend):
    moved = []
    for expanded in (False, True):
        torch.manual_seed(0)
        weight = nn.Parameter(torch.ones(16, 16))
        gradient = torch.linspace(-1, 1, 16)[:, None].expand(16, 16)
        weight.grad = gradient if expanded else gradient.contiguous()
        optimizer = APOLLOAdamW([{"params": [weight], **OPTIONS.get(kind, {})}], max_grad_norm=1.0)
        optimizer.step()
        moved.append(weight.detach().clone())
        assert torch.equal(gradient[:, 0], torch.linspace(-1, 1, 16))
    assert not torch.equal(moved[0], torch.ones(16, 16))
    torch.testing.assert_close(*moved)


def test_what_shares_a_buffer_and_no_element_is_trained():
    """Flat buffers, as other programs cut parameters from: slices of rows, interleaved columns, transposed, tied."""
    buffer = torch.randn(64, 64)
    views = {
        "rows": [buffer[:32], buffer[32:]],
        "columns": [buffer[:, :32], buffer[:, 32:]],
        "interleaved": [buffer[::2], buffer[1::2], buffer[:0]],
        "transposed": [buffer[:32].t(), buffer[32:, ::2], buffer[32:, 1::2]],
        "strides that look alike": [buffer.as_strided((2, 3), (3, 2))],  # 0 2 4, 3 5 7
    }
    for name, each in views.items():
        APOLLOAdamW([{"params": [parameter_of(view) for view in each]}])
        assert name
    tied = nn.ModuleList([nn.Linear(16, 16), nn.Linear(16, 16)])
    tied[1].weight = tied[0].weight
    APOLLOAdamW([{"params": tied.parameters()}])
    frozen = nn.Parameter(buffer[:32], requires_grad=False)
    APOLLOAdamW([{"params": [frozen, parameter_of(buffer)]}])
    APOLLOAdamW([{"params": [nn.Parameter(torch.ones(4, 1).expand(4, 4), requires_grad=False)]}])
    freed = [torch.zeros(64) for _ in range(2)]
    slices = [parameter_of(each[32:]) for each in freed]
    for each in freed:
        each.untyped_storage().resize_(0)  # as FSDP1 does
    APOLLOAdamW([{"params": slices}])
    meta = [nn.Parameter(torch.empty(16, 16, device="meta")) for _ in range(2)]  # all at address 0
    APOLLOAdamW([{"params": meta}])


@pytest.mark.parametrize("slices", [(slice(0, 33), slice(32, 64)), (slice(0, 64), slice(3, 4))])
def test_two_parameters_in_one_place_are_refused(slices):
    buffer = torch.randn(64, 64)
    first, second = slices
    for views in ([buffer[first], buffer[second]], [buffer[:, first], buffer[:, second]]):
        params = [("a", parameter_of(views[0])), ("b", parameter_of(views[1]))]
        with pytest.raises(ValueError, match=r"parameter 0 \('a'\) .* and parameter 1 \('b'\) .* one place in memory"):
            APOLLOAdamW([{"params": params}])
        optimizer = APOLLOAdamW([{"params": params[:1]}])
        with pytest.raises(ValueError, match=r"parameter 0 \('a'\) .* and parameter 1 \('b'\)"):
            optimizer.add_param_group({"params": params[1:]})
        assert len(optimizer.param_groups) == 1
    q = torch.ones(16, 16, dtype=torch.uint8)
    with pytest.raises(ValueError, match="two parameters in one place"):
        APOLLOAdamW([{"params": [parameter_of(int8_weight(q=q)) for _ in range(2)], "rank": 4}])


strided = st.tuples(
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 9)), min_size=1, max_size=3), st.integers(0, 6)
)


@given(strided, strided)
@settings(deadline=None, max_examples=200)
def test_overlap_is_exact(first, second):
    """Places counted one by one, for all kinds of strides."""
    buffer = torch.zeros(128)
    tensors = []
    for dims, start in (first, second):
        tensors.append(buffer.as_strided([size for size, _ in dims], [stride for _, stride in dims], start))
    numbers = torch.arange(128)
    places = [numbers.as_strided(t.shape, t.stride(), t.storage_offset()).flatten().tolist() for t in tensors]
    for tensor, place in zip(tensors, places, strict=True):
        assert aliasing.overlaps_itself(tensor) == (len(set(place)) < len(place))
    params = [aliasing.Param(0, index, "", nn.Parameter(t)) for index, t in enumerate(tensors)]
    try:
        aliasing.check_separate(params)
        refused = False
    except ValueError:
        refused = True
    assert refused == bool(set(places[0]) & set(places[1]))
