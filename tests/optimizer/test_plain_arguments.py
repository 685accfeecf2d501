"""``APOLLOAdamW(params, rank=...)`` splits what it is given, as ``apollo_param_groups`` splits a model.

This is how programs call it that take a class, parameters and keywords and nothing else.
"""

from __future__ import annotations

import copy
import pickle
import re

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Shard
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import LlamaConfig, LlamaForCausalLM
from unchanged import assert_unchanged, snapshot
from warned import warnings_of

from apollo_triton import APOLLOAdamW, QAPOLLOAdamW, apollo_param_groups

KEYS = {
    "rank": 8,
    "scale_type": "tensor",
    "scale": 9.0,
    "proj": "svd",
    "proj_type": "right",
    "update_proj_gap": 7,
    "distribution": "rademacher",
    "rank_above_width": True,
}


def make_model():
    torch.manual_seed(0)
    layers = {"wte": nn.Embedding(20, 16), "up": nn.Linear(16, 32), "down": nn.Linear(32, 16), "norm": nn.LayerNorm(16)}
    return nn.ModuleDict(layers | {"lm_head": nn.Linear(16, 20, bias=False)})


def train(model, optimizer, steps):
    for step in range(steps):
        tokens = torch.arange(8) + step
        x = model["wte"](tokens)
        loss = (model["lm_head"](model["norm"](x + model["down"](model["up"](x).tanh()))) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


def content(groups):
    """The groups with their parameters' ids."""
    return [{**group, "params": [id(parameter) for parameter in group["params"]]} for group in groups]


def names_of(optimizer):
    return {group["name"]: group["param_names"] for group in optimizer.param_groups}


# --- the split


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("keys", [{"rank": 4}, KEYS, {"rank": 4, "scale": 1, "target_modules": ["q_proj", "up"]}])
def test_names_give_the_groups_of_the_model(keys, tied):
    """A key that is lost on its way (a scale of 1 is no default here), a head or an embedding that only the model
    tells, another order of groups."""
    config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
                         vocab_size=64, tie_word_embeddings=tied)  # fmt: skip
    model = LlamaForCausalLM(config)
    options = keys | {"lr": 1e-2, "weight_decay": 0.5, "dense_lr": 1e-3}
    by_names = APOLLOAdamW(model.named_parameters(), **options)
    assert content(by_names.param_groups) == content(APOLLOAdamW.apollo(model, **options).param_groups)
    assert {name: by_names.param_groups[0][name] for name in keys if name != "target_modules"} == {
        name: value for name, value in keys.items() if name != "target_modules"
    }
    assert not warnings_of(APOLLOAdamW, model.named_parameters(), **options)


@pytest.mark.parametrize("as_groups", [False, True])
def test_parameters_without_names(as_groups):
    """Embeddings and head in low rank without a word, or four warnings; vectors that are projected."""
    model = make_model()
    params = [{"params": [*model.parameters()]}] if as_groups else [*model.parameters()]
    (text,) = warnings_of(APOLLOAdamW, params, rank=4)
    assert "rank=4 without names: all matrices that can be are low-rank (4), embeddings and head too" in text
    assert "model.named_parameters()" in text
    low_rank, vectors = APOLLOAdamW(params, rank=4).param_groups
    assert all(parameter.dim() == 2 for parameter in low_rank["params"])
    assert all(parameter.dim() == 1 for parameter in vectors["params"])
    assert len(low_rank["params"]) + len(vectors["params"]) == len([*model.parameters()])
    assert "param_names" not in low_rank


