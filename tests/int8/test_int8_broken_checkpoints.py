"""Broken checkpoints of int8 models: cast or refused by key, and a refused weight stays as it was."""

from __future__ import annotations

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from int8_models import PARTS, bits, drawn, floats, int8
from torch import nn

from apollo_triton import APOLLOAdamW
from apollo_triton.int8.weight import Int8Weight


def entry(number, dtype):
    """The accident of one wrong entry."""

    def spoil(value):
        value = value.to(dtype).clone()
        value.view(-1)[3] = number
        return value

    return spoil


SPOILS = {
    **{str(dtype): (lambda value, dtype=dtype: value.to(dtype)) for dtype in (
        torch.float16, torch.bfloat16, torch.float64, torch.float8_e4m3fn, torch.int64, torch.int8, torch.uint16,
        torch.bool, torch.complex64)},
    "NaN": entry(float("nan"), torch.float32),
    "infinite": entry(float("inf"), torch.float32),
    "negative": entry(-1.0, torch.float32),
    "zero": entry(0.0, torch.float32),
    "underflow": entry(1e-50, torch.float64),
    "overflow": entry(1e300, torch.float64),
    "too large": entry(3e38, torch.float32),
    "256": entry(256, torch.int64),
    "2**40": entry(2**40, torch.int64),
    "-1": entry(-1, torch.int32),
    "float": lambda value: value.float(),
    "short": lambda value: value[:-1],
    "empty": lambda value: value[:0],
    "flat": lambda value: value.reshape(-1),
    "one more dimension": lambda value: value[None],
    "expanded": lambda value: value[:1].expand(value.shape),
    "transposed": lambda value: value.mT.contiguous().mT if value.dim() == 2 else value,
    "meta": lambda value: value.to("meta"),
    "sparse": lambda value: value.to_sparse(),
    "None": lambda value: None,
    "text": lambda value: "\x1b[31m" + "x" * 10_000,
    "list": lambda value: [1, 2],
    "parameter": lambda value: nn.Parameter(value, requires_grad=value.is_floating_point()),
}  # fmt: skip


REFUSED = {
    "weight_q": ["float", "torch.float8_e4m3fn", "torch.bool", "torch.complex64", "NaN", "256", "2**40", "-1",
                 "short", "flat", "one more dimension", "sparse", "meta", "None", "text"],
    "weight_scale": ["torch.int64", "torch.float8_e4m3fn", "torch.complex64", "NaN", "infinite", "negative", "zero",
                     "underflow", "overflow", "too large", "short", "empty", "one more dimension", "sparse", "meta",
                     "None"],
    "weight_zero": ["float", "torch.bool", "torch.complex64", "256", "-1", "short", "empty", "sparse", "meta"],
}  # fmt: skip


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("key", PARTS)
def test_a_part_that_is_none_is_refused_by_its_key_and_changes_nothing(key, assign):
    """NaN, infinite, negative or zero scales, codes of int64 out of range, bool or complex codes were taken."""
    for how in REFUSED[key]:
        model, state = int8(1), dict(int8().state_dict())
        before, weight = bits(model), model["mlp"].weight
        state[f"mlp.{key}"] = SPOILS[how](state[f"mlp.{key}"])
        with pytest.raises(RuntimeError) as caught:
            model.load_state_dict(state, strict=False, assign=assign)
        assert f"mlp.{key}" in str(caught.value) or "size mismatch for mlp.weight" in str(caught.value), how
        assert len(str(caught.value)) < 1000
        assert "\x1b" not in str(caught.value)
        assert model["mlp"].weight is weight
        assert all(torch.equal(bits(model)[f"mlp.{part}"], before[f"mlp.{part}"]) for part in PARTS), how
    every = {f"mlp.{part}": None for part in PARTS}
    with pytest.raises(
        RuntimeError, match=r"(?s)mlp\.weight_q is None.*mlp\.weight_scale is None.*mlp\.weight_zero is"
    ):
        int8().load_state_dict(every, strict=False, assign=assign)


AMBIGUOUS = {
    "float beside scales": (
        ["weight_scale", "weight_zero"],
        torch.float32,
        r"mlp\.weight is torch\.float32, and there",
    ),
    "float beside one": (
        ["weight_scale"],
        torch.bfloat16,
        r"mlp\.weight is torch\.bfloat16, and there is mlp\.weight_s",
    ),
    "float beside all": (PARTS, torch.float32, r"mlp\.weight is torch\.float32, and there is mlp\.weight_q"),
    "both codes": (PARTS, torch.uint8, r"mlp\.weight and mlp\.weight_q are both there"),
    "codes alone": ([], torch.uint8, r"mlp\.weight is torch\.uint8, without the mlp\.weight_scale"),
    "codes without zero points": (["weight_scale"], torch.int64, r"mlp\.weight is torch\.int64, without the"),
    "float8": ([], torch.float8_e4m3fn, r"mlp\.weight is torch\.float8_e4m3fn; an int8 weight is made of"),
    "complex": ([], torch.complex64, r"mlp\.weight is torch\.complex64; an int8 weight is made of"),
    "bool": ([], torch.bool, r"mlp\.weight is torch\.bool; an int8 weight is made of"),
}


