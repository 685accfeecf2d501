"""``quantize_model``: what it refuses before anything changes, what it keeps, what it says of what stays float."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from int8_models import floats
from torch import nn
from torch.nn.utils import parametrizations, prune, remove_weight_norm, spectral_norm, weight_norm

from apollo_triton import APOLLOAdamW, attach_layerwise, dequantize_model, quantize_model
from apollo_triton.int8.layers import Int8Linear
from apollo_triton.int8.weight import Int8Weight


def net():
    """A layer that can be converted before one to be spoiled."""
    return nn.ModuleDict({"attn": nn.Linear(24, 40), "mlp": nn.Linear(24, 40)})


def spoils(text):
    return lambda spoil: OBSTACLES.append(pytest.param(spoil, text, id=spoil.__name__))


OBSTACLES = []


@spoils(
    r"mlp cannot become int8: its weight is computed by torch\.nn\.utils\.prune; .*prune\.remove\(module, 'weight'\)"
)
def pruned(model):
    prune.random_unstructured(model["mlp"], "weight", 0.5)


@spoils(r"its bias is computed by torch\.nn\.utils\.prune; .*prune\.remove\(module, 'bias'\)")
def pruned_bias(model):
    prune.random_unstructured(model["mlp"], "bias", 0.5)


@spoils(r"computed by torch\.nn\.utils\.weight_norm; torch\.nn\.utils\.remove_weight_norm\(module\)")
def weight_normed(model):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        weight_norm(model["mlp"])


@spoils(r"computed by torch\.nn\.utils\.spectral_norm; torch\.nn\.utils\.remove_spectral_norm\(module\)")
def spectral_normed(model):
    spectral_norm(model["mlp"])


@spoils("its weight is no parameter of its own")
def of_another_module(model):
    weight = model["mlp"].weight
    del model["mlp"].weight
    model["mlp"].weight = weight.detach()


@spoils("it holds lora beside weight and bias")
def more_parameters(model):
    model["mlp"].lora = nn.Parameter(torch.zeros(3))


@spoils("it holds mask beside weight and bias")
def more_buffers(model):
    model["mlp"].register_buffer("mask", torch.zeros(3))


@spoils("it holds adapter beside weight and bias")
def more_modules(model):
    model["mlp"].adapter = nn.Linear(2, 2)


@spoils("its forward was replaced by a function")
def another_forward(model):
    model["mlp"].forward = lambda x: x


@spoils(r"mlp cannot become int8: accelerate runs its forward; .*remove_hook_from_module")
def dispatched(model):
    hooks = pytest.importorskip("accelerate.hooks")
    hooks.add_hook_to_module(model["mlp"], hooks.ModelHook())


@spoils(
    "attn cannot become int8: its weight has gradient hooks, .* before what registers them, such as attach_layerwise"
)
def layerwise(model):
    model.kept = [attach_layerwise(model, APOLLOAdamW.mini(model))]


@spoils("attn cannot become int8: its forward was replaced by a LinearForward, .* such as attach_layerwise")
def without_gradients(model):
    model.kept = [attach_layerwise(model, APOLLOAdamW.mini(model), gradients="none")]


@spoils("its weight is a Quantized, and int8 weights are made of plain parameters")
def of_another_class(model):
    class Quantized(nn.Parameter):
        pass

    model["mlp"].weight = Quantized(torch.zeros(40, 24))


@spoils(r"its weight has strides \(0, 1\), so that elements share memory")
def expanded(model):
    model["mlp"].weight = nn.Parameter(torch.zeros(1, 24).expand(40, 24))


@spoils("its weight has layout torch.sparse_coo")
def sparse(model):
    model["mlp"].weight = nn.Parameter(torch.zeros(40, 24).to_sparse())


@spoils(r"attn\.weight and mlp\.weight share memory and are two tensors")
def tied_by_memory(model):
    model["mlp"].weight = nn.Parameter(model["attn"].weight.data)


@spoils(r"attn\.weight and table\.buffer share memory")
def seen_by_a_buffer(model):
    model["table"] = nn.Module()
    model["table"].register_buffer("buffer", model["attn"].weight.data[3:])


@spoils(r"mlp\.weight is shared with table\.weight, which is not converted")
def tied_to_an_embedding(model):
    model["table"] = nn.Embedding(40, 24)
    model["table"].weight = model["mlp"].weight
    return {"target_modules": ["mlp"]}


@spoils(r"mlp\.weight has NaN or infinite values")
def not_a_number(model):
    model["mlp"].weight.data[3, 3] = float("nan")


@spoils(r"mlp\.weight has NaN or infinite values")
def infinite(model):
    model["mlp"].weight.data[3, 3] = float("-inf")


@spoils(r"mlp\.weight has NaN or infinite values")
def beyond_float32(model):
    model["mlp"].double().weight.data[3, 3] = 1e300


@spoils(r"mlp\.weight is torch\.float8_e4m3fn \(40, 24\); int8 weights are made of matrices of float32")
def float8(model):
    model["mlp"].to(torch.float8_e4m3fn)


@spoils(r"mlp\.weight is torch\.int32 \(40, 24\); int8 weights are made of matrices of float32")
def integers(model):
    model["mlp"].weight = nn.Parameter(torch.zeros(40, 24, dtype=torch.int32), requires_grad=False)


@spoils(r"mlp\.weight is torch\.float32 \(0,\)")
def left_by_zero3(model):
    model["mlp"].weight = nn.Parameter(torch.zeros(0))


@spoils("mlp is a LazyLinear without weights; run a batch")
def lazy(model):
    model["mlp"] = nn.LazyLinear(40)


@spoils(r"group_size=7 does not divide the 960 elements of attn\.weight")
def group_size(model):
    return {"group_size": 7}


@spoils(r"Invalid group_size: '8' .allowed: an integer of 1 or more")
def group_size_as_text(model):
    return {"group_size": "8"}


@spoils(r"target_modules=\['tt'\], a list, takes substrings; give substrings")
def part_of_a_name_outside_a_list(model):
    return {"target_modules": "tt"}


@pytest.mark.parametrize(("spoil", "text"), OBSTACLES)
def test_what_would_break_or_be_lost_is_refused_by_name_before_anything_changes(spoil, text):
    """A pruned layer lost its mask and failed at the next forward; hooks, adapters and ties were gone."""
    model = net()
    keys = spoil(model) or {}
    before = dict(model.named_modules())
    with pytest.raises(ValueError, match=text):
        quantize_model(model, **({"group_size": 8} | keys))
    assert dict(model.named_modules()) == before


def test_a_misspelt_entry_of_a_list_is_named():
    """The layers that it was meant for stayed float, and a reader of the memory wondered why."""
    model = net()
    with pytest.warns(UserWarning, match=r"no module matches 'mpl'; the other entries are used") as caught:
        quantize_model(model, target_modules=["attn", "mpl"], group_size=8)
    assert [each.filename for each in caught] == [__file__]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_model(model, target_modules=["attn", "mlp"], group_size=8)  # int8 already is no reason to warn


def test_an_entry_that_makes_nothing_int8_is_named():
    """Fused experts that were named, and stayed float in silence beside much attention; a misspelt "auto"."""
    model = nn.ModuleDict({"attn": nn.Linear(240, 400), "experts": Experts(), "norm": nn.LayerNorm(24)})
    with pytest.warns(UserWarning, match="the other entries are used") as caught:
        quantize_model(model, target_modules=["attn", "experts", "norm", "Auto"], group_size=8)
    texts = [str(each.message).removeprefix("target_modules=['attn', 'experts', 'norm', 'Auto']: ") for each in caught]
    assert texts == [
        "'experts' names no nn.Linear, and nothing else becomes int8, such as 'experts' (Experts); the other entries "
        "are used",
        "'norm' names no nn.Linear, and nothing else becomes int8, such as 'norm' (LayerNorm); the other entries are "
        "used",
        "no module matches 'Auto' (did you mean 'auto'?); the other entries are used",
    ]


@pytest.mark.parametrize("targets", ["auto", "all-linear", ["auto", "lm_head"]])
def test_what_is_taken_whatever_it_is_called(targets):
    """Names of the layers that the old default did not match, and a head that is tied to its embedding: refused."""
    layers = {name: nn.Linear(24, 24) for name in ("fc1", "query_key_value", "to_out")}
    model = nn.ModuleDict({"embed_tokens": nn.Embedding(24, 24), **layers, "lm_head": nn.Linear(24, 24, bias=False)})
    if isinstance(targets, str):
        model["lm_head"].weight = model["embed_tokens"].weight
    quantize_model(model, targets, group_size=8)
    expected = [*layers, *([] if isinstance(targets, str) else ["lm_head"])]
    assert [name for name, each in model.items() if isinstance(each, Int8Linear)] == expected


def test_after_the_advice_it_works():
    model = net()
    prune.random_unstructured(model["attn"], "weight", 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        weight_norm(model["mlp"])
    prune.remove(model["attn"], "weight")
    remove_weight_norm(model["mlp"])
    x = torch.ones(2, 24)
    expected = model["attn"](x)
    quantize_model(model, group_size=8)
    assert (model["attn"](x) - expected).abs().max() < 0.2
    assert (model["attn"].weight.dequantize() == 0).double().mean() >= 0.5


def test_odd_weights_that_can_be_converted_are():
    """Transposed in memory, on the meta device, made in inference mode, sharing a buffer without a common element."""
    flat = torch.randn(2 * 960, generator=torch.Generator().manual_seed(0))
    with torch.inference_mode():
        model = nn.ModuleDict({"mlp": nn.ModuleList([nn.Linear(24, 40) for _ in range(4)])})
        model["mlp"][0].weight = nn.Parameter(flat[:960].view(24, 40).T)
        model["mlp"][1].weight = nn.Parameter(flat[960:].view(40, 24))
        model["mlp"][2].to("meta")
        start = copy.deepcopy([layer.weight for layer in model["mlp"]])
        quantize_model(model, group_size=8)
    for layer, weight in zip(model["mlp"], start, strict=True):
        layer.weight.check()
        assert not layer.weight.q.is_inference()
        if not weight.is_meta:
            assert torch.equal(layer.weight.q, Int8Weight.of(weight, 8).q)


def test_what_a_user_has_set_stays():
    """Attributes of layers and weights, gradients, hooks of layers; not a compiled forward of the old layer."""
    model = net()
    layer = model["mlp"]
    layer.tag, layer.weight.decays, layer.weight.grad = "mine", False, torch.ones(40, 24)
    layer.compile(backend="eager")
    for convert, kind in ((quantize_model, Int8Linear), (dequantize_model, nn.Linear)):
        convert(model, **({"group_size": 8} if convert is quantize_model else {}))
        new = model["mlp"]
        assert type(new) is kind
        assert (new.tag, new.weight.decays, float(new.weight.grad.sum())) == ("mine", False, 960)
        new.weight.data.copy_(torch.zeros(40, 24))
        assert torch.equal(new(torch.ones(2, 24)), new.bias.expand(2, 40))  # not with the old layer's weight
        assert not hasattr(new.weight, "q") or kind is Int8Linear


def test_a_second_call_converts_the_rest_and_says_what_is_int8_already():
    model = quantize_model(net(), ["attn"], group_size=8)
    first = model["attn"]
    quantize_model(model, group_size=8)
    assert model["attn"] is first
    assert isinstance(model["mlp"], Int8Linear)
    with pytest.raises(ValueError, match=r"the 2 layers that it names are int8 already, such as 'attn'$"):
        quantize_model(model, group_size=8)
    model["other"] = nn.Linear(4, 4)
    with pytest.raises(ValueError, match=r"are int8 already, such as 'mlp'; for the others give .* such as 'other'"):
        quantize_model(model, ["mlp"])


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.zeros(4, 24, 40))


NO_MATCH = {
    "names": (net, ["q_proj"], r"no nn\.Linear of the model matches; give .* such as 'attn', 'mlp', or 'auto'$"),
    "another class": (
        lambda: nn.ModuleDict({"mlp": Experts(), "other": nn.Linear(4, 4), "lm_head": nn.Linear(4, 4)}),
        ["mlp"],
        r"names no nn\.Linear, and nothing else becomes int8, such as 'mlp' \(Experts\); give .* as 'other', or",
    ),
    "a head": (
        lambda: nn.ModuleDict({"mlp": Experts(), "lm_head": nn.Linear(4, 4)}),
        "all-linear",
        r"no nn\.Linear of the model matches; the model \(ModuleDict\) has no nn\.Linear other than its head$",
    ),
    "no linear": (lambda: nn.ModuleDict({"mlp": Experts()}), ["mlp"], r"the model \(ModuleDict\) has no nn\.Linear$"),
    "empty": (
        nn.ModuleDict,
        ["mlp"],
        r"no nn\.Linear of the model matches; the model \(ModuleDict\) has no nn\.Linear$",
    ),
    "itself": (lambda: nn.Linear(16, 16), "all-linear", r"the model is itself an nn\.Linear, .* put it into a module"),
}


@pytest.mark.parametrize("name", NO_MATCH)
def test_no_match_says_why_and_what_would_match(name):
    make, targets, text = NO_MATCH[name]
    with pytest.raises(ValueError, match=text):
        quantize_model(make(), targets)
    with pytest.raises(TypeError, match=r"an nn\.Module, not dict"):
        quantize_model({"mlp": nn.Linear(16, 16)})
    with pytest.raises(ValueError, match="the model is itself an Int8Linear"):
        dequantize_model(quantize_model(net(), group_size=8)["mlp"])


def test_matrices_that_stay_float_are_named_once():
    """Experts of Mixtral in one tensor: attention alone was converted, a small part of the model, in silence."""
    layers = [
        nn.ModuleDict({"attn": nn.Linear(24, 40), "mlp": nn.ModuleDict({"experts": Experts()})}) for _ in range(2)
    ]
    model = nn.ModuleDict({"embed_tokens": nn.Embedding(999, 24), "layers": nn.ModuleList(layers),
                           "lm_head": nn.Linear(24, 999)})  # fmt: skip
    with pytest.warns(UserWarning, match="leaves 80%") as caught:
        quantize_model(model, group_size=8)
    (warning,) = caught
    assert warning.filename == __file__
    # Of each layer 960 are int8 and 4 * 24 * 40 = 3840 are not.
    assert str(warning.message).startswith(
        "target_modules='auto' leaves 80% of the elements of this model's matrices in floats (embeddings and "
        "head not counted): layers.*.mlp.experts.gate_up_proj (2); only nn.Linear layers become int8"
    )


QUIET = {
    "the default": (net, {}),
    "a choice": (lambda: nn.ModuleDict({**net(), "other": nn.Linear(99, 99)}), {"target_modules": ["mlp"]}),
    "the head": (floats, {"target_modules": "head"}),
    "all but the head": (
        lambda: nn.ModuleDict({**net(), "lm_head": nn.Linear(99, 99)}),
        {"target_modules": "all-linear"},
    ),
    "biases": (lambda: nn.ModuleDict({**net(), "bias": nn.ParameterDict({"bias": torch.zeros(99, 99)})}), {}),
}


@pytest.mark.parametrize("name", QUIET)
def test_no_false_alarm(name):
    make, keys = QUIET[name]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        quantize_model(make(), **({"group_size": 8} | keys))


def test_a_parametrized_layer_stays_as_it_is_and_is_named():
    """Its class is no nn.Linear any more, so it works as before."""
    model = net()
    parametrizations.weight_norm(model["mlp"])
    with pytest.warns(UserWarning, match=r"leaves 51% .* mlp\.parametrizations\.weight\.original0"):
        quantize_model(model, group_size=8)
    assert isinstance(model["attn"], Int8Linear)
    model["mlp"](torch.ones(2, 24)).sum().backward()


def test_what_the_default_converts_the_factories_train():
    """A gate of one output, and a key projection as wide as the rank, which the factories left dense, as they leave
    float ones: a ValueError, since AdamW does not train int8 weights."""
    sizes = {"q": 128, "k": 16, "gate": 1}
    model = nn.ModuleDict({"attn": nn.ModuleDict({name: nn.Linear(128, rows) for name, rows in sizes.items()})})
    quantize_model(model)
    assert [name for name, each in model["attn"].items() if isinstance(each, Int8Linear)] == ["q", "k"]
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".* put what is narrow")
        warnings.filterwarnings("ignore", message="1 targeted weights are .*gate.weight")
        for optimizer in (APOLLOAdamW.mini(model), APOLLOAdamW.apollo(model, rank=16)):
            assert optimizer.param_groups[0]["param_names"] == ["attn.q.weight", "attn.k.weight"]
            model["attn"]["k"](torch.ones(2, 128)).sum().backward()
            optimizer.step()