def test_given_groups_are_split_and_keep_their_keys():
    """The decay of a framework's two groups overwritten, a generator that is read twice, a group that is written to,
    and equal names, which Lightning's monitor of learning rates refuses."""
    model = make_model()
    matrices = [(name, p) for name, p in model.named_parameters() if p.dim() > 1]
    vectors = {name: p for name, p in model.named_parameters() if p.dim() == 1}
    given = [
        {"params": (each for each in matrices), "weight_decay": 0.5, "scale": 4.0, "layer": 1},
        {
            "params": [*vectors.values()],
            "param_names": [*vectors],
            "weight_decay": 0.25,
            "lr": 0.125,
            "name": "no decay",
        },
    ]
    before = [dict(group) for group in given]
    optimizer = APOLLOAdamW(given, lr=1e-2, rank=4, dense_lr=1e-3)
    assert given == before
    assert names_of(optimizer) == {
        "low-rank": ["up.weight", "down.weight"],
        "dense": ["lm_head.weight"],
        "embeddings": ["wte.weight"],
        "no decay, norms and biases": [*vectors],
    }
    found = [(g["lr"], g["weight_decay"], g.get("scale"), g.get("layer")) for g in optimizer.param_groups]
    dense = (1e-3, 0.5, None, 1)
    assert found == [(1e-2, 0.5, 4.0, 1), dense, dense, (0.125, 0.25, None, None)]
    layers = [{"params": [*model[name].named_parameters(name)]} for name in ("up", "down")]
    names = [group["name"] for group in APOLLOAdamW(layers, rank=4).param_groups]
    assert names == ["low-rank", "norms and biases", "low-rank 2", "norms and biases 2"]


def test_groups_with_a_rank_of_their_own_are_not_split():
    """None taken for a rank that is missing; a rank that is overwritten; keys that do not arrive."""
    model = make_model()
    up, down = ([*model[name].named_parameters(name)] for name in ("up", "down"))
    given = [{"params": up, "rank": None}, {"params": down, "rank": 2, "scale": 3.0}]
    third = {"params": [("lm_head.weight", model["lm_head"].weight)]}
    optimizer = APOLLOAdamW([*given, third], rank=4, scale=5.0, proj_type="left")
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2, 1]
    assert [group.get("rank") for group in optimizer.param_groups] == [None, 2, None]
    assert (optimizer.param_groups[1]["scale"], optimizer.param_groups[1]["proj_type"]) == (3.0, "left")
    # As torch.optim's arguments are, those of low-rank groups are defaults of every such group.
    assert APOLLOAdamW([{"params": down, "rank": 2}], scale_type="tensor").param_groups[0]["scale_type"] == "tensor"
    (text,) = warnings_of(APOLLOAdamW, given, rank=4)
    assert text == "rank=4 has no effect: every parameter group has a 'rank' of its own"


def test_a_group_that_is_added_later_is_split_too():
    """Layers that are unfrozen during training and get AdamW's state; half of a group that is left behind by an
    error."""
    model = make_model()
    optimizer = APOLLOAdamW(model["up"].named_parameters("up"), rank=4, dense_lr=1e-3, update_proj_gap=7)
    before = snapshot(optimizer)
    bad = [
        *model["down"].named_parameters("down"),
        ("up.bias", model["up"].bias),
    ]  # in the second part, after the first
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer.add_param_group({"params": bad})
    assert_unchanged(optimizer, before)
    optimizer.add_param_group({"params": model["down"].named_parameters("down")})
    added = optimizer.param_groups[2:]
    assert [(group["name"], group.get("rank"), group["lr"]) for group in added] == [
        ("low-rank 2", 4, 1e-3),
        ("norms and biases 2", None, 1e-3),
    ]
    assert added[0]["update_proj_gap"] == 7
    for parameter in (*model["up"].parameters(), *model["down"].parameters()):
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    assert optimizer.state[model["down"].weight]["exp_avg"].shape == (32, 4)


@pytest.mark.parametrize(
    "make", [APOLLOAdamW.apollo, lambda model, **keys: APOLLOAdamW(model.named_parameters(), **keys)]
)
def test_what_is_unfrozen_later_is_split_too(make):
    """A new block trained by AdamW without a word, whose norms decay, where the first ones are low-rank."""
    optimizer = make(make_model(), rank=4, lr=1e-3, weight_decay=0.1, update_proj_gap=7)
    block = nn.ModuleDict({"up": nn.Linear(16, 32), "norm": nn.LayerNorm(32)})
    count = len(optimizer.param_groups)
    optimizer.add_param_group({"params": block.named_parameters("later")})
    low_rank, vectors = optimizer.param_groups[count:]
    keys = ("param_names", "rank", "scale", "update_proj_gap", "weight_decay")
    assert [low_rank.get(key) for key in keys] == [["later.up.weight"], 4, "auto", 7, 0.1]
    assert (vectors.get("rank"), vectors["weight_decay"], len(vectors["params"])) == (None, 0.0, 3)