@pytest.mark.parametrize("name", AMBIGUOUS)
def test_what_could_be_two_things_is_refused(name):
    kept, dtype, text = AMBIGUOUS[name]
    state = int8().state_dict()
    state = {key: value for key, value in state.items() if key.removeprefix("mlp.") not in {*PARTS} - {*kept}}
    state["mlp.weight"] = torch.ones(40, 24).to(dtype)
    for assign in (False, True):
        model = int8(1)
        before = bits(model)
        with pytest.raises(RuntimeError, match=text):
            model.load_state_dict(state, strict=False, assign=assign)
        assert all(torch.equal(bits(model)[f"mlp.{part}"], before[f"mlp.{part}"]) for part in PARTS)
    state["mlp.weight"] = torch.full((40, 24), float("nan"))
    with pytest.raises(RuntimeError, match=r"mlp\.weight (has values from nan to nan|is torch\.float32)"):
        int8().load_state_dict({"mlp.weight": state["mlp.weight"]}, strict=False)


CAST = {
    "weight_q": ["torch.int64", "transposed", "parameter"],
    "weight_scale": ["torch.float16", "torch.bfloat16", "torch.float64", "parameter", "expanded"],
    "weight_zero": ["torch.int64", "expanded"],
}


def used(model):
    """A step forward, back and of the optimizer."""
    optimizer = APOLLOAdamW([{"params": [model["mlp"].weight], "rank": 4}])
    y = model["mlp"](drawn((6, 24), "x"))
    y.square().mean().backward()
    optimizer.step()
    return y.detach(), *(part.clone() for part in (model["mlp"].weight.q, model["mlp"].weight.scale))


def test_a_bfloat16_scale_is_cast(backend):
    """assign=True kept it, and the kernels read it as float32: ``free(): invalid size``."""
    model, twin = int8(1), int8(1)
    state = dict(int8().state_dict())
    state["mlp.weight_scale"] = state["mlp.weight_scale"].bfloat16()
    model.load_state_dict(state, assign=True)
    twin.load_state_dict(bits(model))
    assert model["mlp"].weight.scale.dtype == torch.float32
    assert all(torch.equal(*pair) for pair in zip(used(model), used(twin), strict=True))


@pytest.mark.parametrize("assign", [True, False])
def test_what_has_another_dtype_or_layout_is_cast(assign):
    for key, hows in CAST.items():
        for how in hows:
            model, state = int8(1), dict(int8().state_dict())
            state[f"mlp.{key}"] = SPOILS[how](state[f"mlp.{key}"])
            model.load_state_dict(state, assign=assign)
            weight = model["mlp"].weight
            assert (weight.q.dtype, weight.scale.dtype, weight.zero.dtype) == (torch.uint8, torch.float32, torch.uint8)
            for name, part in zip(PARTS, (weight.q, weight.scale, weight.zero), strict=True):
                assert torch.equal(part.double(), state[f"mlp.{name}"].double().reshape(part.shape))
                assert part.is_contiguous()
            used(model)


ANY = st.fixed_dictionaries({key: st.sampled_from(["kept", "kept", "gone", *SPOILS]) for key in PARTS})


@pytest.mark.slow
@settings(max_examples=60, deadline=None)
@given(ANY, st.sampled_from(["gone", "gone", "torch.uint8", "kept", *SPOILS]), st.booleans(), st.booleans())
def test_any_dictionary_is_loaded_or_refused(parts, plain, strict, assign):
    """Whatever is there: a RuntimeError and the weight as it was, or the saved weight, in a form that kernels read."""
    model, saved = int8(1), int8()
    before, state = bits(model), dict(saved.state_dict())
    for key, how in {**parts, "weight": plain}.items():
        name, value = f"mlp.{key}", state.pop(f"mlp.{key}", floats()["mlp"].weight.detach())
        if how != "gone":
            state[name] = value if how == "kept" else SPOILS.get(how, lambda value: value.to(torch.uint8))(value)
    faults = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of complex numbers, and of meta tensors
        try:
            model.load_state_dict(state, strict=strict, assign=assign)
        except RuntimeError as error:
            faults.append(str(error))
    assert all("mlp.weight" in fault for fault in faults)
    weight = model["mlp"].weight
    assert isinstance(weight, Int8Weight)
    weight.check()
    if weight.is_meta:
        assert assign
        return
    assert weight.dequantize().isfinite().all()
    after = [getattr(weight, part) for part in ("q", "scale", "zero")]
    old = [before[f"mlp.{name}"].reshape(part.shape) for name, part in zip(PARTS, after, strict=True)]
    if all(map(torch.equal, after, old)):
        return
    assert not faults
    values = [state.get(f"mlp.{name}") for name in PARTS]
    if isinstance(state.get("mlp.weight"), torch.Tensor) and state["mlp.weight"].is_floating_point():
        expected = Int8Weight.of(state["mlp.weight"], 8)
        values = [expected.q, expected.scale, expected.zero]
    elif values[0] is None:
        values[0] = state["mlp.weight"]
    for part, value in zip(after, values, strict=True):
        assert torch.equal(part.double(), value.double().reshape(part.shape))
