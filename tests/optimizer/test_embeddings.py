"""``embeddings=``: groups of their own for embeddings and head, what they hold, and what may be asked for."""

from __future__ import annotations

import pytest
import torch
from embedding_models import WIDTH, make_model, make_others, train
from torch import nn
from warned import warnings_of

from apollo_triton import APOLLOAdamW, QAPOLLOAdamW, apollo_param_groups, attach_layerwise, quantize_model
from apollo_triton.core import gpu
from apollo_triton.core.embeddings import CHOICES, KEYS
from apollo_triton.core.settings import CHECKS, LOW_RANK_DEFAULTS, Settings
from apollo_triton.tools.llama import meta_model

MAKERS = {
    "mini": APOLLOAdamW.mini,
    "constructor": lambda model, **options: APOLLOAdamW(
        model.named_parameters(), rank=1, scale_type="tensor", **options
    ),
    "groups": lambda model, **options: APOLLOAdamW(apollo_param_groups(model, 1, scale_type="tensor", **options)),
}
MADE = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)


def grouped(optimizer, *keys):
    return {group["name"]: [group["param_names"], *map(group.get, keys)] for group in optimizer.param_groups}


@MADE
def test_embeddings_and_head_get_groups_of_their_own(make):
    """Keys that go to the router or the norms, a head that stays with them, or one that gets the embeddings' rate."""
    optimizer = make(make_model(), embeddings="rows-8bit", dense_lr=0.5, embedding_lr=0.25)
    keys = "lr", "second_moment", "state_bits", "embeddings"
    own = ["row", 8, "rows-8bit"]
    found = grouped(optimizer, *keys)
    assert [*found] == ["low-rank", "dense", "head", "embeddings", "norms and biases"]
    assert found["dense"] == [["router.weight"], 0.5, None, 32, None]
    assert found["head"] == [["lm_head.weight"], 0.5, *own]
    assert found["embeddings"] == [["wte.weight"], 0.25, *own]
    assert found["low-rank"][2:] == found["norms and biases"][2:] == [None, 32, None]


@MADE
def test_without_it_the_groups_are_as_they_were(make):
    """A head that is taken out of the dense group in every run, so that no older checkpoint fits."""
    groups = make(make_model()).param_groups
    assert [group["name"] for group in groups] == ["low-rank", "dense", "embeddings", "norms and biases"]
    assert groups[1]["param_names"] == ["router.weight", "lm_head.weight"]
    assert not any({"embeddings", "second_moment"} & group.keys() for group in groups)


@MADE
def test_a_tied_head_is_an_embedding(make):
    found = grouped(make(make_model(tied=True), embeddings="rows"), "second_moment")
    assert "head" not in found
    assert found["embeddings"] == [["wte.weight"], "row"]


@MADE
def test_a_mapping_has_keys_of_a_group(make):
    """Keys that are dropped, and a dtype by its name, as command lines and YAML have it."""
    given = {"second_moment": "row", "state_dtype": "bfloat16", "weight_decay": 0.125}
    optimizer = make(make_model(), embeddings=given)
    for group in optimizer.param_groups:
        is_own = group["name"] in ("head", "embeddings")
        assert (group.get("second_moment") == "row") == (group["state_dtype"] == "bfloat16") == is_own
        assert (group["weight_decay"] == 0.125) == is_own
    assert given == {"second_moment": "row", "state_dtype": "bfloat16", "weight_decay": 0.125}


@MADE
@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("row", r"Invalid embeddings: 'row' \(allowed: None, '8bit', 'rows', 'rows-8bit', or a mapping of keys"),
        (16, "Invalid embeddings: 16"),
        (True, "Invalid embeddings: True"),
        ({}, r"Invalid embeddings: \{\}"),
        ({"second_moment": "rows"}, r"embeddings=\{'second_moment': 'rows'\}: Invalid second_moment: 'rows' \(allowed"),
        ({"rank": 4}, r"embeddings=\{'rank': 4\}: 'rank' is a key of low-rank groups, and .* 5 to 20 % worse"),
        ({"lr": 1e-3, "scale": 2.0}, "'scale' is a key of low-rank groups"),
        ({"seed": 1}, "'seed' is not for embeddings and head alone .allowed: betas, .* give it to the optimizer"),
    ],
)
def test_values_that_are_not_allowed(make, value, message):
    with pytest.raises(ValueError, match=message):
        make(make_model(), embeddings=value)


