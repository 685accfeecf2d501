"""What each parameter is: compared with what PyTorch multiplies when a model runs, and under every wrapper's names."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoConfig, AutoModel, LlamaConfig, LlamaForCausalLM
from warned import warnings_of

from apollo_triton import apollo_param_groups
from apollo_triton.core.coverage import coverage
from apollo_triton.core.coverage_notes import no_match, notes
from apollo_triton.core.kinds import CONVOLUTION_1D, EMBEDDING, HEAD, MATRIX, OTHER, VECTOR, has_token_rows, weights_of
from apollo_triton.core.targets import Targets

# --- what PyTorch multiplies

TEXT = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96, "intermediate_size": 128}
GROUPED = TEXT | {"num_key_value_heads": 2, "head_dim": 16}
MOE = GROUPED | {"num_experts": 4, "num_local_experts": 4, "moe_intermediate_size": 32, "num_experts_per_tok": 2}
IMAGE = {key: value for key, value in TEXT.items() if key != "vocab_size"} | {"image_size": 32, "patch_size": 8}
BART = {"d_model": 64, "encoder_layers": 1, "decoder_layers": 1, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128}
BART |= {"encoder_attention_heads": 2, "decoder_attention_heads": 2, "vocab_size": 96}
DBRX = {"d_model": 64, "n_heads": 4, "n_layers": 1, "vocab_size": 96}
DBRX |= {"ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2}}
DBRX |= {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}}
SOUND = {"conv_dim": [32] * 2, "conv_kernel": [4, 4], "conv_stride": [2, 2], "num_conv_pos_embeddings": 16}
SAM = {"global_attn_indexes": [1], "window_size": 2, "output_channels": 32, "mlp_dim": 128}

IDS = torch.arange(48).reshape(2, 24)
PIXELS = {"pixel_values": torch.linspace(-1, 1, 3 * 32 * 32).reshape(1, 3, 32, 32)}
# The bug that each is for.
MODELS = {
    "gpt_oss": (MOE | {"layer_types": ["full_attention"] * 2}, {}),  # biases [experts, n] taken for matrices
    "dbrx": (DBRX, {}),  # two-dimensional tensors of experts not taken, one of them called v1
    "mamba": (TEXT | {"state_size": 16}, {}),  # A_log, two-dimensional, and the 1-D convolution taken
    "cohere": (GROUPED | {"use_qk_norm": True}, {}),  # the norm of queries, [heads, n], taken
    "siglip_vision_model": (IMAGE, PIXELS),  # an nn.MultiheadAttention that is called "head" not taken
    "wav2vec2": (TEXT | SOUND | {"num_conv_pos_embedding_groups": 4}, {"input_values": torch.ones(1, 400)}),
    "sam_vision_model": (IMAGE | SAM, PIXELS),  # tables of relative positions taken
}
MORE = {
    "llama": (GROUPED, {}),
    "qwen3_moe": (MOE, {}),
    "jetmoe": (MOE | {"kv_channels": 16}, {}),
    "granitemoe": (MOE, {}),
    "mamba2": (TEXT | {"num_heads": 8, "head_dim": 16, "n_groups": 1}, {}),
    "rwkv": ({"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 96, "attention_hidden_size": 64}, {}),
    "recurrent_gemma": (GROUPED | {"lru_width": 64, "block_types": ["recurrent", "attention"]}, {}),
    "bert": (TEXT, {}),
    "convbert": (TEXT | {"embedding_size": 64, "num_groups": 2}, {}),
    "deberta-v2": (TEXT | {"relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8}, {}),
    "t5": ({"d_model": 64, "d_kv": 16, "d_ff": 128, "num_layers": 1, "num_heads": 4, "vocab_size": 96},
           {"input_ids": IDS, "decoder_input_ids": IDS}),
    "bart": (BART, {}),
    "vit": (IMAGE, PIXELS),
    "swin": ({"image_size": 32, "embed_dim": 32, "depths": [1, 1], "num_heads": [2, 4], "window_size": 4}, PIXELS),
    "convnext": ({"image_size": 32, "hidden_sizes": [16, 32, 32, 64], "depths": [1] * 4}, PIXELS),
    "perceiver": ({"num_latents": 8, "d_latents": 64, "d_model": 64, "num_blocks": 1, "num_self_attends_per_block": 1,
                   "num_self_attention_heads": 4, "num_cross_attention_heads": 4}, {"inputs": torch.ones(1, 10, 64)}),
}  # fmt: skip


OPERANDS = {"mm": (0, 1), "bmm": (0, 1), "mv": (0,), "_grouped_mm": (0, 1), "addmm": (1, 2), "baddbmm": (1, 2)}


class Products(TorchDispatchMode):
    """Records the addresses of what enters a matrix product, of tensors and their views."""

    def __init__(self):
        super().__init__()
        self.addresses = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        for position in OPERANDS.get(func.overloadpacket.__name__, ()):
            self.addresses.add(args[position].untyped_storage().data_ptr())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", [*MODELS, *(pytest.param(name, marks=pytest.mark.full) for name in MORE)])
def test_a_matrix_is_what_enters_a_matrix_product(name):
    """A rule that fits names of some models, and takes a table of another for a matrix, or leaves one out."""
    keys, inputs = (MODELS | MORE)[name]
    config = AutoConfig.for_model(name, **keys)
    model = AutoModel.from_config(config, attn_implementation="eager").float().eval()
    with Products() as products:
        model(**(inputs or {"input_ids": IDS}))
    inner = [each for each in weights_of(model) if each.tensor.dim() > 1 and each.kind not in (EMBEDDING, HEAD)]
    multiplied = {each.name for each in inner if each.tensor.untyped_storage().data_ptr() in products.addresses}
    assert {each.name for each in inner if each.kind == MATRIX} == multiplied
    from_names = {each.name for each in weights_of(model.named_parameters()) if each.kind == MATRIX}
    assert from_names == multiplied


# --- names


def kinds(model):
    return {weight.name: weight.kind for weight in weights_of(model)}


class Tower(nn.Module):
    """A block under a name that may be an embedding's or a head's."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.ModuleDict({"fc": nn.Linear(16, 16, bias=False)})])


