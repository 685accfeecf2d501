"""Checkpoints of int8 models: their keys, and what other programs make of them."""

from __future__ import annotations

import warnings

import pytest
import torch
from int8_models import PARTS, bits, drawn, floats, int8, same
from torch import nn

from apollo_triton import APOLLOAdamW, dequantize_model, quantize_model
from apollo_triton.int8.weight import Int8Weight


def with_old_names(state):
    """As version 0.1 wrote them: the codes under the name of the weight."""
    return {name.removesuffix("_q") if name.endswith("weight_q") else name: value for name, value in state.items()}


def test_a_float_model_reports_what_an_int8_checkpoint_lacks():
    """Codes under the name ``weight``: they were copied into it as floats of 0 to 255."""
    state = int8().state_dict()
    assert [name for name in state if name.startswith("mlp")] == ["mlp.bias", *(f"mlp.{part}" for part in PARTS)]
    model, start = floats(), bits(floats())
    with pytest.raises(RuntimeError, match=r'Missing key\(s\) in state_dict: "mlp\.weight"'):
        model.load_state_dict(state)
    result = model.load_state_dict(state, strict=False)
    assert result.missing_keys == ["mlp.weight"]
    assert set(result.unexpected_keys) == {f"mlp.{part}" for part in PARTS}
    assert torch.equal(model["mlp"].weight, start["mlp.weight"])


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("names", [dict, with_old_names], ids=["new", "old"])
def test_an_int8_model_loads_both_names(names, assign):
    model, saved = int8(1), int8()
    model["mlp"].weight.requires_grad_(False)
    result = model.load_state_dict(names(saved.state_dict()), assign=assign)
    assert not result.missing_keys
    assert not result.unexpected_keys
    assert same(bits(model), bits(saved))
    assert not model["mlp"].weight.requires_grad
    layer = int8(1)["mlp"]
    layer.load_state_dict(names(saved["mlp"].state_dict()), assign=assign)  # of a layer alone, without a prefix
    assert same(bits(layer), bits(saved["mlp"]))


# Written at commit c7fe0b9, when values were divided by the scale to be rounded: a layer of normal weights, to whose
# rows 0, 4 and -4 were added, in groups of 8, after three stochastic steps of Mini.
DIVIDED = {
    "weight_q": (
        [133, 0, 255, 58, 104, 165, 46, 46],
        [174, 255, 252, 208, 189, 182, 224, 194],
        [53, 101, 141, 225, 0, 16, 153, 43],
    ),
    "weight_scale": ("0x1.a68c5ep-8", "0x1.3f7cecp-6", "0x1.5d9e72p-6"),
    "weight_zero": (51, 0, 255),
}
# What ``dequantize`` gave then.
DIVIDED_FLOATS = (
    "0x1.0eb1ecp-1 -0x1.50b7dap-2 0x1.50b7dap+0 0x1.71bad2p-5 0x1.5dec3ep-2 0x1.785504p-1 -0x1.0817bap-5 "
    "-0x1.0817bap-5",
    "0x1.b24dd0p+1 0x1.3e3d70p+2 0x1.3a7ef8p+2 0x1.039580p+2 0x1.d7be74p+1 0x1.c645a0p+1 0x1.178d4ep+2 0x1.e43956p+1",
    "-0x1.13df06p+2 -0x1.a4a2a2p+1 -0x1.37611ep+1 -0x1.47c48ap-1 -0x1.5c40d4p+2 -0x1.4666ecp+2 -0x1.169a42p+1 "
    "-0x1.218736p+2",
)


def test_a_checkpoint_of_the_old_rounding_is_the_same_weights():
    """Another meaning of codes, scales or zero points: all checkpoints would be other weights, without an error."""
    state = {
        "weight_q": torch.tensor(DIVIDED["weight_q"], dtype=torch.uint8),
        "weight_scale": torch.tensor([float.fromhex(each) for each in DIVIDED["weight_scale"]]),
        "weight_zero": torch.tensor(DIVIDED["weight_zero"], dtype=torch.uint8),
    }
    model = quantize_model(nn.ModuleDict({"mlp": nn.Linear(8, 3, bias=False)}), group_size=8)
    model["mlp"].load_state_dict(state)
    expected = torch.tensor([[float.fromhex(each) for each in row.split()] for row in DIVIDED_FLOATS])
    assert torch.equal(model["mlp"].weight.dequantize(), expected)
    saved = {name: part.reshape(state[name].shape) for name, part in bits(model["mlp"]).items()}
    assert same(saved, state)  # whose scales and zero points had one dimension