def test_targets_that_can_be_read_once():
    """A generator, which the model's groups have used up when the groups that are added later need it."""
    optimizer = APOLLOAdamW.apollo(make_model(), rank=4, target_modules=(name for name in ["up"]))
    assert optimizer.param_groups[0]["param_names"] == ["up.weight"]
    optimizer.add_param_group({"params": [(f"{name}.weight", nn.Linear(16, 32).weight) for name in ("up2", "other")]})
    assert [group["param_names"] for group in optimizer.param_groups[-2:]] == [["up2.weight"], ["other.weight"]]


def test_one_parameter_at_a_time():
    """torchtune's optimizer in the backward pass makes one for each parameter: of a norm, or of a matrix that is too
    narrow, nothing is low-rank."""
    model = make_model()
    (text,) = warnings_of(APOLLOAdamW, [model["norm"].weight], rank=4)
    assert text == "rank=4 has no effect: there is no matrix that could be low-rank, so all is dense AdamW"
    (text,) = warnings_of(APOLLOAdamW, [("lm_head.weight", model["lm_head"].weight)], rank=4)
    assert "rank=4 has no effect" in text
    (text,) = warnings_of(APOLLOAdamW, [nn.Parameter(torch.zeros(64, 16))], rank=256)
    assert text.startswith("1 targeted weight is narrower than rank 256 and stays dense: parameter 0 (width 16)")
    with pytest.raises(ValueError, match="all 2 targeted weights are narrower than rank 256"):
        APOLLOAdamW([nn.Parameter(torch.zeros(64, 16)), nn.Parameter(torch.zeros(16, 16))], rank=256)
    optimizer = APOLLOAdamW([("up.weight", model["up"].weight)], rank=4)
    assert [group["rank"] for group in optimizer.param_groups] == [4]


# --- kinds of parameters


def test_the_whole_shape_of_a_sharded_weight_decides():
    """A weight whose shard is narrower than the rank, left dense on some ranks and not on others."""
    dist.init_process_group("fake", store=FakeStore(), rank=0, world_size=8)
    try:
        mesh = init_device_mesh("cpu", (8,))
        wide = nn.Parameter(DTensor.from_local(torch.zeros(32, 2), mesh, [Shard(1)]))  # of [32, 16]
        narrow = nn.Parameter(DTensor.from_local(torch.zeros(32, 1), mesh, [Shard(1)]))
        optimizer = APOLLOAdamW([("up.weight", wide), ("gate.weight", narrow)], rank=9)
        assert names_of(optimizer) == {"low-rank": ["up.weight"], "dense": ["gate.weight"]}
    finally:
        dist.destroy_process_group()


@pytest.mark.parametrize("mark", ["_is_flat_param", "_fsdp_flattened", "ds_shape"])
def test_flattened_weights_are_refused(mark):
    """FSDP1's and ZeRO's vectors, which have lost their rows, trained by AdamW without a word."""
    flat = nn.Parameter(torch.zeros(512))
    setattr(flat, mark, (32, 16) if mark == "ds_shape" else True)
    with pytest.raises(ValueError, match=r"rank=4: nothing can be low-rank; 0?.*rows and columns are gone"):
        APOLLOAdamW([flat], rank=4)


def test_frozen_weights_and_adapters():
    """LoRA: an error for narrow adapters beside frozen weights, which do no harm."""
    model = nn.ModuleDict(
        {"q_proj": nn.Linear(32, 32), "lora_A": nn.Linear(32, 4, False), "lora_B": nn.Linear(4, 32, False)}
    )
    model["q_proj"].requires_grad_(False)
    optimizer = APOLLOAdamW(model.named_parameters(), rank=8)
    assert names_of(optimizer)["dense"] == ["lora_A.weight", "lora_B.weight"]
    with pytest.raises(ValueError, match=r"all 2 targeted weights are narrower than rank 8; none of them can be"):
        APOLLOAdamW([(n, p) for n, p in model.named_parameters() if p.requires_grad], rank=8)


def test_the_official_constructor_takes_a_rank_too():
    optimizer = QAPOLLOAdamW(make_model().named_parameters(), lr=1e-2, rank=4, optim_bits=8, min_8bit_size=64)
    assert [group["state_bits"] for group in optimizer.param_groups] == [8] * 4
    assert [group["weight_decay"] for group in optimizer.param_groups] == [1e-2, 1e-2, 1e-2, 0.0]


