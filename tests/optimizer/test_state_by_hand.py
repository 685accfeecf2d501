"""State that is changed in ``optimizer.state`` between steps: refused by name before anything moves, or read right.

A kept plan holds addresses. So what takes a tensor's place must be seen at the next step, also where it lies at the
same address.
"""

from __future__ import annotations

import pytest
import torch
from broken_state import everything, same
from torch import nn

from apollo_triton import APOLLOAdamW, attach_layerwise


class Run:
    """A matrix of each kind and a vector, after two steps; ``step`` goes on."""

    def __init__(self, way: str = "plain", backend: str = "auto", **group):
        torch.manual_seed(0)
        self.layer, self.dense = nn.Linear(10, 12), nn.Linear(12, 3, bias=False)
        self.model = nn.Sequential(self.layer, nn.Tanh(), self.dense).to(torch.get_default_device())
        low_rank = {"params": [("weight", self.layer.weight)], "rank": 4, **group}
        dense = {"params": [("bias", self.layer.bias), ("dense", self.dense.weight)]}
        self.optimizer = APOLLOAdamW([low_rank, dense], lr=1e-2, backend=backend)
        if way != "plain":
            attach_layerwise(self.model, self.optimizer, gradients=way)
        self.x = torch.linspace(-1, 1, 30).view(3, 10)
        for _ in range(2):
            self.step()

    def step(self):
        self.model(self.x.to(self.layer.weight.device)).square().sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    @property
    def low_rank(self):
        return self.optimizer.state[self.layer.weight]


def at_the_same_address(moment):
    """A bfloat16 tensor of the same shape, in the same memory."""
    halves = moment.view(torch.bfloat16)[:, : moment.shape[1]]
    assert (halves.data_ptr(), halves.shape) == (moment.data_ptr(), moment.shape)
    return halves


BREAKS = {
    "float16 moment": ("exp_avg", lambda x: x.half(), "has dtype torch.float16 .allowed: torch.float32 or torch.bfl"),
    "moments of two dtypes": ("exp_avg_sq", lambda x: x.bfloat16(), "has dtype torch.bfloat16 .allowed: torch.float"),
    "the same address": ("exp_avg_sq", at_the_same_address, "has dtype torch.bfloat16"),
    "float8": ("exp_avg", lambda x: x.to(torch.float8_e4m3fn), "has dtype torch.float8_e4m3fn"),
    "complex": ("exp_avg", lambda x: x.to(torch.complex64), "has dtype torch.complex64"),
    "sparse": ("exp_avg", lambda x: x.to_sparse(), "has layout torch.sparse_coo .allowed: torch.strided"),
    "meta": ("exp_avg", lambda x: x.to("meta"), "is on meta, and the parameter on"),
    "negated": ("exp_avg", lambda x: torch._neg_view(-x), "is negated where it is read"),
    "None": ("exp_avg_sq", lambda x: None, "is None, not a tensor"),
    "a list": ("exp_avg", lambda x: x.tolist(), "not a tensor"),
    "smaller": ("exp_avg", lambda x: x[:4], r"has shape \(4, 4\), not \(12, 4\)"),
    "norm in bfloat16": ("update_norm", lambda x: x.bfloat16(), "has dtype torch.bfloat16 .allowed: torch.float32"),
    "norm as a number": ("update_norm", lambda x: x.item(), "not a tensor"),
    "step in int64": ("step", lambda x: x.long(), "has dtype torch.int64"),
    "step as a vector": ("step", lambda x: x[None], r"has shape \(1,\)"),
    "step on meta": ("step", lambda x: x.to("meta"), "is on meta, and the parameter on"),
    "step of 2**24": ("step", lambda x: x + 2**24, "is tensor.16777218.. .allowed: a whole number from 0 to 2..24 - 1"),
    "step of NaN": ("step", lambda x: x * float("nan"), "is tensor.nan. .allowed"),
    "seed": ("seed", lambda x: 3.0, "is 3.0 .allowed: an integer"),
    "8-bit without absmax": ("both moments", lambda x: x.to(torch.uint8), "'exp_avg_absmax' is missing"),
}  # fmt: skip
ALSO_LAYERWISE = ("float16 moment", "the same address", "norm in bfloat16", "step of 2**24")


