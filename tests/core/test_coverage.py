"""What stays dense and is said: weights that low rank suits badly, large shares, and targets that match nothing."""

from __future__ import annotations

import math
import re

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from warned import warnings_of

from apollo_triton import APOLLOAdamW, apollo_param_groups, projection_matrix
from apollo_triton.core.coverage import NARROWEST

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
LLAMA = SMALL | {"intermediate_size": 128, "num_key_value_heads": 2, "head_dim": 16}
MOE = LLAMA | {"num_experts": 16, "num_local_experts": 16, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
KINDS = {"llama": LLAMA, "gpt_neox": SMALL | {"intermediate_size": 128}, "qwen3_moe": MOE}


def meta_model(kind, keys):
    config = AutoConfig.for_model(kind, pad_token_id=0, **keys)
    with torch.device("meta"):
        causal = type(config) in transformers.MODEL_FOR_CAUSAL_LM_MAPPING
        return (AutoModelForCausalLM if causal else AutoModel).from_config(config)


# --- weights that low rank suits badly


@pytest.mark.parametrize("make", [APOLLOAdamW.mini, APOLLOAdamW.apollo, apollo_param_groups])
def test_a_layer_of_one_output_stays_dense_and_is_named(make):
    """Mini steps it by one over a normal number: for one seed in seven over 50 times as far as AdamW."""
    model = nn.ModuleDict({"mlp": nn.ModuleDict({"gate": nn.Linear(64, 1), "up": nn.Linear(64, 64)})})
    keys = {} if make == APOLLOAdamW.mini else {"rank": 4}
    (text,) = warnings_of(make, model, **keys, target_modules=["mlp"])
    assert re.search(r"1 targeted weight is .*narrow.* and stays dense: mlp.gate.weight \(width 1\)", text)
    assert not warnings_of(make, model, **keys)  # "auto" leaves out gates; 1.5 % of the elements are no surprise


@pytest.mark.parametrize(
    ("model", "names"), [(nn.Linear(16, 16), ["weight"]), (nn.LSTM(16, 16), ["weight_ih_l0", "weight_hh_l0"])]
)
def test_a_model_may_be_one_layer(model, names):
    """Its name is "", in which no entry is a substring."""
    assert apollo_param_groups(model, rank=8)[0]["param_names"] == names
    convolution = nn.Conv2d(16, 16, 3)
    with pytest.raises(ValueError, match=r"; tables and convolutions .* named; give target_modules='\.\*'$"):
        apollo_param_groups(convolution, rank=8)
    assert apollo_param_groups(convolution, rank=8, target_modules=".*")[0]["param_names"] == ["weight"]


def test_what_saves_no_state_stays_dense():
    """As many numbers of state as AdamW's at less precision: a rank of the whole width, and svd's stored P."""
    model = nn.ModuleDict({"mlp": nn.Linear(64, 16, bias=False), "attn": nn.Linear(64, 64, bias=False)})
    assert apollo_param_groups(model, rank=15)[0]["param_names"] == ["mlp.weight", "attn.weight"]
    with pytest.warns(UserWarning, match=r"so narrow that rank 16 saves no state and stays dense: mlp.weight"):
        assert apollo_param_groups(model, rank=16)[0]["param_names"] == ["attn.weight"]
    square = nn.ModuleDict({"mlp": nn.Linear(16, 16, bias=False), "attn": nn.Linear(40, 40, bias=False)})
    # svd: 2 * 16 * rank + 16 * rank numbers of state for 2 * 16 * 16, the same at rank 10.67
    assert apollo_param_groups(square, rank=10, proj="svd")[0]["param_names"] == ["mlp.weight", "attn.weight"]
    with pytest.warns(UserWarning, match=r"rank 11 saves no state and stays dense: mlp.weight"):
        assert apollo_param_groups(square, rank=11, proj="svd")[0]["param_names"] == ["attn.weight"]
    everything = apollo_param_groups(model, rank=16, rank_above_width=True)[0]["param_names"]
    assert everything == ["mlp.weight", "attn.weight"]


def test_the_line_is_where_a_projection_finds_the_gradient():
    """Share of seeds whose first Mini update of a random gradient is over 50 times AdamW's, and that it is none from
    the line on: sqrt(128) * |G| / (|G p| * sqrt(width)) with p normal, which is 1 / |p| at a width of 1, and there over
    50 with a chance of 18 %."""

    def share(width, seeds=200):
        gradients = torch.randn(seeds, 64, width, generator=torch.Generator().manual_seed(0))
        p = torch.stack([projection_matrix(seed, 0, 1, width)[0] for seed in range(seeds)])
        found = torch.einsum("scw,sw->sc", gradients, p).norm(dim=1)
        ratios = math.sqrt(128 / width) * gradients.flatten(1).norm(dim=1) / found
        return (ratios > 50).float().mean().item()

    assert share(1) > 0.1
    assert share(NARROWEST) == 0


@pytest.mark.parametrize(
    ("shape", "keys", "text"),
    [
        ((1, 64), {"rank": 1}, r"parameter 0 \('w'\) of shape \(1, 64\) is so narrow that rank 1 saves no state"),
        ((64, 2), {"rank": 1}, r"shape \(64, 2\) is narrower than 8"),
        ((2, 64, 1), {"rank": 1}, "saves no state"),
        ((64, 16), {"rank": 16}, "rank 16 saves no state"),
        ((64, 16), {"rank": 15}, None),
        ((64, 1), {"rank": 8, "proj_type": "left"}, None),  # projects the longer side
        ((64, 1), {"rank": 1, "rank_above_width": True}, None),
        ((64,), {"rank": 1}, "only parameters of fewer than two dimensions, so nothing in it is low-rank"),
    ],
)
def test_a_group_of_ones_own_with_such_a_weight_warns(shape, keys, text):
    found = warnings_of(APOLLOAdamW, [{"params": [("w", nn.Parameter(torch.zeros(shape)))], **keys}])
    assert len(found) == (text is not None)
    assert text is None or re.search(text, found[0])


def test_several_narrow_weights_are_one_warning():
    (text,) = warnings_of(APOLLOAdamW, [{"params": [nn.Parameter(torch.zeros(64, 1)) for _ in range(5)], "rank": 1}])
    assert "and 4 more of the group are too narrow" in text


# --- large shares


def assert_advice_helps(model, text):
    """The targets that the warning names leave nothing out and are taken without another one."""
    (found,) = re.findall(r"target_modules=(\[[^]]*\]|'auto') makes them low-rank", text)
    options = {"rank": 8, "target_modules": eval(found)}
    assert not warnings_of(apollo_param_groups, model, **options)
    low_rank = set(apollo_param_groups(model, **options)[0]["param_names"])
    matrices = {name: p.numel() for name, p in model.named_parameters() if p.dim() > 1}
    counted = {name: n for name, n in matrices.items() if not re.search("embed|head|bias", name)}
    assert sum(n for name, n in counted.items() if name not in low_rank) < 0.01 * sum(counted.values())


@pytest.mark.parametrize("kind", KINDS)
def test_transformers_of_every_family_are_silent(kind):
    """A warning of routers and gates, which are left out on purpose, or one of what "auto" takes."""
    model = meta_model(kind, KINDS[kind])
    assert not warnings_of(apollo_param_groups, model, rank=8)


@pytest.mark.parametrize("targets", ["all-linear", ["all_linear"]])
def test_fused_experts_are_named_under_all_linear(targets):
    """A run of which nearly all has AdamW's state, unnoticed."""
    model = meta_model("mixtral", MOE)
    (text,) = warnings_of(apollo_param_groups, model, rank=8, target_modules=targets)
    assert re.search(r"leaves 9\d% of the elements of this model's matrices dense", text)
    assert "not counted): model.layers.*.mlp.experts.gate_up_proj (2), " in text
    assert ".gate." not in text  # the router, of which the advice does not hold
    assert_advice_helps(model, text)


def test_convolutions_and_tables_are_named_under_auto():
    """A convolutional network of which the last layer is low-rank, unnoticed."""
    layers = {"features": nn.Conv2d(16, 64, 3), "slots": nn.ParameterDict({"start": torch.zeros(64, 32)})}
    model = nn.ModuleDict({**layers, "fc": nn.Linear(64, 16), "head": nn.Linear(64, 64)})
    (text,) = warnings_of(apollo_param_groups, model, rank=8)
    # 9216 of the convolution and 2048 of the slots, beside 1024 of fc
    assert "target_modules='auto' leaves 92% of the elements" in text
    assert "features.weight, slots.start; target_modules=['auto', 'features', 'slots'] makes" in text
    assert_advice_helps(model, text)
    model["features"].requires_grad_(False)
    model["slots"].requires_grad_(False)
    assert not warnings_of(apollo_param_groups, model, rank=8)
    model.register_parameter("queries", nn.Parameter(torch.zeros(64, 32)))  # of the model itself, which has no name
    (text,) = warnings_of(APOLLOAdamW.apollo, model, rank=8)
    assert text.endswith("not counted): queries; groups of your own make them low-rank, and a list of your own is "
                         "taken as it is")  # fmt: skip


def test_a_large_share_that_is_too_narrow_is_named_under_auto():
    """Adapters of rank 8, all of whose matrices are narrow, beside frozen ones that are not."""
    model = nn.ModuleDict({"base": nn.Linear(64, 64), "lora_A": nn.Linear(64, 8), "lora_B": nn.Linear(8, 64)})
    model["base"].requires_grad_(False)
    (text,) = warnings_of(apollo_param_groups, model, rank=16)
    assert text == (
        "2 targeted weights are narrower than rank 16 and stay dense: lora_A.weight (width 8), lora_B.weight (width 8)"
    )
    model["base"].requires_grad_(True)  # they are 1024 of 5120 elements
    assert warnings_of(apollo_param_groups, model, rank=16) == [text]
    model["base"] = nn.Linear(256, 256)  # and 1024 of 66560
    assert not warnings_of(apollo_param_groups, model, rank=16)


def test_what_was_left_out_on_purpose_is_not_named():
    """A list of one's own is a choice."""
    model = nn.ModuleDict({name: nn.Linear(16, 16) for name in ("attn", "mlp", "other", "lm_head")})
    assert not warnings_of(apollo_param_groups, model, rank=4, target_modules=["attn"])
    assert not warnings_of(apollo_param_groups, model, rank=4, target_modules="attn|mlp")
    assert not warnings_of(apollo_param_groups, model, rank=4, target_modules=["auto", "lm_head"])


# --- what matches nothing


def text_of(model, targets, rank=4):
    with pytest.raises(ValueError, match="target_modules=") as caught:
        apollo_param_groups(model, rank=rank, target_modules=targets)
    return str(caught.value)


def test_a_lone_string_that_would_match_as_a_substring():
    model = nn.ModuleDict(
        {"h": nn.ModuleList([nn.ModuleDict({"c_attn": nn.Linear(16, 16), "c_fc": nn.Linear(16, 16)})])}
    )
    text = text_of(model, "c_attn")
    assert "'c_attn' matches no module" in text
    assert "target_modules=['c_attn'], a list, takes substrings and matches 'h.0.c_attn'" in text
    assert "target_modules=['c_attn', 'c_fc']" in text_of(model, "c_attn,c_fc")
    assert "a list, takes" not in text_of(model, "nothing")


def test_only_what_would_work_for_this_model_is_suggested():
    """ "all-linear" for a model without a linear layer, names of layers that are too narrow, a rank that none has."""
    convolution = nn.Sequential(nn.Conv2d(16, 16, 3), nn.Embedding(4, 4))
    assert text_of(convolution, ["attn"]).endswith("names such as '0'")
    embedding = nn.ModuleDict({"attn": nn.Embedding(16, 16), "norm": nn.LayerNorm(16)})
    text = text_of(embedding, ["attn"])
    assert "'attn' matches 'attn.weight', an embedding or tied to one, and embeddings stay dense" in text
    assert "no matrix that could be low-rank" in text
    assert "auto" not in text
    assert "there are no parameters" in text_of(nn.Sequential(), ["attn"])
    assert text_of(nn.Linear(16, 16), ["attn"]).endswith("; give target_modules='auto'")  # its name is ''
    narrow = nn.ModuleDict({"fc": nn.Linear(16, 16), "gate": nn.Linear(16, 1)})
    assert text_of(narrow, ["attn"], rank=64).endswith("such as 'fc', or 'auto', and a rank of at most 15")
    assert "give a rank of at most 15" in text_of(narrow, ["fc"], rank=64)
    assert "it cannot be low-rank; train it with torch.optim.AdamW" in text_of(narrow, ["gate"], rank=1)
    # the rank that is named works
    assert apollo_param_groups(narrow, rank=15, target_modules=["fc"])[0]["param_names"] == ["fc.weight"]


def test_what_an_entry_matches_is_said_where_it_makes_nothing_low_rank():
    model = nn.ModuleDict({"embed_tokens": nn.Embedding(32, 16), "fc": nn.Linear(16, 16), "lm_head": nn.Linear(16, 32)})
    model["lm_head"].weight = model["embed_tokens"].weight
    model["norm"] = nn.LayerNorm(16)
    assert "'embed_tokens.weight', an embedding" in text_of(model, ["embed_tokens"])
    assert "'lm_head.weight', an embedding or tied to one" in text_of(model, ["lm_head"])
    assert "'norm' matches 'norm', which has no matrix of its own" in text_of(model, ["norm"])
    assert "'fc.weight' is in the names of parameters alone" in text_of(model, ["fc.weight"])
    found = warnings_of(apollo_param_groups, model, rank=4, target_modules=["fc", "lm_head", "nope"])
    assert len(found) == 2
    assert "'lm_head' matches 'lm_head.weight', an embedding or tied to one" in found[0]
    assert "'nope' matches no module" in found[1]


def test_a_lazy_module_is_named():
    """A RuntimeError of torch, "Can't access the shape of an uninitialized parameter", which names none."""
    model = nn.ModuleDict({"fc": nn.LazyLinear(16), "mlp": nn.Linear(16, 16)})
    with pytest.raises(ValueError, match=r"fc\.weight is a lazy module's, without a shape; run a batch"):
        apollo_param_groups(model, rank=4)
    model["fc"](torch.zeros(1, 16))
    assert apollo_param_groups(model, rank=4)[0]["param_names"] == ["fc.weight", "mlp.weight"]


def test_flattened_shards_are_called_that():
    """FSDP1 wrapped first: its parameters are vectors, under names that match."""
    model = nn.ModuleDict({"mlp": nn.Linear(16, 16)})
    model["mlp"].weight = nn.Parameter(torch.zeros(256))
    model["mlp"].weight._fsdp_flattened = True
    assert "mlp.weight is a flattened FSDP shard: its rows and columns are gone" in text_of(model, ["mlp"])