# --- what torch.optim does with an optimizer


@pytest.mark.parametrize("way", [copy.deepcopy, lambda each: pickle.loads(pickle.dumps(each))], ids=["copy", "pickle"])
def test_copies_keep_dense_groups_dense_and_split_what_is_added(way):
    """A rank among the defaults, which torch.optim writes into every group: embeddings would change to low rank."""
    model = make_model()
    optimizer = APOLLOAdamW(model.named_parameters(), **KEYS | {"proj": "random"}, dense_lr=0.5)
    train(model, optimizer, 1)
    assert not {"rank", "dense_lr", *KEYS} & set(optimizer.defaults)
    twin, copied = way((model, optimizer))
    for ours, theirs in zip(optimizer.param_groups, copied.param_groups, strict=True):
        assert {key: each for key, each in ours.items() if key != "params"} == {
            key: each for key, each in theirs.items() if key != "params"
        }
    train(model, optimizer, 2)
    train(twin, copied, 2)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
    copied.add_param_group({"params": [*nn.Linear(16, 16).named_parameters("late")]})
    assert [(g["name"], g.get("rank"), g["lr"]) for g in copied.param_groups[4:]] == [
        ("low-rank 2", 8, 1e-3),
        ("norms and biases 2", None, 0.5),
    ]


def test_a_run_continues_from_its_checkpoint():
    """Groups whose order or number depends on more than the arguments, and a constructor's rank that wins."""
    models = [make_model() for _ in range(2)]
    make = {"rank": 4, "lr": 1e-2, "dense_lr": 1e-3, "weight_decay": 0.1}
    whole = APOLLOAdamW(models[0].named_parameters(), **make)
    train(models[0], whole, 2)
    resumed = APOLLOAdamW(models[1].named_parameters(), **make | {"update_proj_gap": 3, "dense_lr": 5e-3})
    models[1].load_state_dict(models[0].state_dict())
    (text,) = warnings_of(resumed.load_state_dict, copy.deepcopy(whole.state_dict()))
    assert "update_proj_gap 200 (asked for: 3) in parameter group 0" in text
    assert resumed.param_groups[1]["lr"] == 1e-3
    for model, optimizer in zip(models, (whole, resumed), strict=True):
        train(model, optimizer, 2)
    assert all(torch.equal(p, q) for p, q in zip(*(model.parameters() for model in models), strict=True))
    by_model = APOLLOAdamW.apollo(models[1], 4)
    by_model.load_state_dict(whole.state_dict())  # the same groups


def test_each_dense_weight_has_its_reason():
    """What a summary says: reasons that are lost on the way, or of another weight."""
    model = make_model()
    model["gate"] = nn.Linear(16, 2)
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    for optimizer in (APOLLOAdamW(model.named_parameters(), rank=4), APOLLOAdamW.apollo(model, 4)):
        assert {names[id(parameter)]: reason for parameter, reason in optimizer._reasons.items()} == {
            "wte.weight": "embedding",
            "up.bias": "norm or bias",
            "down.bias": "norm or bias",
            "norm.weight": "norm or bias",
            "norm.bias": "norm or bias",
            "lm_head.weight": "head",
            "gate.weight": "narrower than rank 4",
            "gate.bias": "norm or bias",
        }


