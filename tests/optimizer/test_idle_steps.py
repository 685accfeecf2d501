"""Steps that would train nothing: an optimizer whose parameters are not the model's any more says so."""

from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from apollo_triton import APOLLOAdamW, attach_layerwise, dequantize_model, quantize_model


def make_model():
    torch.manual_seed(0)
    return nn.ModuleDict({"mlp": nn.Linear(128, 8), "head": nn.Linear(128, 128, bias=False)})


def optimizer_of(model):
    named = [*model.named_parameters()]
    matrices, vectors = ([each for each in named if (each[1].dim() > 1) == is_matrix] for is_matrix in (True, False))
    return APOLLOAdamW([{"params": matrices, "rank": 2}, *([{"params": vectors}] if vectors else [])])


def flat(optimizer):
    """Copies of all weights, those of int8 as they lie in memory, and of their state."""
    found = {}
    for index, parameter in enumerate(p for group in optimizer.param_groups for p in group["params"]):
        weight = getattr(parameter, "q", parameter)
        found |= {(index, "weight"): weight.detach().clone()}
        found |= {(index, name): torch.as_tensor(value).clone() for name, value in optimizer.state[parameter].items()}
    return found


def backward(model):
    model["mlp"](model["head"](torch.ones(2, 128))).square().sum().backward()


CONVERSIONS = {
    "quantize_model": (make_model, quantize_model),
    "dequantize_model": (lambda: quantize_model(make_model()), dequantize_model),
}
TEXT = (
    r"parameter 0 \('mlp.weight'\).*{0} has replaced 1 of this optimizer's 3 parameters.*make the optimizer after {0}"
)


# quantize_model refuses layers that have hooks.
@pytest.mark.parametrize(
    ("conversion", "gradients"),
    [("quantize_model", "kept"), *(("dequantize_model", gradients) for gradients in ("kept", "freed", "none"))],
)
def test_an_optimizer_from_before_a_conversion_is_refused(conversion, gradients):
    """It stepped and trained nothing of what the model holds. The rest of the model has gradients and does not move."""
    make, convert = CONVERSIONS[conversion]
    model = make()
    optimizer = optimizer_of(model)
    if gradients != "kept":
        attach_layerwise(model, optimizer, gradients=gradients)
    backward(model)
    optimizer.step()
    optimizer.zero_grad()
    convert(model)
    if gradients == "kept":
        backward(model)
    before = flat(optimizer)
    for _ in range(2):
        with pytest.raises(ValueError, match=TEXT.format(conversion)):
            optimizer.step()
    after = flat(optimizer)
    assert all(torch.equal(value, after[name]) for name, value in before.items())
    groups = [{"params": [model["mlp"].weight], "rank": 2}, {"params": [model["mlp"].bias]}]
    APOLLOAdamW(groups).step()  # one that was made after it is not


@pytest.mark.parametrize("conversion", CONVERSIONS)
def test_a_gradient_from_before_the_conversion_is_no_sign_of_life(conversion):
    """The new weight shared it with the old one, so that the optimizer went on to train what no model holds."""
    make, convert = CONVERSIONS[conversion]
    model = make()
    optimizer = optimizer_of(model)
    backward(model)
    optimizer.step()
    convert(model)  # without zero_grad()
    assert model["mlp"].weight.grad is not None
    backward(model)
    with pytest.raises(ValueError, match=TEXT.format(conversion)):
        optimizer.step()


@pytest.mark.parametrize("gradients", ["freed", "none"])
def test_such_an_optimizer_cannot_be_attached(gradients):
    model = make_model()
    optimizer = optimizer_of(model)
    quantize_model(model)
    with pytest.raises(ValueError, match=r"not in the model: parameter 0 .* of the .* quantize_model has replaced"):
        attach_layerwise(model, optimizer, gradients=gradients)


def test_a_list_of_what_is_not_in_the_model_is_short():
    """A 7B model has 291 of them."""
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(40)])
    optimizer = optimizer_of(model)
    with pytest.raises(
        ValueError, match="and 77 more of the optimizer's 80 parameters; give attach_layerwise"
    ) as error:
        attach_layerwise(nn.Linear(4, 4), optimizer)
    assert str(error.value).count("parameter ") == 3