@pytest.mark.parametrize("swaps", [False, True])
@pytest.mark.parametrize("assign", [False, True])
def test_a_float_weight_is_rounded_and_never_takes_the_place_of_the_int8_one(assign, swaps):
    """Under assign=True it did, and state_dict() then failed with a bare AssertionError."""
    state = floats(dtype=torch.bfloat16 if assign else torch.float32).state_dict()
    model = int8(1)
    before = torch.__future__.get_swap_module_params_on_conversion()
    torch.__future__.set_swap_module_params_on_conversion(swaps)
    try:
        model.load_state_dict(state, assign=assign)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(before)
    weight = model["mlp"].weight
    assert isinstance(weight, Int8Weight)
    assert isinstance(weight, nn.Parameter)
    assert weight.dtype == state["mlp.weight"].dtype  # assign keeps the checkpoint's
    expected = Int8Weight.of(state["mlp.weight"], 8)
    assert all(torch.equal(getattr(weight, part), getattr(expected, part)) for part in ("q", "scale", "zero"))


def test_a_float_weight_that_someone_has_put_in_its_place_is_saved_and_loaded_as_one():
    model = int8()
    model["mlp"].weight = nn.Parameter(drawn((40, 24), "w"))
    assert type(model.state_dict()["mlp.weight"]) is torch.Tensor
    assert "int8" not in repr(model["mlp"])
    model.load_state_dict(floats().state_dict())
    assert torch.equal(model["mlp"].weight, floats()["mlp"].weight)
    assert torch.equal(dequantize_model(model)["mlp"].weight, floats()["mlp"].weight)


def test_the_parts_may_come_in_several_files_and_in_any_order():
    """A file boundary of save_pretrained between codes and scales: the weight came with another's scales."""
    saved = int8()
    for order in (PARTS, PARTS[::-1]):
        model, start = int8(1), bits(int8(1))
        for key in order:
            assert same(bits(model), start), "a part came with the others of another weight"
            name = f"mlp.{key}"
            result = model.load_state_dict({name: saved.state_dict()[name]}, strict=False)
            if key != order[-1]:
                assert set(result.missing_keys) == {*start} - {name}
        assert not any("mlp.weight" in name for name in result.missing_keys)
        assert all(torch.equal(bits(model)[f"mlp.{key}"], bits(saved)[f"mlp.{key}"]) for key in PARTS)
    first = {"mlp.weight_q": int8(2).state_dict()["mlp.weight_q"]}
    model.load_state_dict(first, strict=False)  # of a checkpoint whose other files never come
    model.load_state_dict(int8(3).state_dict())
    assert same(bits(model), bits(int8(3)))


def test_other_groups_are_rounded_anew_with_a_warning_and_taken_over_by_assign():
    saved = int8(group_size=16)
    model = int8(1)
    with pytest.warns(
        UserWarning, match=r"groups of 16 and the model's 8, .* quantize_model\(group_size=16\)"
    ) as caught:
        model.load_state_dict(saved.state_dict())
    assert caught[0].filename == __file__
    expected = Int8Weight.of(saved["mlp"].weight.dequantize(), 8)
    assert torch.equal(model["mlp"].weight.q, expected.q)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model.load_state_dict(saved.state_dict(), assign=True)
    assert model["mlp"].weight.group_size == 16
    assert same(bits(model), bits(saved))


@pytest.mark.slow
def test_torch_distributed_checkpoint_finds_what_it_looks_up():
    """Keys that are no attributes of the layer; gradients that zeros_like made as int8 weights without parts."""
    from torch.distributed.checkpoint import state_dict as checkpoint

    saved = int8()

    def optimizer_of(model):
        rest = [model["mlp"].bias, *model["head"].parameters()]
        return APOLLOAdamW([{"params": [model["mlp"].weight], "rank": 4}, {"params": rest}])

    assert type(torch.zeros_like(saved["mlp"].weight)) is torch.Tensor
    before = bits(saved)
    states = checkpoint.get_state_dict(saved, optimizer_of(saved))
    assert same(bits(saved), before)
    model = int8(1)
    checkpoint.set_state_dict(model, optimizer_of(model), model_state_dict=states[0], optim_state_dict=states[1])
    assert same(bits(model), before)
    options = checkpoint.StateDictOptions(full_state_dict=True)
    model = int8(1)
    checkpoint.set_model_state_dict(model, checkpoint.get_model_state_dict(saved, options=options), options=options)
    assert same(bits(model), before)
