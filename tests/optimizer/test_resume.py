"""A run that was saved and loaded goes on to the same bits, whatever its state is made of and however it is updated."""

from __future__ import annotations

import copy
import io
import pickle
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from tiers import backend_params
from torch import nn

from apollo_triton import APOLLOAdamW, apollo_param_groups, attach_layerwise, quantize_model

SAVED, END = 3, 5  # P is refreshed at steps 3 and 5: the file is written within a period, and the run ends in another


@dataclass(frozen=True)
class Row:
    """Keys of the low-rank group, options of the constructor, and how the weights are updated before and after."""

    group: dict[str, Any]
    options: dict[str, Any] = field(default_factory=dict)
    dtype: torch.dtype = torch.float32
    ways: tuple[str, str] = ("plain", "plain")
    int8: bool = False
    in_memory: bool = False


ROUNDED = {"state_dtype": torch.bfloat16, "stochastic_rounding": True, "weight_decay": 0.1}
TENSOR = {"rank": 1, "scale_type": "tensor", "scale": 16.0}
ROWS = {
    "channel": Row({"rank": 4}),
    "mini": Row(TENSOR, in_memory=True),
    "svd": Row({"rank": 4, "proj": "svd"}),
    "svd and bfloat16": Row({"rank": 4, "proj": "svd"}, dtype=torch.bfloat16),
    "auto scale": Row({"rank": 4, "scale": "auto"}),
    "a seed each, clipped": Row({"rank": 17}, {"seed_per_param": True, "max_grad_norm": 0.1}),
    "bfloat16": Row({"rank": 16}, dtype=torch.bfloat16),
    "bfloat16 state": Row({"rank": 4}, ROUNDED),
    "bfloat16 state and weights": Row(TENSOR, ROUNDED, torch.bfloat16, in_memory=True),
    "layer-wise": Row({"rank": 4}, ways=("freed", "freed")),
    "layer-wise, then plain": Row({"rank": 4}, ways=("freed", "plain")),
    "plain, then layer-wise": Row({"rank": 4}, ROUNDED, ways=("plain", "freed")),
    "no gradients": Row({"rank": 16}, ways=("none", "none")),
    "int8 weights": Row({"rank": 4}, ROUNDED, torch.bfloat16, int8=True),
    "int8 weights, no gradients": Row(TENSOR, ways=("none", "none"), int8=True),
    "8-bit moments": Row({"rank": 16}, {"state_bits": 8, "min_8bit_size": 257}),
}
# Everything takes part on the reference path. On the kernels: what they keep between steps besides.
ON_KERNELS = {"mini", "svd", "bfloat16 state and weights", "no gradients"}


def model_of(row: Row, seed: int = 0) -> nn.ModuleDict:
    """Two orientations, a tensor of experts and a convolution in the low-rank group; vectors beside."""
    torch.manual_seed(seed)
    layers = {
        "mlp": nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 24)),
        "attn": nn.ModuleDict({"experts": nn.ParameterDict({"weight": torch.randn(3, 20, 24)})}),
        "conv": nn.Conv2d(3, 18, 2, bias=False),
        "norm": nn.LayerNorm(24),
    }
    model = nn.ModuleDict(layers).to(torch.get_default_device(), row.dtype)
    return quantize_model(model, ["mlp"], group_size=8) if row.int8 else model


def optimizer_of(model: nn.ModuleDict, row: Row, **options: Any) -> APOLLOAdamW:
    keys = {"update_proj_gap": 2, **row.group}
    if row.group["rank"] > 12:  # the convolution is 12 wide
        groups = apollo_param_groups(model, target_modules=["mlp", "attn"], **keys)
    else:
        groups = apollo_param_groups(model, target_modules=["mlp", "attn", "conv"], **keys)
    return APOLLOAdamW(groups, **options)


def attach(model: nn.ModuleDict, optimizer: APOLLOAdamW, way: str) -> None:
    if way != "plain":
        attach_layerwise(model, optimizer, gradients=way)


def train(model: nn.ModuleDict, optimizer: APOLLOAdamW, first: int, last: int) -> None:
    """Steps number ``first`` to ``last``, each on a batch of its own."""
    for step in range(first, last + 1):
        dtype = model["norm"].weight.dtype
        x = torch.randn(8, 24, generator=torch.Generator("cpu").manual_seed(step), device="cpu")
        x = x.to(model["norm"].weight.device, dtype)
        hidden = model["norm"](model["mlp"](x)) @ model["attn"]["experts"].weight.mT
        loss = hidden.float().square().mean() + model["conv"](x.view(2, 3, 4, 8)).float().square().sum()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def saved_and_loaded(value: Any) -> Any:
    file = io.BytesIO()
    torch.save(value, file)
    return torch.load(io.BytesIO(file.getvalue()), weights_only=True)


