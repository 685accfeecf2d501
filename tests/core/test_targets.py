"""Which modules ``target_modules`` names: heads under every name, "all-linear" in a list, Conv1D, and biases."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    GptOssConfig,
    GptOssForCausalLM,
    RobertaConfig,
    RobertaForSequenceClassification,
)

from apollo_triton import apollo_param_groups, quantize_model
from apollo_triton.core.module_names import is_head_name
from apollo_triton.int8.layers import Int8Linear

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 64, "vocab_size": 50}
HEADS = [
    "lm_head",
    "base_model.model.lm_head.modules_to_save.default",  # PEFT
    "_fsdp_wrapped_module.lm_head._checkpoint_wrapped_module",
    "lm_heads.3",
    "classifier.dense",  # RoBERTa
    "classifier.6",  # torchvision
    "cls.predictions.decoder",  # BERT
    "classification_head.out_proj",  # BART
    "v_head.summary",  # trl
    "model.mtp.layers.0.shared_head.head",  # DeepSeek
    "output",  # torchtune
    "output._orig_mod",
    "decoder.output.modules_to_save.adapter",
    "qa_outputs",
    "1.head",  # of an nn.Sequential
    "heads.head",  # torchvision's vision transformer
    "decoder.net.to_logits",  # x-transformers
    "decoder.output_projection",  # fairseq
]
NOT_HEADS = [
    "encoder.layer.0.attention.output.dense",  # BERT
    "encoder.layer.0.output.dense",
    "encoder.layer.0.output",
    "attention.output",
    "multi_head_attention.q",
    "blocks.0.multi_head.q",
    "blocks.1.sa.heads.0.key",
    "blocks.1.sa.head.key",
    "layers.0.attn.score",
    "attention_head.query",
    "output_layers.0.dense",
    "headline",
    "subclassifier",
]


def linear_names(model, **options):
    names = apollo_param_groups(model, rank=4, target_modules="all-linear", **options)[0]["param_names"]
    return {name.removesuffix(".weight") for name in names}


@pytest.mark.parametrize(("names", "are_heads"), [(HEADS, True), (NOT_HEADS, False)], ids=["heads", "others"])
def test_a_head_is_known_by_a_name_anywhere_in_its_path(names, are_heads):
    """The last part of the path alone, which PEFT's and RoBERTa's heads lack; a part of a name, as in multi_head."""
    assert {name for name in names if is_head_name(name) is are_heads} == set(names)


def nested(paths):
    """A module with an nn.Linear at each dotted path."""
    model = nn.Module()
    for path in paths:
        at = model
        *parents, last = path.split(".")
        for part in parents:
            if not hasattr(at, part):
                at.add_module(part, nn.Module())
            at = getattr(at, part)
        at.add_module(last, nn.Linear(16, 16, bias=False))
    return model


def test_heads_stay_dense_and_float_and_others_do_not():
    """quantize_model with a rule of its own."""
    others = [name for name in NOT_HEADS if name != "encoder.layer.0.output"]  # is a Module here
    model = nested([*HEADS[:1], *HEADS[1:10], *others])
    assert linear_names(model) == set(others)
    quantize_model(model, "all-linear", group_size=16)
    assert {name for name, module in model.named_modules() if isinstance(module, Int8Linear)} == set(others)


def test_heads_of_transformers_models_whatever_they_are_called():
    """``get_output_embeddings`` not asked: a head of another name, in a model within a wrapper."""
    bert = BertForMaskedLM(BertConfig(**SMALL, tie_word_embeddings=False))
    bert.cls.predictions.decoder.weight = nn.Parameter(bert.cls.predictions.decoder.weight.detach().clone())
    names = linear_names(bert)
    assert all(name.startswith("bert.encoder.layer.") for name in names)
    assert len(names) == 2 * 6  # q, k, v, attention.output.dense, intermediate.dense, output.dense
    roberta = RobertaForSequenceClassification(RobertaConfig(**SMALL))
    assert linear_names(roberta) == {name.replace("bert.", "roberta.") for name in names}

    class Speaker(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.to_words = nn.Linear(16, 16), nn.Linear(16, 50)

        def get_output_embeddings(self):
            return self.to_words

    assert linear_names(nn.ModuleDict({"speaker": Speaker()})) == {"speaker.inner"}


@pytest.mark.parametrize("found", [None, NotImplementedError(), "itself", [nn.Linear(8, 8)]])
def test_a_model_that_names_no_head_is_taken_as_it_is(found):
    class Silent(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Linear(16, 16)

        def get_output_embeddings(self):
            if isinstance(found, Exception):
                raise found
            return self if found == "itself" else found

    assert linear_names(Silent()) == {"inner"}


def test_all_linear_takes_the_conv1d_of_transformers_and_may_stand_in_a_list():
    """GPT-2 trained densely under "all-linear", since its layers are no nn.Linear."""
    model = GPT2LMHeadModel(GPT2Config(n_embd=32, n_layer=1, n_head=2, vocab_size=50, n_positions=16))
    names = {f"transformer.h.0.{name}" for name in ("attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj")}
    assert linear_names(model) == names
    both = nn.ModuleDict({"a": nn.Linear(16, 16), "experts": nn.Linear(16, 16), "lm_head": nn.Linear(16, 16)})
    assert linear_names(both) == {"a", "experts"}
    for spelling in ("all-linear", "all_linear"):
        groups = apollo_param_groups(both, rank=4, target_modules=[spelling])
        assert groups[0]["param_names"] == ["a.weight", "experts.weight"]
    groups = apollo_param_groups(both, rank=4, target_modules=["all-linear", "lm_head"])
    assert groups[0]["param_names"] == ["a.weight", "experts.weight", "lm_head.weight"]  # named, so meant


def test_biases_of_any_shape_stay_dense():
    """gpt-oss' biases of experts, ``[experts, n]``, and tables of relative positions, taken for matrices."""
    config = GptOssConfig(
        **SMALL, num_key_value_heads=2, head_dim=16, num_local_experts=16, layer_types=["full_attention"] * 2
    )
    low_rank, *_, vectors = apollo_param_groups(GptOssForCausalLM(config), rank=4)
    assert not [name for name in low_rank["param_names"] if "bias" in name]
    assert {"model.layers.0.mlp.experts.gate_up_proj_bias", "model.layers.1.mlp.experts.down_proj_bias"} <= set(
        vectors["param_names"]
    )
    attention = nn.MultiheadAttention(16, 2, add_bias_kv=True)
    attention.rel_pos_bias = nn.Linear(32, 16, bias=False)  # LayoutLMv3's
    for name in ("relative_position_bias_table", "attention_biases", "pos_bias_u"):
        attention.register_parameter(name, nn.Parameter(torch.zeros(16, 16)))
    attention.register_parameter("unbiased_weight", nn.Parameter(torch.zeros(16, 16)))
    names = apollo_param_groups(nn.ModuleDict({"attn": attention}), rank=4)[0]["param_names"]
    assert names == ["attn.in_proj_weight", "attn.unbiased_weight", "attn.out_proj.weight"]