def test_unknown_keys_and_two_rates():
    with pytest.raises(TypeError, match=r"unknown option 'second_momnt' \(did you mean 'second_moment'\?\)"):
        APOLLOAdamW.mini(make_model(), embeddings={"second_momnt": "row"})
    with pytest.raises(
        TypeError, match=r"unknown option 'foo' \(allowed: betas, correct_bias, eps, lr, min_8bit_size,"
    ):
        APOLLOAdamW.mini(make_model(), embeddings={"foo": 1})
    with pytest.raises(ValueError, match="both give a learning rate; leave one out"):
        APOLLOAdamW.mini(make_model(), embeddings={"lr": 1e-3}, embedding_lr=1e-3)


@pytest.mark.parametrize(
    ("given", "meant"),
    [("8-bit", "8bit"), ("row", "rows"), ("Rows", "rows"), ("rows-8-bit", "rows-8bit"), ("rows_8bit", "rows-8bit")],
)
def test_a_name_that_is_nearly_one(given, meant):
    with pytest.raises(ValueError, match=rf"or a mapping of keys of a dense group\); did you mean '{meant}'\?$"):
        apollo_param_groups(make_model(), 4, embeddings=given)
    with pytest.raises(ValueError, match=r"or a mapping of keys of a dense group\)$"):
        apollo_param_groups(make_model(), 4, embeddings="adafactor")


def test_every_key_of_a_group_is_taken_or_refused():
    """A key that is taken and does nothing: the seed of a projection, or what is one for the whole optimizer."""
    values = vars(Settings.of(APOLLOAdamW([nn.Parameter(torch.ones(2))]).param_groups[0])) | {"rank": 4}
    for name in CHECKS:
        if name in KEYS:
            apollo_param_groups(make_model(), 4, embeddings={name: values[name]})
        else:
            kind = "a key of low-rank groups" if name in ("rank", *LOW_RANK_DEFAULTS) else "not for embeddings and head"
            with pytest.raises(ValueError, match=f"'{name}' is {kind}"):
                apollo_param_groups(make_model(), 4, embeddings={name: values[name]})


OTHERS = ["pos_embed", "pos_embedding", "patch_embed.weight"]
ADAPTERS = ["wte.lora_embedding_A.default", "lm_head.lora_B.default.weight"]


@MADE
@pytest.mark.parametrize("embeddings", ["rows", "rows-8bit", {"second_moment": "row", "weight_decay": 0.5}])
@pytest.mark.filterwarnings("ignore:embeddings=")
def test_rows_that_may_not_be_tokens_keep_their_second_moments(make, embeddings):
    """One second moment for a feature of all tokens, where these are the columns: steps 8 times AdamW's for rare
    tokens. One for a kernel of a convolution. Adapters that are taken for tables, or a rate that they lose."""
    optimizer = make(make_others(), embeddings=embeddings, embedding_lr=0.25)
    found = grouped(optimizer, "lr", "second_moment", "embeddings", "weight_decay")
    assert {*found["embeddings"][0]} == {"wte.weight"}
    assert {*found["head"][0]} == {"lm_head.weight"}
    assert {*found["other embeddings"][0]} == {*OTHERS, ADAPTERS[0]}
    assert found["other embeddings"][1:] == [0.25, None, None, 0.0]
    assert {*found["dense"][0]} == {"router.weight", "unembed.W_U", ADAPTERS[1]}
    assert found["dense"][2:] == [None, None, 0.0]
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    for group in optimizer.param_groups[1:]:
        for name, parameter in zip(group["param_names"], group["params"], strict=True):
            is_by_row = name in ("wte.weight", "lm_head.weight")
            shape = (256, 1) if is_by_row else parameter.shape
            assert optimizer.state[parameter]["exp_avg_sq"].shape == shape, name