def assert_same(first: tuple[nn.Module, APOLLOAdamW], second: tuple[nn.Module, APOLLOAdamW]) -> None:
    """Weights and all state, bit for bit."""
    (one, by_one), (other, by_other) = first, second
    for (name, value), (_, again) in zip(one.state_dict().items(), other.state_dict().items(), strict=True):
        assert torch.equal(value, again), name
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        assert by_one.state[p].keys() == by_other.state[q].keys(), name
        for key, value in by_one.state[p].items():
            again = by_other.state[q][key]
            assert type(value) is type(again), f"{name}.{key}"
            assert torch.equal(torch.as_tensor(value), torch.as_tensor(again)), f"{name}.{key}"


def resumed(row: Row, **options: Any) -> tuple[tuple[nn.Module, APOLLOAdamW], tuple[nn.Module, APOLLOAdamW]]:
    """A run that was saved on its way to the end, and one that begins with what was saved."""
    model = model_of(row)
    optimizer = optimizer_of(model, row, lr=1e-2, seed=3, **row.options, **options)
    attach(model, optimizer, row.ways[0])
    train(model, optimizer, 1, SAVED)
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
    state = copy.deepcopy(state) if row.in_memory else saved_and_loaded(state)
    train(model, optimizer, SAVED + 1, END)
    # Weights, rate and seed of its own, steps to be forgotten, and hooks that are there before the file is.
    other = model_of(row, seed=9)
    continued = optimizer_of(other, row, lr=0.5, seed=77, **options)
    attach(other, continued, row.ways[1])
    train(other, continued, 1, 1)
    other.load_state_dict(state["model"])
    continued.load_state_dict(state["optimizer"])
    train(other, continued, SAVED + 1, END)
    return (model, optimizer), (other, continued)


@pytest.mark.parametrize(
    ("backend", "name"),
    backend_params(ROWS, full={"interpreter": set(ROWS) - ON_KERNELS}, slow={"interpreter"}),
    indirect=["backend"],
)
def test_a_resumed_run_ends_with_the_same_bits(backend, name, request):
    """What a step reads and a file does not hold: the epoch of P and svd's P itself, u_prev, the step count and the
    random bits that are drawn by it, scales of moments and of int8 weights; a plan or P of before the load."""
    row = ROWS[name]
    if row.options.get("state_bits") == 8:
        request.getfixturevalue("bitsandbytes")
    one, other = resumed(row)
    assert_same(one, other)
    if row.options.get("state_bits") == 8:
        assert any("exp_avg_q" in state for state in one[1].state.values())


@pytest.mark.slow
def test_a_capturable_run_ends_with_the_same_bits():
    """Its rate and step counts are tensors, on the device."""
    pytest.importorskip("triton")
    row = Row({"rank": 2})
    one, other = resumed(row, capturable=True, backend="triton")
    assert_same(one, other)
    assert isinstance(other[1].param_groups[0]["lr"], torch.Tensor)


def test_state_of_another_dtype_is_loaded_as_it_was():
    """torch.optim's own ``load_state_dict`` casts state to the parameter's dtype."""
    row = Row({"rank": 4})
    model, half = model_of(row), model_of(row).bfloat16()
    optimizer, other = (optimizer_of(each, row, lr=1e-2) for each in (model, half))
    train(model, optimizer, 1, 3)
    other.load_state_dict(optimizer.state_dict())
    for p, q in zip(model.parameters(), half.parameters(), strict=True):
        for name, value in optimizer.state[p].items():
            loaded = other.state[q][name]
            if isinstance(value, torch.Tensor):
                assert loaded.dtype == value.dtype, name
                assert torch.equal(loaded, value)
                assert loaded.data_ptr() != value.data_ptr()  # loading copies
            else:
                assert loaded == value
    train(half, other, 4, 5)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair))], ids=["copy", "pickle"])
def test_copies_go_on_alike(how):
    row = Row({"rank": 4}, {"max_grad_norm": 0.1})
    model = model_of(row)
    optimizer = optimizer_of(model, row, lr=1e-2, **row.options)
    train(model, optimizer, 1, SAVED)
    other, continued = how((model, optimizer))
    for each in ((model, optimizer), (other, continued)):
        train(*each, SAVED + 1, END)
    assert_same((model, optimizer), (other, continued))