def test_what_a_conversion_leaves_in_use_is_no_error():
    """A weight that another model shares, unconverted; frozen base weights beside adapters."""
    shared = nn.Linear(128, 8, bias=False)
    base, other = nn.ModuleDict({"mlp": shared}), nn.ModuleDict({"attn": shared})
    optimizer = optimizer_of(other)
    quantize_model(base)
    for _ in range(3):
        before = shared.weight.detach().clone()
        other["attn"](torch.ones(1, 128)).sum().backward()
        optimizer.step()
        assert not torch.equal(shared.weight, before)
        optimizer.zero_grad()
    attach_layerwise(other, optimizer)
    for _ in range(2):
        other["attn"](torch.ones(1, 128)).sum().backward()
        optimizer.step()

    frozen = nn.ModuleDict({"mlp": nn.Linear(128, 8, bias=False), "adapter": nn.Linear(128, 8)})
    frozen["mlp"].requires_grad_(False)
    optimizer = APOLLOAdamW(frozen.parameters())
    quantize_model(frozen, target_modules=["mlp"])
    (frozen["mlp"](torch.ones(1, 128)) + frozen["adapter"](torch.ones(1, 128))).sum().backward()
    optimizer.step()


def replaced(model):
    for layer in model.values():
        for name, parameter in [*layer.named_parameters()]:
            setattr(layer, name, nn.Parameter(parameter.detach().clone()))


def frozen_for_adapters(model):
    model.requires_grad_(False)
    model["mlp"].adapter = nn.Parameter(torch.ones(8))


def assigned(model):
    model.load_state_dict({name: value.clone() for name, value in model.state_dict().items()}, assign=True)


def overwritten(model):
    """What ``to`` does to some backends' tensors, and to all under this switch."""
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    try:
        model.to(torch.float32)
    finally:
        torch.__future__.set_overwrite_module_params_on_conversion(False)


@pytest.mark.parametrize("layer_wise", [False, True])
@pytest.mark.parametrize("change", [replaced, frozen_for_adapters, assigned, overwritten])
def test_parameters_that_never_get_a_gradient_are_noticed_once(change, layer_wise):
    """``fully_shard``, LoRA, ``load_state_dict(assign=True)`` after the optimizer was made: it stepped for ever, and
    trained nothing."""
    model = make_model()
    optimizer = optimizer_of(model)
    if layer_wise:
        attach_layerwise(model, optimizer)
    change(model)
    seen = []
    for _ in range(4):
        (model["mlp"](model["head"](torch.ones(2, 128))) * getattr(model["mlp"], "adapter", 1)).sum().backward()
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            optimizer.step()
        seen.append([str(each.message) for each in caught])
        assert all(each.filename == __file__ for each in caught)
    assert [len(each) for each in seen] == [0, 1, 0, 0]
    frozen = 3 if change is frozen_for_adapters else 0
    assert f"no gradient in any of its 3 parameters ({frozen} of them frozen), now 2 times in a row" in seen[1][0]
    assert "make the optimizer after that" in seen[1][0]


def schedulers_idiom(model, optimizer):
    scheduler = torch.optim.lr_scheduler.LinearLR(optimizer)
    optimizer.step()
    scheduler.step()
    for _ in range(3):
        backward(model)
        optimizer.step()


def scaled(model, optimizer):
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0)
    for step in range(4):
        optimizer.zero_grad()
        scaler.scale(
            (model["mlp"](model["head"](torch.ones(2, 128))) * (torch.inf if step < 3 else 1)).sum()
        ).backward()
        scaler.step(optimizer)
        scaler.update()


def closures(model, optimizer):
    def closure():
        optimizer.zero_grad()
        backward(model)

    for _ in range(3):
        optimizer.step(closure)


def layer_wise(model, optimizer, gradients="freed"):
    with attach_layerwise(model, optimizer, gradients=gradients) as handle:
        for _ in range(4):
            if gradients == "freed":
                with handle.accumulate():
                    backward(model)
            backward(model)
            optimizer.step()


def without_gradient(model, optimizer):
    layer_wise(model, optimizer, "none")


def pauses(model, optimizer):
    """A GAN's other half, a stage of a curriculum: there were gradients, and there will be."""
    backward(model)
    optimizer.step()
    optimizer.zero_grad()
    for _ in range(3):
        optimizer.step()


def nothing_to_train(model, optimizer):
    empty = APOLLOAdamW([{"params": []}])
    for _ in range(3):
        empty.step()


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize(
    "use", [schedulers_idiom, scaled, closures, layer_wise, without_gradient, pauses, nothing_to_train]
)
def test_no_false_alarm(use):
    model = make_model()
    use(model, optimizer_of(model))