@pytest.mark.parametrize(
    ("make", "of"),
    [(APOLLOAdamW.apollo, lambda model: model), (APOLLOAdamW, nn.Module.named_parameters)],
    ids=["model", "names"],
)
def test_they_are_named_once_with_the_way_out(make, of):
    """A user who believes that all is kept by row; a warning of what gains nothing, of what is frozen, or in every
    run."""
    (text,) = warnings_of(make, of(make_others()), rank=4, embeddings="rows-8bit")
    names = text[len("embeddings='rows-8bit' has no effect on ") :].partition(":")[0]
    assert {*names.split(", ")} == {"pos_embedding", "patch_embed.weight", "unembed.W_U"}
    assert text.endswith("put them into a group of their own with {'second_moment': 'row', 'state_bits': 8}")
    model = make_others()
    for name in ("pos_embedding", "patch_embed.weight", "unembed.W_U"):
        model.get_parameter(name).requires_grad_(False)
    assert not warnings_of(make, of(model), rank=4, embeddings="rows")


@MADE
@pytest.mark.parametrize("embeddings", ["8bit", {"state_dtype": "bfloat16"}])
def test_forms_that_need_no_rows_are_for_all_but_adapters(make, embeddings):
    """Embeddings that lose the argument since they are no tables of tokens."""
    optimizer = make(make_others(), embeddings=embeddings)
    found = grouped(optimizer)
    assert {*found["embeddings"][0]} == {"wte.weight", *OTHERS}
    assert {*found["head"][0]} == {"lm_head.weight", "unembed.W_U"}
    assert {*found["other embeddings"][0]} == {ADAPTERS[0]}
    assert {*found["dense"][0]} == {"router.weight", ADAPTERS[1]}
    assert not warnings_of(make, make_others(), embeddings=embeddings)


def test_without_it_other_embeddings_are_with_the_embeddings():
    """Groups that move in every run, so that no older checkpoint fits."""
    found = grouped(APOLLOAdamW.mini(make_others()))
    assert [*found] == ["low-rank", "dense", "embeddings", "norms and biases"]
    assert {*found["embeddings"][0]} == {"wte.weight", *OTHERS, ADAPTERS[0]}


def test_groups_that_are_added_later_go_by_the_same_rule():
    optimizer = APOLLOAdamW.mini(make_model(), embeddings="rows")
    optimizer.add_param_group({"params": [("unembed.W_U", nn.Parameter(torch.ones(WIDTH, 99)))]})
    assert grouped(optimizer, "second_moment")["dense 2"] == [["unembed.W_U"], None]


def test_an_argument_without_effect_is_refused_or_warned_of():
    """An argument that silently does nothing: without names, without a rank, without embeddings, and beside targets
    that take the head."""
    model = make_model()
    with pytest.raises(ValueError, match="embeddings='rows' goes by names, and there are parameters without names"):
        APOLLOAdamW(model.parameters(), rank=1, embeddings="rows")
    with pytest.raises(ValueError, match="embeddings='rows' has no effect without a rank"):
        APOLLOAdamW(model.named_parameters(), embeddings="rows")
    encoder = nn.ModuleDict({"up": nn.Linear(WIDTH, 32)})
    for make, of in ((APOLLOAdamW.apollo, lambda model: model), (APOLLOAdamW, nn.Module.named_parameters)):
        (text,) = warnings_of(make, of(encoder), rank=4, embeddings="rows")
        assert "embeddings='rows' has no effect: no weight is an embedding or a head of more than one row" in text
        (text,) = warnings_of(make, of(model), rank=4, embeddings="rows", target_modules=["auto", "lm_head"])
        assert "embeddings='rows' has no effect on lm_head.weight, which target_modules makes low-rank" in text
        assert not warnings_of(make, of(model), rank=4, embeddings="rows")
    assert not warnings_of(APOLLOAdamW, apollo_param_groups(model, 4, embeddings="rows"))
    (text,) = warnings_of(APOLLOAdamW, [{"params": [model["up"].weight], "rank": 4, "embeddings": "rows"}])
    assert "'embeddings' does nothing in a group: it is an argument" in text