def test_a_tower_within_an_embedding_or_a_classifier_has_blocks():
    """Phi-3-vision's tower below `vision_embed_tokens`, a classifier that is a whole BERT, and SigLIP's `head`, which
    pools by attention: all dense."""
    model = nn.ModuleDict({"vision_embed_tokens": Tower(), "classifier": Tower(), "patch_embed": nn.Linear(16, 16)})
    model["embeds"] = nn.ModuleList([nn.Linear(16, 16, bias=False)])
    model["head"] = nn.ModuleDict({"attention": nn.Linear(16, 16, bias=False), "out": nn.Linear(16, 16, bias=False)})
    expected = {"head.attention.weight": MATRIX, "head.out.weight": HEAD}
    expected |= {"patch_embed.weight": EMBEDDING, "patch_embed.bias": VECTOR, "embeds.0.weight": EMBEDDING}
    for tower in ("vision_embed_tokens", "classifier"):
        expected[f"{tower}.layers.0.fc.weight"] = MATRIX
    assert kinds(model) == expected
    assert kinds(model.named_parameters()) == expected


def test_what_the_model_says_of_its_embeddings():
    """Only the output was asked: a first layer of another name, and a head that is tied to it, were low-rank."""

    class Speaker(nn.Module):
        def __init__(self):
            super().__init__()
            self.frames, self.inner, self.words = (nn.Linear(16, 16, bias=False) for _ in range(3))
            self.words.weight = self.frames.weight

        def get_input_embeddings(self):
            return self.frames

    model = nn.ModuleDict({"speaker": Speaker()})
    assert kinds(model) == {
        "speaker.frames.weight": EMBEDDING,
        "speaker.inner.weight": MATRIX,
        "speaker.words.weight": EMBEDDING,
    }
    assert apollo_param_groups(model, rank=4)[0]["param_names"] == ["speaker.inner.weight"]


