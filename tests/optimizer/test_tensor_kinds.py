"""Parameters and gradients that are no plain tensors: without values (meta, fake), subclasses known and unknown."""

from __future__ import annotations

from contextlib import nullcontext

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.distributed._functional_collectives import AsyncCollectiveTensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from unchanged import assert_unchanged, snapshot

from apollo_triton import APOLLOAdamW, attach_layerwise, quantize_model

GROUPS = {
    "channel": {"rank": 4},
    "tensor": {"rank": 1, "scale_type": "tensor", "scale": 128.0},
    "svd": {"rank": 4, "proj": "svd"},
    "dense": {},
}
OPTIONS = {
    "plain": {},
    "clipped, rounded": {"max_grad_norm": 1.0, "stochastic_rounding": True, "weight_decay": 0.1},
    "8-bit": {"state_bits": 8, "min_8bit_size": 0},
}


def trained(group, options, gradients="kept", device=None, dtype=torch.float32, int8=False):
    """A layer and its optimizer after two steps."""
    model = nn.ModuleDict({"mlp": nn.Linear(32, 16, device=device, dtype=dtype)})
    if int8:
        quantize_model(model, group_size=32)
    layer = model["mlp"]
    optimizer = APOLLOAdamW(
        [{"params": [layer.weight], **group}, {"params": [layer.bias], "state_bits": 32}], **options
    )
    if gradients != "kept":
        attach_layerwise(layer, optimizer, gradients=gradients)
    for _ in range(2):
        layer(torch.ones(3, 32, device=device, dtype=dtype)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return layer, optimizer


def described(optimizer, layer):
    """Kinds of the state, except svd's P, which is data."""
    return {
        name: (value.shape, value.dtype) if isinstance(value, Tensor) else value
        for name, value in optimizer.state[layer.weight].items()
        if name != "projection"
    }


CASES = [
    (group, options, gradients, int8)
    for group in GROUPS
    for options in OPTIONS
    for gradients in ("kept", "freed", "none")
    for int8 in (False, True)
    if not (group == "dense" and (options == "8-bit" or gradients == "none" or int8))
    if not ((group, gradients) == ("svd", "none") or (options == "clipped, rounded" and gradients != "kept"))
    if not (int8 and options == "clipped, rounded")
]


@pytest.mark.slow
@pytest.mark.parametrize("cases", [CASES[::3], pytest.param(CASES, marks=pytest.mark.full)], ids=["some", "all"])
@pytest.mark.parametrize(("kind", "dtype"), [("meta", torch.bfloat16), ("fake", torch.float32)])
def test_a_step_of_what_has_no_values_makes_the_state_and_counts(kind, dtype, cases):
    """Memory estimates step on them, as AdamW can: fake ones died in reading a value, after the state was made; int8
    layers and updates without a gradient in asking for the meta device's autocast."""
    for group, options, gradients, int8 in cases:
        keys = GROUPS[group], OPTIONS[options], gradients
        real, real_optimizer = trained(*keys, dtype=dtype, int8=int8)
        if kind == "meta":
            layer, optimizer = trained(*keys, device="meta", dtype=dtype, int8=int8)
        else:
            with FakeTensorMode():
                layer, optimizer = trained(*keys, dtype=dtype, int8=int8)
        state = optimizer.state[layer.weight]
        assert described(optimizer, layer) == described(real_optimizer, real), (group, options, gradients, int8)
        assert type(state["step"]) is Tensor
        assert float(state["step"]) == 2
        moments = state["exp_avg"]
        assert moments.is_meta if kind == "meta" else isinstance(moments, FakeTensor)
        assert layer.weight.grad is None


def test_fake_tensors_are_stepped_outside_of_their_mode_and_on_a_device_that_is_not_here(monkeypatch):
    def warns(_: Tensor) -> int:  # once in a process, that this will be an error
        raise AssertionError("a FakeTensor was asked where it lies")

    with FakeTensorMode():
        weight = nn.Parameter(torch.empty(16, 32, device="cuda"))
        weight.grad = torch.empty_like(weight)
    with monkeypatch.context() as patched:
        patched.setattr(FakeTensor, "untyped_storage", warns)
        optimizer = APOLLOAdamW([{"params": [weight], "rank": 4}])
    for _ in range(2):
        optimizer.step()
    assert isinstance(optimizer.state[weight]["exp_avg"], FakeTensor)
    assert optimizer.state[weight]["exp_avg"].device.type == "cuda"
    assert optimizer.state[weight]["step"] == 2


def test_a_fake_gradient_of_a_real_weight_is_refused():
    weight = nn.Parameter(torch.ones(16, 32))
    optimizer = APOLLOAdamW([{"params": [weight], "rank": 4}])
    with FakeTensorMode():
        weight.grad = torch.empty(16, 32)
    before = snapshot(optimizer)
    with pytest.raises(ValueError, match=r"parameter 0 .* one of the two is a fake tensor"):
        optimizer.step()
    assert_unchanged(optimizer, before)


@pytest.mark.parametrize("kind", ["meta", "fake"])
def test_shards_without_values_are_refused_by_name(kind):
    """Ranks would send each other nothing, and died in the library, after gradients were changed."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        with FakeTensorMode() if kind == "fake" else nullcontext():
            shards = [torch.empty(8, 32, device="meta" if kind == "meta" else None) for _ in range(2)]
            weight, gradient = (DTensor.from_local(shard, mesh, [Shard(0)], run_check=False) for shard in shards)
            weight = nn.Parameter(weight)
            weight.grad = gradient
            optimizer = APOLLOAdamW([{"params": [weight], "rank": 4}])
            with pytest.raises(ValueError, match=r"parameter 0 .* is a DTensor without values.*apollo-triton memory"):
                optimizer.step()
        assert not optimizer.state
    finally:
        torch.distributed.destroy_process_group()


class Foreign(Tensor):
    """A weight that keeps its numbers elsewhere and knows few operators, as torchao's for int8 training."""

    @staticmethod
    def __new__(cls, inner):
        return Tensor._make_wrapper_subclass(cls, inner.shape, dtype=inner.dtype, device=inner.device)

    def __init__(self, inner):
        self.inner = inner

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        if function in (torch.ops.aten.detach.default, torch.ops.aten.clone.default):
            return cls(args[0].inner)
        raise NotImplementedError(function)

    def __repr__(self):
        return "Foreign"


@pytest.mark.parametrize("rank", [{"rank": 2}, {}])
def test_an_unknown_subclass_is_refused_by_name(backend, rank):
    """``NotImplementedError`` came from within the step, whose moments had moved; the kernels wrote to address 0."""
    first, second = nn.Parameter(torch.ones(8, 4)), nn.Parameter(Foreign(torch.ones(8, 4)))
    text = r"parameter 1 of shape \(8, 4\) is a .*Foreign, a tensor subclass that .*quantize_model"
    with pytest.raises(ValueError, match=text):
        APOLLOAdamW([{"params": [first, second], **rank}])
    optimizer = APOLLOAdamW([{"params": [first, second.requires_grad_(False)], **rank}])  # as frozen 4-bit weights are
    first.grad = torch.ones(8, 4)
    optimizer.step()
    second.requires_grad_().grad = torch.ones(8, 4)
    before = first.detach().clone(), optimizer.state[first]["exp_avg"].clone()
    with pytest.raises(ValueError, match=text):
        optimizer.step()
    assert torch.equal(before[0], first)
    assert torch.equal(before[1], optimizer.state[first]["exp_avg"])
    assert second not in optimizer.state


def test_an_unknown_gradient_is_refused_by_name(backend):
    """Also at a later step, when nothing else has moved."""
    weight = nn.Parameter(torch.ones(8, 4))
    optimizer = APOLLOAdamW([{"params": [weight], "rank": 2}])
    for plain in (False, True, False):
        weight.grad = torch.ones(8, 4) if plain else Foreign(torch.ones(8, 4))
        before = snapshot(optimizer)
        if plain:
            optimizer.step()
        else:
            with pytest.raises(ValueError, match=r"parameter 0 .*its gradient is a .*Foreign, a tensor subclass"):
                optimizer.step()
            assert_unchanged(optimizer, before)


def test_the_gradient_of_a_functional_collective_is_waited_for(backend):
    """``weight.grad = torch.distributed._functional_collectives.all_reduce(weight.grad, ...)``: a result that is on its
    way, which the kernels looked for at address 0."""
    weights = [nn.Parameter(torch.ones(8, 4)) for _ in range(2)]
    optimizers = [APOLLOAdamW([{"params": [weight], "rank": 2}]) for weight in weights]
    for step in range(3):
        gradient = torch.full((8, 4), 1.0 + step)
        weights[0].grad, weights[1].grad = gradient, gradient.clone() if step == 1 else AsyncCollectiveTensor(gradient)
        for optimizer in optimizers:
            optimizer.step()
    assert torch.equal(*weights)


class Marked(nn.Parameter):
    """A subclass that computes as any tensor does, as bitsandbytes' and DeepSpeed's do."""


def test_a_subclass_that_computes_as_any_tensor_is_one(backend):
    weights = [nn.Parameter(torch.ones(8, 4)), Marked(torch.ones(8, 4))]
    for weight in weights:
        optimizer = APOLLOAdamW([{"params": [weight], "rank": 2}])
        for _ in range(2):
            weight.grad = torch.ones(8, 4)
            optimizer.step()
    assert torch.equal(*(weight.detach() for weight in weights))
