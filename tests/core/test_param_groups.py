"""Which weights ``apollo_param_groups`` makes low-rank: names as in the Trainer, and what always stays dense."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from apollo_triton import APOLLOAdamW, apollo_param_groups


def low_rank_names(model, **options):
    return apollo_param_groups(model, **options)[0]["param_names"]


@pytest.fixture(scope="module")
def llama():
    config = LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=64,
    )
    return LlamaForCausalLM(config)


LINEARS = [f"self_attn.{x}_proj" for x in "qkvo"] + [f"mlp.{x}_proj" for x in ("gate", "up", "down")]
ALL = [f"model.layers.{layer}.{name}.weight" for layer in range(2) for name in LINEARS]


def test_llama_by_default_and_by_every_kind_of_target(llama):
    assert low_rank_names(llama, rank=4) == ALL
    assert low_rank_names(llama, rank=4, target_modules="all-linear") == ALL  # not lm_head
    assert low_rank_names(llama, rank=4, target_modules="all_linear") == ALL
    only_q = [name for name in ALL if "q_proj" in name]
    assert low_rank_names(llama, rank=4, target_modules=["q_proj"]) == only_q
    assert low_rank_names(llama, rank=4, target_modules=r".*\.q_proj") == only_q
    assert low_rank_names(llama, rank=4, target_modules=[r".*\.[q]_proj"]) == only_q


def test_every_parameter_is_in_one_group(llama):
    groups = apollo_param_groups(llama, rank=4)
    parameters = [p for group in groups for p in group["params"]]
    assert len(parameters) == len({id(p) for p in parameters}) == len(list(llama.parameters()))
    names = dict(llama.named_parameters())
    for group in groups:
        assert all(names[name] is p for name, p in zip(group["param_names"], group["params"], strict=True))
    assert ["rank" in group for group in groups] == [True, False, False, False]
    assert [group["name"] for group in groups] == ["low-rank", "dense", "embeddings", "norms and biases"]
    assert [group["param_names"] for group in groups[1:3]] == [["lm_head.weight"], ["model.embed_tokens.weight"]]
    assert "model.norm.weight" in groups[3]["param_names"]


def test_narrow_weights_stay_dense_with_a_warning(llama):
    with pytest.warns(UserWarning, match=r"4 targeted weights are narrower than rank 20.*k_proj.weight \(width 16\)"):
        names = low_rank_names(llama, rank=20)
    assert names == [name for name in ALL if "k_proj" not in name and "v_proj" not in name]
    assert low_rank_names(llama, rank=20, proj_type="right") == ALL  # their other side is 32 wide


def test_experts_biases_embeddings_and_tied_heads():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate_up = nn.Parameter(torch.zeros(3, 16, 8))
            self.scales = nn.Parameter(torch.zeros(3))

    model = nn.ModuleDict(
        {
            "mlp": Experts(),
            "attn": nn.Linear(8, 8),
            "mlp_embedding": nn.Embedding(10, 8),
            "mlp_head": nn.Linear(8, 10, bias=False),
        }
    )
    model["mlp_head"].weight = model["mlp_embedding"].weight
    low_rank, embeddings, vectors = apollo_param_groups(model, rank=4)
    assert low_rank["param_names"] == ["mlp.gate_up", "attn.weight"]
    assert embeddings["param_names"] == ["mlp_embedding.weight"]
    assert vectors["param_names"] == ["mlp.scales", "attn.bias"]


def test_group_keys_reach_the_low_rank_group_alone():
    low_rank, dense = apollo_param_groups(nn.ModuleDict({"mlp": nn.Linear(8, 8)}), rank=2, scale=9.0, lr=0.5)
    assert (low_rank["scale"], low_rank["lr"], low_rank["rank"]) == (9.0, 0.5, 2)
    assert set(dense) == {"params", "param_names", "name", "weight_decay"}


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"target_modules": ["atn"]}, r"target_modules=\['atn'\]: no weight matches; .*'mlp'"),
        ({"target_modules": ["*mlp"]}, r"target_modules: '\*mlp' is no regular expression: nothing to repeat"),
        ({"rank": 100}, "the only targeted weight is narrower than rank 100"),
    ],
)
def test_nothing_to_do_is_an_error(options, text):
    with pytest.raises(ValueError, match=text):
        apollo_param_groups(nn.ModuleDict({"mlp": nn.Linear(8, 8)}), **options)


def test_a_model_without_a_dense_rest_has_one_group():
    groups = apollo_param_groups(nn.ModuleDict({"mlp": nn.Linear(8, 8, bias=False)}), rank=2)
    assert len(groups) == 1
    APOLLOAdamW(groups)


def test_one_dimensional_convolutions_are_not_taken_for_experts():
    model = nn.ModuleDict({"mlp": nn.Conv1d(16, 32, 3), "mlp2": nn.Conv2d(16, 32, 3)})
    low_rank, dense, vectors = apollo_param_groups(model, rank=4, target_modules=["mlp"])
    assert low_rank["param_names"] == ["mlp2.weight"]
    assert (dense["param_names"], vectors["param_names"]) == (["mlp.weight"], ["mlp.bias", "mlp2.bias"])


def test_narrow_weights_are_low_rank_where_the_group_allows_it():
    """The key read by the optimizer alone, after the weights have gone to the dense group."""
    model = nn.ModuleDict({"mlp": nn.Linear(8, 8, bias=False), "attn": nn.Linear(16, 16, bias=False)})
    [low_rank] = apollo_param_groups(model, rank=12, rank_above_width=True)
    optimizer = APOLLOAdamW([low_rank])
    assert optimizer.param_groups[0]["param_names"] == ["mlp.weight", "attn.weight"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rank": "16"}, "Invalid rank: '16' .allowed: an integer of 1 or more"),
        ({"rank": None}, "Invalid rank: None"),
        ({"proj_type": "foo"}, "Invalid proj_type: 'foo' .allowed: 'std'"),
        ({"target_modules": 5}, "Invalid target_modules: 5 .allowed: 'auto', 'all-linear', one regular"),
        ({"target_modules": ["mlp", 5]}, "Invalid target_modules: "),
        ({"target_modules": []}, r"Invalid target_modules: \[\] .allowed: "),
        ({"target_modules": None}, "Invalid target_modules: None .allowed: "),
        ({"target_modules": "Auto"}, r"'Auto' matches no module .*\(did you mean 'auto'\?\)"),
        ({"target_modules": ["all linear"]}, r"'all linear' matches no module .*\(did you mean 'all-linear'\?\)"),
        ({"target_modules": [nn.Sequential(nn.ReLU())]}, r"Invalid target_modules: \[Sequential.*ReLU.* .allowed"),
    ],
)
def test_wrong_arguments_are_named(options, text):
    model = nn.ModuleDict({"mlp": nn.Linear(8, 8)})
    with pytest.raises(ValueError, match=text):
        apollo_param_groups(model, **({"rank": 2} | options))
    with pytest.raises(TypeError, match=r"nn\.Module, not generator: give model in place of .*named_parameters\(\)"):
        apollo_param_groups(model.parameters(), rank=2)