@pytest.mark.parametrize(
    ("way", "name"),
    [("plain", name) for name in BREAKS] + [(way, name) for way in ("freed", "none") for name in ALSO_LAYERWISE],
)  # fmt: skip
def test_it_is_refused_before_anything_moves(way, name):
    run = Run(way)
    key, change, text = BREAKS[name]
    for each in ("exp_avg", "exp_avg_sq") if key == "both moments" else (key,):
        run.low_rank[each] = change(run.low_rank[each])
    before, weight = everything(run.optimizer), run.layer.weight.detach().clone()
    with pytest.raises(ValueError, match=rf"parameter 0 \('weight'\) of shape \(12, 10\): its state .*{text}"):
        run.step()
    assert torch.equal(run.layer.weight, weight)
    if way == "plain":  # with hooks the layers behind it have moved by then
        assert same(everything(run.optimizer), before)


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=pytest.mark.slow)])
def test_a_kept_plan_sees_what_takes_a_tensor_s_place(backend):
    """On the kernels it would read what was there when the plan was made."""
    if backend == "triton":
        pytest.importorskip("triton")
    ends = []
    for replaces in (False, True):
        run = Run(backend=backend)
        values = {"exp_avg": 0.25, "exp_avg_sq": 0.5, "update_norm": 3.0, "step": 7.0}
        for name, value in values.items():
            if replaces:
                run.low_rank[name] = torch.full_like(run.low_rank[name], value)
            else:
                run.low_rank[name].fill_(value)
        run.low_rank["seed"] = 5
        if not replaces:
            run.optimizer.load_state_dict(run.optimizer.state_dict())  # after which nothing is kept
        run.step()
        ends.append(run.layer.weight.detach())
    assert torch.equal(*ends)
    assert run.low_rank["step"] == 8


@pytest.mark.parametrize("backend", ["reference", pytest.param("triton", marks=pytest.mark.slow)])
def test_layouts_are_read_as_they_lie(backend):
    """Moments and svd's P of other strides: kernels would read a column-major P as another one."""
    if backend == "triton":
        pytest.importorskip("triton")
    layouts = {
        "as it was": lambda x: x.clone(),
        "column-major": lambda x: x.mT.contiguous().mT,
        "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2],
    }
    ends = {}
    for name, laid_out in layouts.items():
        run = Run(backend=backend, proj="svd", update_proj_gap=50)
        for key in ("exp_avg", "exp_avg_sq", "projection"):
            run.low_rank[key] = laid_out(run.low_rank[key])
        run.step()
        ends[name] = run.layer.weight.detach()
    assert all(torch.equal(end, ends["as it was"]) for end in ends.values())


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda P: P.double(), "has dtype torch.float64 .allowed: torch.float32"),
        (lambda P: P.bfloat16(), "has dtype torch.bfloat16"),
        (lambda P: P[:2], r"has shape \(2, 10\), not \(4, 10\)"),
        (lambda P: P.to("meta"), "is on meta"),
        (lambda P: "P", "is 'P', not a tensor"),
        (lambda P: None, "is None, not a tensor"),
    ],
)
def test_a_projection_of_another_kind_is_refused(change, text):
    run = Run(proj="svd", update_proj_gap=50)
    run.low_rank["projection"] = change(run.low_rank["projection"])
    before = everything(run.optimizer)
    with pytest.raises(ValueError, match=rf"'weight'.* its state 'projection' {text}"):
        run.step()
    assert same(everything(run.optimizer), before)


def test_elements_that_share_memory_are_given_their_own(backend):
    """Zeros by ``expand``, of moments and of a dense parameter: written to in place, each element would be all."""
    ends = []
    for expands in (False, True):
        run = Run()
        for state in run.optimizer.state.values():
            for name in ("exp_avg", "exp_avg_sq"):
                zero = torch.zeros((), dtype=torch.float32, device=state[name].device)
                state[name] = zero.expand(state[name].shape) if expands else torch.zeros_like(state[name])
        run.step()
        ends.append([parameter.detach() for parameter in run.model.parameters()])
    assert all(map(torch.equal, *ends))


@pytest.mark.parametrize(("mine", "of"), [("exp_avg", "exp_avg_sq"), ("exp_avg", "another parameter's")])
def test_two_tensors_in_one_memory_are_refused(mine, of):
    run = Run()
    other = run.low_rank
    if of == "another parameter's":
        other, of = run.optimizer.state[run.layer.bias], "exp_avg_sq"
        run.low_rank[mine] = run.low_rank[mine].view(-1)[:12].clone().expand(4, 12).mT  # of its shape
        other[of] = run.low_rank[mine][:, 0]
    else:
        run.low_rank[mine] = other[of]
    before = everything(run.optimizer)
    with pytest.raises(ValueError, match=r"its state 'exp_avg(_sq)?' is in the memory of 'exp_avg.* a copy of its own"):
        run.step()
    assert same(everything(run.optimizer), before)


def test_what_users_keep_beside_our_state_is_left_alone():
    """Before the first step, and afterwards."""
    weight = nn.Parameter(torch.ones(4, 4))
    optimizer = APOLLOAdamW([{"params": [weight], "rank": 2}])
    optimizer.state[weight]["average"] = torch.ones(3)
    optimizer.state["note"] = {"text": "mine"}
    for _ in range(2):
        weight.grad = torch.ones(4, 4)
        optimizer.step()
    optimizer.load_state_dict(optimizer.state_dict())
    assert torch.equal(optimizer.state[weight]["average"], torch.ones(3))
    assert optimizer.state["note"] == {"text": "mine"}
    optimizer.step()