def test_tensors_that_only_look_like_matrices():
    """A class token that decays as a matrix does, a norm over two dimensions, tables and kernels made low-rank; a table
    of biases that is an embedding of a model and a bias by its name, so that checkpoints do not fit."""
    model = nn.Module()
    model.norm = nn.LayerNorm([16, 16])
    model.conv = nn.Conv1d(16, 16, 16)
    model.image = nn.Conv2d(16, 16, 3, bias=False)
    model.table = nn.EmbeddingBag(16, 16)
    model.relative_attention_bias = nn.Embedding(32, 16)  # T5's
    shapes = {
        "token": (1, 1, 16),
        "A_log": (16, 16),
        "A_logs": (2, 16, 16),
        "slots": (1, 16, 16),
        "w1": (16, 16),
        "w_grid": (2, 2, 16, 16),
    }
    for name, shape in shapes.items():
        model.register_parameter(name, nn.Parameter(torch.zeros(shape)))
    assert kinds(model) == {
        "token": VECTOR,
        "A_log": OTHER,
        "A_logs": OTHER,  # Zamba's, one for each head
        "slots": OTHER,
        "w1": MATRIX,
        "w_grid": OTHER,
        "norm.weight": VECTOR,
        "norm.bias": VECTOR,
        "conv.weight": CONVOLUTION_1D,
        "conv.bias": VECTOR,
        "image.weight": OTHER,
        "table.weight": EMBEDDING,
        "relative_attention_bias.weight": VECTOR,
    }
    bias = [("relative_attention_bias.weight", model.relative_attention_bias.weight)]
    assert [weight.kind for weight in weights_of(bias)] == [VECTOR]  # the groups of a model are those of its names


def test_a_parametrization_leaves_a_parameter_what_it_was():
    """The kernel of a normed 1-D convolution, [64, 16, 16], taken for experts."""
    model = nn.ModuleDict({"conv": nn.Conv1d(16, 64, 16), "fc": nn.Linear(16, 32)})
    for layer in model.values():
        parametrizations.weight_norm(layer)
    found = kinds(model)
    assert found["conv.parametrizations.weight.original1"] == CONVOLUTION_1D
    assert found["fc.parametrizations.weight.original1"] == MATRIX
    assert [name for name, kind in kinds(model.named_parameters()).items() if kind == MATRIX] == [
        name for name, kind in found.items() if kind == MATRIX
    ]


def test_a_shared_weight_has_its_first_name():
    """The last name of Zamba's shared block, which no checkpoint and no `named_parameters()` has."""
    model = nn.ModuleDict({name: nn.Linear(16, 16, bias=False) for name in ("first", "second")})
    model["second"].weight = model["first"].weight
    for targets in ("auto", ["first", "second"]):
        assert [*coverage(model, Targets(model, targets), 4, {}).low_rank.values()] == ["first.weight"]
    assert [*coverage(model, Targets(model, ["second"]), 4, {}).low_rank.values()] == ["second.weight"]


PREFIXES = {
    "DDP": ("module.", ""),
    "torch.compile": ("_orig_mod.", ""),
    "FSDP1": ("_fsdp_wrapped_module.", ""),
    "PEFT": ("base_model.model.", ""),
    "checkpointing": ("", "_checkpoint_wrapped_module."),
    "LoRA's base": ("", "base_layer."),
}


@pytest.mark.parametrize("wrapper", PREFIXES)
def test_wrappers_change_no_kind(wrapper):
    """The head of a wrapped nn.Sequential, `module.2.head`, taken for one of attention."""
    before, within = PREFIXES[wrapper]
    names = {"embed_tokens": EMBEDDING, "layers.0.mlp.up": MATRIX, "1.head": HEAD, "lm_head": HEAD, "output": HEAD}
    named = [(f"{before}{name}.{within}weight", nn.Parameter(torch.zeros(16, 16))) for name in names]
    assert [weight.kind for weight in weights_of(named)] == [*names.values()]