def test_a_table_of_one_row_keeps_a_second_moment_for_each_element():
    """One second moment for all positions of a vision transformer, which has them as [1, positions, width]."""
    model = make_model()
    model.register_parameter("position_embeddings", nn.Parameter(torch.ones(1, 5, 7)))
    optimizer = APOLLOAdamW.mini(model, embeddings="rows")
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert grouped(optimizer)["other embeddings"] == [["position_embeddings"]]
    assert optimizer.state[model.position_embeddings]["exp_avg_sq"].shape == (1, 5, 7)


def test_an_int8_head_needs_to_be_a_target():
    """AdamW does not train int8 weights, whatever its moments are. The way out that docs/options.md names."""
    model = quantize_model(make_model(), target_modules=["lm_head"], group_size=WIDTH)
    with pytest.raises(ValueError, match=r"lm_head.weight.* is int8 and its group has no 'rank'"):
        APOLLOAdamW.mini(model, embeddings="rows")
    optimizer = APOLLOAdamW.mini(model, embeddings="rows", target_modules=["auto", "lm_head"])
    assert "lm_head.weight" in grouped(optimizer)["low-rank"][0]


def test_other_ways_to_the_constructor():
    """A subclass that loses the argument, a group of one's own whose keys win over it, and groups that are added
    later."""
    optimizer = QAPOLLOAdamW(make_model().named_parameters(), rank=4, embeddings="rows")
    assert grouped(optimizer, "second_moment")["head"] == [["lm_head.weight"], "row"]
    keys = {"weight_decay": 0.5, "scale_type": "tensor", "state_bits": 32}
    own = [{"params": [*make_model().named_parameters()]} | keys]
    found = grouped(APOLLOAdamW(own, rank=4, embeddings="8bit"), "weight_decay", "scale_type", "state_bits")
    assert found["head"] == [["lm_head.weight"], 0.5, None, 8]
    assert found["dense"] == [["router.weight"], 0.5, None, 32]
    small = nn.ModuleDict({"up": nn.Linear(WIDTH, 32), "wte": nn.Embedding(8, 8)})
    optimizer = APOLLOAdamW.mini(small, embeddings="rows")
    optimizer.add_param_group({"params": [("lm_head.weight", nn.Parameter(torch.ones(32, 16)))]})
    assert grouped(optimizer, "second_moment")["head"] == [["lm_head.weight"], "row"]


def test_groups_without_names_are_added_as_without_it():
    """A layer that can be added without the argument and not with it. A bias alone is no reason to warn."""
    added = []
    for embeddings in (None, "rows"):
        optimizer = APOLLOAdamW.mini(make_model(), embeddings=embeddings)
        before, layer = len(optimizer.param_groups), nn.Linear(WIDTH, 32)
        texts = warnings_of(optimizer.add_param_group, {"params": list(layer.parameters())})
        added.append([(group["name"], group.get("rank")) for group in optimizer.param_groups[before:]])
        assert [("embeddings='rows' goes by names" in text) for text in texts] == ([True] if embeddings else [])
        assert not warnings_of(optimizer.add_param_group, {"params": [nn.Parameter(torch.ones(4))]})
    assert added[0] == added[1] == [("low-rank 2", 1), ("norms and biases 2", None)]


@pytest.mark.parametrize("name", CHOICES)
def test_it_trains_as_groups_by_hand(name):
    """Keys that stand in a group, and the step reads others."""
    models = [make_model(), make_model()]
    groups = apollo_param_groups(models[1], 1, scale_type="tensor")
    head = {"params": [groups[1]["params"].pop()], "param_names": [groups[1]["param_names"].pop()]} | CHOICES[name]
    groups[2] |= CHOICES[name]
    optimizers = [APOLLOAdamW.mini(models[0], embeddings=name), APOLLOAdamW([*groups, head])]
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer)
    for first, second in zip(*(model.parameters() for model in models), strict=True):
        assert torch.equal(first, second)