# --- mistakes


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"rank": "256"}, r"Invalid rank: '256' .allowed: an integer of 1 or more.; it is a string: convert it$"),
        ({"rank": 0}, "Invalid rank: 0 .allowed: an integer of 1 or more"),
        ({"rank": 4, "scale": "autom"}, "Invalid scale: 'autom'"),
        ({"rank": 4, "update_proj_gap": "200"}, "Invalid update_proj_gap: '200' .*it is a string: convert it"),
        ({"rank": 4, "lr": "1e-4"}, r"Invalid learning rate: '1e-4' .*it is a string: convert it.*1\.0e-4"),
        ({"rank": 4, "scale_type": "row"}, "Invalid scale_type: 'row' .allowed: 'channel' or 'tensor'.$"),
        (
            {"rank": 17},
            r"target_modules='auto': all 2 targeted weights are narrower than rank 17; give a rank of at most",
        ),
        (
            {"rank": 4, "target_modules": ["atn"]},
            r"target_modules=\['atn'\]: no weight matches; 'atn' matches no module",
        ),
        ({"rank": 4, "target_modules": "*up"}, r"target_modules: '\*up' is no regular expression"),
        ({"rank": 4, "target_modules": 5}, "Invalid target_modules: 5 .allowed: 'auto'"),
        ({"scale_type": "tensor"}, "scale_type='tensor' has no effect without a rank; pass rank=... too"),
        ({"scale": 128.0}, "scale=128.0 has no effect without a rank"),
        ({"target_modules": ["up"]}, r"target_modules=\['up'\] has no effect without a rank"),
        ({"dense_lr": 0.0}, "dense_lr=0.0 has no effect without a rank"),
        ({"embedding_lr": 1e-3}, "embedding_lr=0.001 has no effect without a rank"),
        ({"decay_vectors": True}, "decay_vectors=True has no effect without a rank"),
    ],
)
def test_mistakes_are_answered(options, text):
    with pytest.raises(ValueError, match=text):
        APOLLOAdamW(make_model().named_parameters(), **options)


def test_arguments_of_the_split_beside_groups_of_ones_own():
    """Advice that was followed already: the group has a rank, and the error asks for one."""
    groups = [{"params": [make_model()["up"].weight], "rank": 4}]
    with pytest.raises(ValueError, match=r"dense_lr=0\.001 has no effect on groups of your own: leave it out"):
        APOLLOAdamW(groups, dense_lr=1e-3)


def test_names_that_are_needed_and_not_there():
    """Targets that nothing can match, and all that is said is that nothing matches."""
    with pytest.raises(
        ValueError, match=r"target_modules=\['up'\] goes by names, and there are parameters without names"
    ):
        APOLLOAdamW(make_model().parameters(), rank=4, target_modules=["up"])
    (text,) = warnings_of(APOLLOAdamW, make_model().named_parameters(), rank=4, target_modules=["up", "atn"])
    assert "'atn' matches no module that has parameters; the other entries are used" in text


def test_a_rate_that_every_group_overrides():
    """dense_lr beside groups that have their rate, as frameworks make them."""
    given = [{"params": [*make_model().named_parameters()], "lr": 1e-2}]
    (text,) = warnings_of(APOLLOAdamW, given, rank=4, dense_lr=1e-3)
    assert text == "dense_lr=0.001 has no effect: every parameter group has an 'lr' of its own"


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ({"rnak": 4}, "parameter group 0: 'rnak' does nothing .did you mean 'rank'"),
        ({"dense_lr": 1e-3}, "'dense_lr' does nothing in a group: it is an argument of APOLLOAdamW"),
        ({"scale": 3.0}, None),  # of its low-rank part
    ],
)
def test_misspelt_keys_of_a_group_that_is_split_are_named_once(keys, text):
    found = warnings_of(APOLLOAdamW, [{"params": [*make_model().named_parameters()], **keys}], rank=4)
    assert len(found) == (text is not None)
    assert text is None or re.search(text, found[0])


@pytest.mark.parametrize("params", [[("a", 3)], [3], torch.zeros(3), [{"params": {nn.Parameter(torch.ones(2))}}]])
def test_what_torch_refuses_it_refuses_here_too(params):
    """A split that stumbles over what is no parameter, with an error of its own inside."""
    with pytest.raises(TypeError, match=r"optimizer|optimized|ordered|named parameters|iterable"):
        APOLLOAdamW(params, rank=4)
    with pytest.raises(ValueError, match="2 param_names for 1 params"):
        APOLLOAdamW([{"params": [nn.Parameter(torch.ones(2))], "param_names": ["a", "b"]}], rank=4)
    weight = nn.Parameter(torch.ones(16, 16))
    with pytest.raises(ValueError, match=r"parameter 1 .* is in parameter group 0 twice"):
        APOLLOAdamW([("up.weight", weight), ("up.weight", weight)], rank=4)


def test_a_split_by_hand_is_the_same():
    """The two ways of one rule drift apart."""
    model = make_model()
    assert content(APOLLOAdamW(apollo_param_groups(model, **KEYS)).param_groups) == content(
        APOLLOAdamW(model.named_parameters(), **KEYS).param_groups
    )