@pytest.fixture(scope="module")
def llama():
    keys = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**keys, num_hidden_layers=2, vocab_size=64))


def test_a_model_in_a_wrapper_is_asked_for_its_heads(llama):
    """`get_output_embeddings` of the wrapper alone, which has none."""
    plain = apollo_param_groups(llama, rank=4)[0]["param_names"]
    names = apollo_param_groups(nn.DataParallel(llama), rank=4)[0]["param_names"]
    assert [name.removeprefix("module.") for name in names] == plain


# --- named parameters without a model


def of_names(llama, targets, rank=4):
    named = list(llama.named_parameters())
    chosen = Targets(named, targets)
    return chosen, coverage(named, chosen, rank, {})


@pytest.mark.parametrize("targets", ["auto", "all-linear", ["self_attn", "mlp"], ["auto", "lm_head"], r".*\.q_proj"])
def test_named_parameters_are_split_as_their_model_is(llama, targets):
    """Rules that only a model's modules answer."""
    chosen, found = of_names(llama, targets)
    expected = apollo_param_groups(llama, rank=4, target_modules=targets)[0]["param_names"]
    assert list(found.low_rank.values()) == expected
    assert notes(chosen, found) == []


def test_a_wrong_entry_is_named_without_a_model_too(llama):
    """Layers that were meant, dense in silence."""
    chosen, found = of_names(llama, ["mpl", "mlp", "embed_tokens", "Auto", "norm"])
    texts = notes(chosen, found)
    assert [text.removeprefix(f"target_modules={chosen.given!r}: ") for text in texts] == [
        "'mpl' matches no module that has parameters; the other entries are used",
        "'embed_tokens' matches 'model.embed_tokens.weight', an embedding or tied to one, and embeddings stay dense; "
        "the other entries are used",
        "'Auto' matches no module that has parameters (did you mean 'auto'?); the other entries are used",
        "'norm' matches 'model.layers.0.input_layernorm', which has no matrix of its own; the other entries are used",
    ]
    chosen, found = of_names(llama, "q_proj")
    text = no_match(chosen, 4, {}, found)
    assert "a list, takes substrings and matches 'model.layers.0.self_attn.q_proj'" in text
    assert text.endswith("or 'auto'")


def test_auto_in_a_list_is_auto_and_the_rest(llama):
    """A list of one's own, of which "auto" is a substring of no name."""
    plain = apollo_param_groups(llama, rank=4)[0]["param_names"]
    assert not warnings_of(apollo_param_groups, llama, rank=4, target_modules=["auto", "lm_head"])
    both = apollo_param_groups(llama, rank=4, target_modules=["auto", "lm_head"])[0]["param_names"]
    assert both == [*plain, "lm_head.weight"]


@pytest.mark.parametrize(
    ("name", "shape", "expected"),
    [
        ("model.embed_tokens.weight", (9, 4), True),
        ("module._orig_mod.lm_head.weight", (9, 4), True),
        ("base_model.model.lm_head.modules_to_save.default.weight", (9, 4), True),
        ("wte.parametrizations.weight.original", (9, 4), True),
        ("token_type_embeddings.weight", (1, 4), False),
        ("patch_embed.proj.weight", (9, 3, 2, 2), False),
        ("wte.weight", (36,), False),  # as FSDP1 flattens it
        ("unembed.W_U", (4, 9), False),
        ("head_weight", (4, 9), False),
    ],
)
def test_which_rows_are_tokens(name, shape, expected):
    """A name by which a wrapper hides a table; a kernel, or a raw parameter whose tokens may be its columns."""
    assert has_token_rows(name, torch.empty(shape)) == expected
