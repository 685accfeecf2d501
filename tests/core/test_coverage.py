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
from apollo_triton.core.coverage import NARROWEST, coverage_note

SMALL = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 64}
LLAMA = SMALL | {"intermediate_size": 128, "num_key_value_heads": 2, "head_dim": 16}
MOE = LLAMA | {"num_experts": 16, "num_local_experts": 16, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
ENCODER_DECODER = {
    "d_model": 64,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 128,
    "decoder_ffn_dim": 128,
    "vocab_size": 64,
}


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
    (text,) = warnings_of(make, model, **keys)
    assert re.search(r"1 targeted weights are .*narrow.* and stay dense: mlp.gate.weight \(width 1\)", text)


@pytest.mark.parametrize(
    ("model", "advice"), [(nn.Linear(16, 16), "all-linear"), (nn.Conv2d(16, 16, 3), ".*"), (nn.LSTM(16, 16), ".*")]
)
def test_a_model_of_one_layer_is_told_what_takes_it(model, advice):
    """It was told to give names such as '', the name of the model itself."""
    with pytest.raises(ValueError, match=f"no module; give target_modules='{re.escape(advice)}'$"):
        apollo_param_groups(model, rank=8)
    assert apollo_param_groups(model, rank=8, target_modules=advice)[0]["param_names"][0].startswith("weight")


def test_what_saves_no_state_stays_dense():
    """As many numbers of state as AdamW's at less precision: a rank of the whole width, and svd's stored P."""
    model = nn.ModuleDict({"mlp": nn.Linear(64, 16, bias=False), "attn": nn.Linear(64, 64, bias=False)})
    assert apollo_param_groups(model, rank=15)[0]["param_names"] == ["mlp.weight", "attn.weight"]
    with pytest.warns(UserWarning, match=r"so narrow that rank 16 saves no state and stay dense: mlp.weight"):
        assert apollo_param_groups(model, rank=16)[0]["param_names"] == ["attn.weight"]
    square = nn.ModuleDict({"mlp": nn.Linear(16, 16, bias=False), "attn": nn.Linear(64, 64, bias=False)})
    # svd: 2 * 16 * rank + 16 * rank numbers of state for 2 * 16 * 16, the same at rank 10.67
    assert apollo_param_groups(square, rank=10, proj="svd")[0]["param_names"] == ["mlp.weight", "attn.weight"]
    with pytest.warns(UserWarning, match=r"rank 11 saves no state and stay dense: mlp.weight"):
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


COVERED = {"llama": LLAMA, "qwen3": LLAMA, "gemma3_text": LLAMA, "mixtral": MOE, "qwen3_moe": MOE}
PARTLY = {
    "gpt_neox": SMALL | {"intermediate_size": 128},
    "falcon": SMALL,
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4, "vocab_size": 64},
    "vit": {key: value for key, value in SMALL.items() if key != "vocab_size"} | {"intermediate_size": 128},
    "bart": ENCODER_DECODER,
    "m2m_100": ENCODER_DECODER,
    "opt": SMALL | {"ffn_dim": 128, "word_embed_proj_dim": 64},
    "granitemoe": MOE,
}


def assert_advice_helps(model, text):
    """The targets that the warning names leave nothing out and are taken without another one."""
    (found,) = re.findall(r"target_modules=(\[[^]]*\]|'all-linear') makes them low-rank", text)
    targets = eval(found)
    options = {"rank": 8, "target_modules": targets}
    assert not [each for each in warnings_of(apollo_param_groups, model, **options) if "stay dense" not in each]
    dense = {name for group in apollo_param_groups(model, **options)[1:] for name in group["param_names"]}
    matrices = {name: p.numel() for name, p in model.named_parameters() if p.dim() > 1}
    counted = {name: n for name, n in matrices.items() if not re.search("embed|lm_head|shared.weight|bias", name)}
    assert sum(n for name, n in counted.items() if name in dense) < 0.01 * sum(counted.values())


@pytest.mark.parametrize("kind", COVERED)
def test_models_that_the_default_fits_are_silent(kind):
    model = meta_model(kind, COVERED[kind])
    assert not warnings_of(apollo_param_groups, model, rank=8)
    assert coverage_note(model, 8) == ""


@pytest.mark.parametrize("kind", PARTLY)
def test_a_large_share_that_stays_dense_is_named_with_what_to_pass(kind):
    """A run of which half has AdamW's state, unnoticed."""
    model = meta_model(kind, PARTLY[kind])
    (text,) = warnings_of(apollo_param_groups, model, rank=8)
    assert re.search(r"leaves \d+% of the elements of this model's matrices dense, .*\.weight|_proj", text)
    assert text == coverage_note(model, 8)
    assert_advice_helps(model, text)


@pytest.mark.parametrize("targets", ["all-linear", ["all_linear"]])
def test_fused_experts_are_named_under_all_linear(targets):
    model = meta_model("mixtral", MOE)
    (text,) = warnings_of(apollo_param_groups, model, rank=8, target_modules=targets)
    assert "not counted): model.layers.*.mlp.experts.gate_up_proj (2), " in text
    assert ".gate." not in text  # the router, of which the advice does not hold
    assert "target_modules=['all-linear', 'experts'] makes them low-rank" in text
    assert_advice_helps(model, text)


def test_torchs_transformer_has_linear_layers_outside_of_attention_and_the_other_way_round():
    model = nn.Module()
    model.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(32, 2, 64, batch_first=True), 2)
    model.embed = nn.Embedding(8, 32)
    for keys in ({}, {"target_modules": "all-linear"}):
        (text,) = warnings_of(apollo_param_groups, model, rank=8, **keys)
        assert "target_modules=['all-linear', 'self_attn'] makes them low-rank" in text
        assert_advice_helps(model, text)


def test_what_was_left_out_on_purpose_is_not_named():
    """A list of one's own is a choice, as are frozen weights. A head or an embedding is no matrix left out."""
    model = nn.ModuleDict({name: nn.Linear(16, 16) for name in ("attn", "mlp", "other", "lm_head")})
    (text,) = warnings_of(apollo_param_groups, model, rank=4)
    assert "leaves 33% of the elements" in text
    assert warnings_of(APOLLOAdamW.apollo, model, rank=4) == [text]
    assert not warnings_of(apollo_param_groups, model, rank=4, target_modules=["attn"])
    assert not warnings_of(apollo_param_groups, model, rank=4, target_modules="attn|mlp")
    model["other"].requires_grad_(False)
    assert not warnings_of(apollo_param_groups, model, rank=4)


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
    assert "all-linear" not in text
    assert "the model (Sequential) has no parameters" in text_of(nn.Sequential(), ["attn"])
    assert text_of(nn.Linear(16, 16), ["attn"]).endswith("; give target_modules='all-linear'")  # its name is ''
    narrow = nn.ModuleDict({"fc": nn.Linear(16, 16), "gate": nn.Linear(16, 1)})
    assert text_of(narrow, ["attn"], rank=64).endswith("such as 'fc', or 'all-linear', and a rank of at most 15")
    assert "give a rank of at most 15" in text_of(narrow, ["fc"], rank=64)
    assert "none of them can be low-rank" in text_of(narrow, ["gate"], rank=1)
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


def test_flattened_shards_are_called_that():
    """FSDP1 wrapped first: its parameters are vectors, under names that match."""
    model = nn.ModuleDict({"mlp": nn.Linear(16, 16)})
    model["mlp"].weight = nn.Parameter(torch.zeros(256))
    model["mlp"].weight._fsdp_flattened = True
    assert "mlp.weight is a flattened FSDP shard: its rows and columns are gone" in text_of(model, ["mlp"])