@pytest.mark.parametrize("gradients", ["freed", "none"])
def test_layer_wise_updates_take_it_too(gradients):
    """Hooks that read another group's settings: the same weights as by step()."""
    models = [make_model() for _ in range(2)]
    optimizers = [APOLLOAdamW.mini(model, embeddings="rows") for model in models]
    handle = attach_layerwise(models[1], optimizers[1], gradients=gradients)
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer)
    for first, second in zip(*(model.parameters() for model in models), strict=True):
        torch.testing.assert_close(first, second, rtol=0 if gradients == "freed" else 1e-5, atol=1e-7)
    handle.remove()


# LLaMA of a width w, an intermediate width i, l layers and v tokens with Mini. A matrix has two moments of 4 bytes for
# each of its channels, which are the longer side: w four times, i three times. l * 2 + 1 norms have 8 bytes an element.
# Each parameter has a step count, and each matrix an update norm, of 4 bytes.
LLAMAS = {"60M": (512, 1376, 8, 32000), "7B": (4096, 11008, 32, 32000)}


@pytest.mark.parametrize("size", LLAMAS)
def test_state_of_llama_counted_by_hand(size):
    """State that is counted otherwise than it is kept, or tables that keep a second moment for each element."""
    width, inner, layers, tokens = LLAMAS[size]
    table = width * tokens
    rest = layers * 8 * (4 * width + 3 * inner) + (2 * layers + 1) * 8 * width
    rest += 4 * (2 + layers * 9 + 1) + 4 * layers * 7
    of_table = {
        None: 8 * table,
        "8bit": 2 * (table + 4 * table // 256),
        "rows": 4 * table + 4 * tokens,
        "rows-8bit": table + 4 * table // 256 + 4 * tokens,
    }
    model = meta_model(size)
    for embeddings, expected in of_table.items():
        summary = APOLLOAdamW.mini(model, lr=1e-3, embeddings=embeddings).summary()
        assert summary.state_bytes == 2 * expected + rest, embeddings
        of_both = [row.state_bytes for row in summary.rows if row.kind in ("embedding", "head")]
        assert of_both == [expected + 4] * 2  # a step count each
    eighth_bits = 2 * of_table["rows-8bit"] + rest
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert eighth_bits < 8 * parameters / 10
    assert size != "7B" or eighth_bits < 0.3e9


def test_the_summary_says_how_the_state_is_kept():
    """A user who cannot see that the argument has arrived. A table has 4096 codes, 16 scales, 256 second moments and a
    step count: 4096 + 4 * (16 + 256 + 1) = 5188 bytes."""
    text = " ".join(str(APOLLOAdamW.mini(make_model(), embeddings="rows-8bit").summary()).split())
    assert "- wte.weight, 5.2 kB: embedding, embeddings='rows-8bit'" in text
    assert "- lm_head.weight, 5.2 kB: head, embeddings='rows-8bit'" in text


@pytest.mark.parametrize("backend", [pytest.param("interpreter", marks=pytest.mark.slow)], indirect=True)
@pytest.mark.parametrize(
    "embeddings",
    ["rows", pytest.param({"weight_decay": 0.5}, marks=pytest.mark.full)],
)
def test_embeddings_and_head_share_launches(backend, embeddings, monkeypatch):
    """Launches for each of the two groups. Four are for the matrices of two orientations, two for all other dense
    weights, and two for embeddings and head together."""
    launched = []
    monkeypatch.setattr(gpu, "launch", lambda kernel, *arguments, **constants: launched.append(kernel))
    model = make_model()
    optimizer = APOLLOAdamW.mini(model, embeddings=embeddings)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    launched.clear()
    optimizer.step()
    assert len(launched) == 4 + 2 + 2
