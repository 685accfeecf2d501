"""``optimizer.summary()``: its bytes and launches against those of real steps, its reasons, its advice taken."""

from __future__ import annotations

import copy
import pickle
from contextlib import contextmanager

import pytest
import torch
from kernel_cases import MINI
from tiers import HAS_TRITON
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.testing._internal.distributed.fake_pg import FakeStore

from apollo_triton import APOLLOAdamW, attach_layerwise, quantize_model
from apollo_triton.backends.reference import dense_8bit
from apollo_triton.core import gpu
from apollo_triton.core.embeddings import CHOICES
from apollo_triton.core.messages import readable_bytes

needs_triton = pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")
not_on_a_gpu = pytest.mark.skipif(torch.cuda.is_available(), reason="this is about the CPU and the interpreter")
LAYERS, WIDTH, VOCABULARY = 2, 16, 40


def transformer(**changes):
    """Names as in LLaMA: two layers of attention, MLP and router, embedding and head."""

    def layer():
        return nn.ModuleDict(
            {
                "attn": nn.Linear(WIDTH, WIDTH),
                "mlp": nn.Linear(WIDTH, 32),
                "router": nn.Linear(WIDTH, 4, bias=False),
                "norm": nn.LayerNorm(WIDTH),
            }
        )

    parts = {
        "embed_tokens": nn.Embedding(VOCABULARY, WIDTH),
        "layers": nn.ModuleList(layer() for _ in range(LAYERS)),
        "lm_head": nn.Linear(WIDTH, VOCABULARY, bias=False),
    }
    return nn.ModuleDict(parts | changes)


def named(shapes, dtype=torch.float32):
    return [(name, nn.Parameter(torch.ones(shape, dtype=dtype))) for name, shape in shapes.items()]


def set_gradients(optimizer):
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            if parameter.requires_grad:
                parameter.grad = torch.full_like(parameter, 1e-2)


def held(optimizer, parameter):
    """Bytes of the storages that a parameter's state keeps alive on this rank."""
    values = [value for value in optimizer.state.get(parameter, {}).values() if isinstance(value, torch.Tensor)]
    values = [value.to_local() if isinstance(value, DTensor) else value for value in values]
    return sum(value.untyped_storage().nbytes() for value in values)


def parameters_of(optimizer):
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


# --- bytes

MATRICES = {"tall": (40, 24), "wide": (24, 40), "experts": (3, 32, 16), "kernel": (16, 8, 3, 3)}
DENSE = {"bias": (7,), "gain": (), "table": (65, 16)}
# 40 * 16 = 640 of a matrix's moments and 16 * 65 of the table's are 8-bit, three experts' 32 * 16 too: no whole blocks.
EIGHT_BIT = {"state_bits": 8, "min_8bit_size": 500}
STATES = {
    "float32": ({"rank": 4}, {}),
    "bfloat16": ({"rank": 4}, {"state_dtype": torch.bfloat16}),
    "8-bit": ({"rank": 16}, EIGHT_BIT),
    "mini": (MINI, {"seed_per_param": True}),
    "svd": ({"rank": 4, "proj": "svd", "proj_type": "right"}, {}),
    "clipped": ({"rank": 4}, {"max_grad_norm": 1.0}),
}


@pytest.mark.parametrize("name", STATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_state_of_every_weight_is_counted_before_the_first_step(name, dtype, request):
    """A moment's dtype or shape, an expert's norm, the absmax of a last block, svd's P, a frozen weight's state."""
    if name == "8-bit":
        request.getfixturevalue("bitsandbytes")
    group, options = STATES[name]
    matrices, dense = named(MATRICES, dtype), named(DENSE, dtype)
    matrices += [("frozen", nn.Parameter(torch.ones(24, 24, dtype=dtype), requires_grad=False))]
    optimizer = APOLLOAdamW([{"params": matrices, **group}, {"params": dense}], **options)
    before = optimizer.summary()
    assert not optimizer.state
    set_gradients(optimizer)
    optimizer.step()
    expected = [held(optimizer, parameter) for parameter in parameters_of(optimizer)]
    assert [row.state_bytes for row in before.rows] == expected
    assert before.rows == optimizer.summary().rows
    assert before.state_bytes == sum(expected) > 0
    trained = [nn.Parameter(each.detach().clone()) for each in parameters_of(optimizer) if each.requires_grad]
    adamw = torch.optim.AdamW(trained)
    for parameter in trained:
        parameter.grad = torch.ones_like(parameter)
    adamw.step()
    assert [row.adamw_bytes for row in before.rows if row.reason != "frozen"] == [held(adamw, each) for each in trained]
    assert before.adamw_bytes == sum(held(adamw, each) for each in trained)


def test_int8_weights_have_the_state_of_float_ones_and_tied_ones_have_it_once():
    """The bytes of q taken for those of a gradient or of moments; a tied weight counted for each of its modules."""
    model = transformer()
    model["lm_head"].weight = model["embed_tokens"].weight
    model = quantize_model(model, ["attn", "mlp"], group_size=16).to(torch.bfloat16)
    optimizer = APOLLOAdamW.apollo(model, rank=4)
    summary = optimizer.summary()
    set_gradients(optimizer)
    optimizer.step()
    assert [row.state_bytes for row in summary.rows] == [held(optimizer, each) for each in parameters_of(optimizer)]
    assert sum(row.shape == (VOCABULARY, WIDTH) for row in summary.rows) == 1
    for row in summary.low_rank:
        assert (row.adamw_bytes, row.gradient_bytes) == (2 * 2 * row.elements + 4, 2 * row.elements)


@contextmanager
def ranks(world):
    """One process as the last of so many ranks, whose shards are the uneven ones. Collectives send nothing."""
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=world - 1, world_size=world)
    try:
        yield init_device_mesh("cpu", (world,))
    finally:
        torch.distributed.destroy_process_group()


def sharded_optimizer(mesh, rank=4, **options):
    """Shards along the kept and along the projected dimension, and a replica."""
    cuts = {"kept": ((34, 24), Shard(0)), "projected": ((34, 24), Shard(1)), "replica": ((34, 24), Replicate())}
    weights = {
        name: nn.Parameter(distribute_tensor(torch.ones(shape), mesh, [cut])) for name, (shape, cut) in cuts.items()
    }
    bias = nn.Parameter(distribute_tensor(torch.ones(7), mesh, [Shard(0)]))
    groups = [{"params": [*weights.items()], "rank": rank}, {"params": [("bias", bias)]}]
    return APOLLOAdamW(groups, **options)


def test_a_rank_counts_its_own_shards():
    """The whole weight's bytes on every rank; moments of a shard along the width that are not shared out."""
    with ranks(4) as mesh:
        optimizer = sharded_optimizer(mesh)
        summary = optimizer.summary()
        set_gradients(optimizer)
        optimizer.step()
        assert [row.state_bytes for row in summary.rows] == [held(optimizer, each) for each in parameters_of(optimizer)]
        assert [row.elements for row in summary.rows] == [7 * 24, 34 * 6, 34 * 24, 1]  # 34 = 9 + 9 + 9 + 7
        assert summary.rows[0].shape == (34, 24)
        assert "of this rank's shards" in str(summary)


def test_a_model_on_the_meta_device_is_counted():
    with torch.device("meta"):
        model = transformer()
    counted, real = APOLLOAdamW.apollo(model, rank=4).summary(), APOLLOAdamW.apollo(transformer(), rank=4).summary()
    assert [row.state_bytes for row in counted.rows] == [row.state_bytes for row in real.rows]


# --- launches


def launches_of_two_steps(step, monkeypatch):
    """The kernels that two calls of ``step`` launch: those of the second, and how many more the first launches."""
    counts = []
    for _ in range(2):
        launched = []
        with monkeypatch.context() as patch:
            patch.setattr(gpu, "launch", lambda kernel, *arguments, into=launched, **constants: into.append(kernel))
            step()
        counts.append(len(launched))
    return counts[1], counts[0] - counts[1]


def step_of(optimizer):
    def step():
        set_gradients(optimizer)
        optimizer.step()

    return step


TALL_AND_WIDE = {"tall": (64, 48), "tall2": (80, 16), "wide": (16, 64)}
LAUNCHES = {
    "mini": (TALL_AND_WIDE, {"bias": (64,)}, MINI, {}),
    "unaligned": ({**TALL_AND_WIDE, "odd": (200, 30)}, {}, MINI, {}),
    "rank 16": (TALL_AND_WIDE, {"bias": (64,)}, {"rank": 16}, {}),
    "rank 16, a new P every step": (TALL_AND_WIDE, {}, {"rank": 16, "update_proj_gap": 1}, {}),
    "above rank 256": ({"tall": (300, 280)}, {}, {"rank": 260}, {}),
    "svd": (TALL_AND_WIDE, {}, {"rank": 4, "proj": "svd"}, {}),
    "8-bit": (TALL_AND_WIDE, {}, {"rank": 16}, {"state_bits": 8, "min_8bit_size": 600}),
    "clipped, R is kept": (TALL_AND_WIDE, {"bias": (64,)}, {"rank": 1}, {"max_grad_norm": 1.0}),
    "clipped, G is read again": ({"tall": (64, 48)}, {"bias": (64,)}, {"rank": 32}, {"max_grad_norm": 1.0}),
    "capturable": (TALL_AND_WIDE, {"bias": (64,)}, {"rank": 16}, {"capturable": True}),
    "a learning rate on the host": (TALL_AND_WIDE, {"bias": (64,)}, {"rank": 16}, {"lr": torch.tensor(1e-2)}),
    "experts and kernels": ({"experts": (3, 32, 16), "kernel": (16, 8, 3, 3)}, {}, {"rank": 4}, {}),
    "dense": ({}, {"bias": (64,), "odd": (7,)}, {}, {}),
}


@needs_triton
@not_on_a_gpu
@pytest.mark.parametrize("name", LAUNCHES)
def test_the_launches_are_those_of_a_step(name, monkeypatch):
    """A table that the count joins or leaves out, a verb that takes two launches, a refresh counted in every step."""
    matrices, dense, group, options = LAUNCHES[name]
    groups = [{"params": named(matrices, torch.bfloat16), **group}] * bool(matrices)
    groups += [{"params": named(dense, torch.bfloat16)}] * bool(dense)
    optimizer = APOLLOAdamW(groups, backend="triton", **options)
    before = optimizer.summary()
    assert before.launches == launches_of_two_steps(step_of(optimizer), monkeypatch)
    assert optimizer.summary().launches == before.launches


@needs_triton
@not_on_a_gpu
@pytest.mark.parametrize("options", [{}, {"max_grad_norm": 1.0}], ids=["plain", "clipped"])
@pytest.mark.parametrize("rank", [1, 4])
def test_the_launches_of_shards_are_those_of_a_step_and_communicate_nothing(rank, options, monkeypatch):
    """A table of whole weights counted for one whose sketch is summed; ranks that wait for one that asks alone."""
    with ranks(4) as mesh:
        optimizer = sharded_optimizer(mesh, rank, backend="triton", **options)
        with monkeypatch.context() as patch:
            for name in ("all_reduce", "all_gather_into_tensor", "reduce_scatter_tensor", "all_gather_object"):
                patch.setattr(torch.distributed, name, None)
            found = optimizer.summary().launches
        assert found == launches_of_two_steps(step_of(optimizer), monkeypatch)


@needs_triton
@not_on_a_gpu
def test_layerwise_updates_take_their_launches_weight_by_weight(monkeypatch):
    """The joint launches of a plain step; a P made for each of the engines that share it."""
    model = transformer()
    optimizer = APOLLOAdamW.apollo(model, rank=4, backend="triton")
    plain = optimizer.summary()
    handle = attach_layerwise(model, optimizer)
    summary = optimizer.summary()

    def step():
        sum(parameter.sum() for parameter in model.parameters()).backward()
        optimizer.step()

    assert summary.launches == launches_of_two_steps(step, monkeypatch)
    assert summary.launches.step > plain.launches.step
    gradients = [parameter.numel() * 4 for parameter in model.parameters()]
    assert f"take {readable_bytes(sum(gradients))}, the largest {readable_bytes(max(gradients))}" in unwrapped(summary)
    handle.remove()
    assert optimizer.summary() == plain
    attach_layerwise(model, optimizer, gradients="none")
    summary = optimizer.summary()
    assert summary.launches is None
    assert "depend on the tokens" in unwrapped(summary)
    assert sum(row.gradient_bytes for row in summary.rows) == sum(gradients) - 4 * LAYERS * WIDTH * (WIDTH + 32)


def test_without_kernels_there_are_no_launches():
    summary = APOLLOAdamW.apollo(transformer(), rank=4, backend="reference").summary()
    assert summary.launches is None
    assert 'Backend reference, 16 weights: backend="reference"' in str(summary)
    assert "Launches of our kernels: none, PyTorch computes the step" in str(summary)


# --- reasons


def unwrapped(summary):
    return " ".join(str(summary).split())


def test_groups_by_hand_say_what_can_be_derived():
    """A reason of the wrong weight: rows, kinds and names that are not in one order."""
    low_rank = named({"layers.0.mlp.weight": (32, 16), "layers.0.mlp.bias": (32,)})
    dense = named({"wte.weight": (100, 16), "lm_head.weight": (100, 16), "layers.0.attn.weight": (16, 16)})
    frozen = named({"layers.1.mlp.weight": (32, 16)})
    frozen[0][1].requires_grad_(False)
    optimizer = APOLLOAdamW([{"params": low_rank, "rank": 4}, {"params": dense}, {"params": frozen, "rank": 4}])
    assert [(row.name, row.kind, row.group, row.rank, row.reason) for row in optimizer.summary().rows] == [
        ("layers.0.mlp.weight", "matrix", 0, 4, ""),
        ("layers.0.mlp.bias", "norm or bias", 0, None, "norm or bias"),
        ("wte.weight", "embedding", 1, None, "in a group without a rank"),
        ("lm_head.weight", "head", 1, None, "in a group without a rank"),
        ("layers.0.attn.weight", "matrix", 1, None, "in a group without a rank"),
        ("layers.1.mlp.weight", "matrix", 2, None, "frozen"),
    ]


@pytest.mark.filterwarnings("ignore:.* targeted weights are")
def test_a_model_says_why_each_of_its_weights_is_dense():
    """Reasons that are lost on the way from the model or to a copy, or that a derived one covers; an embedding by
    another name."""
    model = transformer(words=nn.Embedding(9, WIDTH), up=nn.Linear(WIDTH, WIDTH))
    optimizer = APOLLOAdamW.apollo(model, rank=4, target_modules=["attn", "mlp", "router"])
    reasons = {row.name: (row.kind, row.reason) for row in optimizer.summary().rows}
    assert reasons["layers.0.mlp.weight"] == ("matrix", "")
    assert reasons["layers.1.router.weight"] == ("matrix", "so narrow that rank 4 saves no state")
    assert reasons["up.weight"] == ("matrix", "not in target_modules")
    assert reasons["words.weight"] == ("embedding", "embedding")
    assert reasons["lm_head.weight"] == ("head", "head")
    for copied in (copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))):
        assert {row.name: (row.kind, row.reason) for row in copied.summary().rows} == reasons


def test_weights_without_names_are_called_by_their_shapes():
    weights = [nn.Parameter(torch.ones(32, 16)) for _ in range(2)]
    summary = APOLLOAdamW([{"params": weights}]).summary()
    assert "- 32 x 16 (2), 8.2 kB: in a group without a rank" in str(summary)


def test_what_a_step_would_refuse_is_the_reason_of_the_backend(monkeypatch):
    """A summary that raises where it should explain, or names a backend that will not update."""
    monkeypatch.setattr(dense_8bit, "obstacle", lambda device: "it is not installed")
    optimizer = APOLLOAdamW([{"params": named({"table": (100, 64)})}], state_bits=8)
    (row,) = optimizer.summary().rows
    set_gradients(optimizer)
    with pytest.raises(ValueError, match="bitsandbytes") as error:
        optimizer.step()
    assert row.backend == ("none", str(error.value))
    assert row.state_bytes == 2 * 100 * 64 + 2 * 4 * 25 + 4


def test_what_capturable_refuses_is_the_reason_of_the_backend():
    """PyTorch named as the backend where every step raises."""
    optimizer = APOLLOAdamW([{"params": named({"table": (32, 16)}), "rank": 4}], capturable=True)
    (row,) = optimizer.summary().rows
    set_gradients(optimizer)
    with pytest.raises(ValueError, match="use capturable=False") as error:
        optimizer.step()
    assert row.backend == ("none", str(error.value))


# --- the text and its advice


def test_the_text_fits_60_columns_and_its_totals_are_those_of_the_rows():
    """A name, a size or a count that breaks the table."""
    name = "base_model.model.model.language_model.layers.{}.self_attn.q_proj.original_module.default.weight"
    with torch.device("meta"):
        large = {name.format(layer): (65536, 65536) for layer in range(40)}
        optimizer = APOLLOAdamW([{"params": named(large)}, {"params": named({"norm": (65536,)}, torch.bfloat16)}])
    summary = optimizer.summary()
    lines = str(summary).splitlines()
    assert max(map(len, lines)) <= 60
    assert repr(summary) == str(summary)
    total = next(line for line in lines if line.startswith("all "))
    assert total.split() == ["all", "41", f"{40 * 65536**2 + 65536:,}", "1.4", "TB", "1.4", "TB"]
    assert "(40), 1.4 TB: in a group without a rank" in unwrapped(summary)


ADVICE = {
    "a rank that is too high": (
        lambda **options: APOLLOAdamW.apollo(transformer(up=nn.Linear(64, 64)), **options),
        {"rank": 32, "target_modules": ["up", "attn", "mlp"]},
        {"rank": 4, "target_modules": ["up", "attn", "mlp"]},
        "rank 32 is too high for layers.*.attn.weight (2), layers.*.mlp.weight (2): rank=4 makes them low-rank",
    ),
    "targets that are missed": (
        lambda **options: APOLLOAdamW.apollo(transformer(), **options),
        {"rank": 4, "target_modules": ["attn"]},
        {"rank": 4, "target_modules": ["attn", "mlp"]},
        "layers.*.mlp.weight (2) can be low-rank at rank 4 too",
    ),
    "float32 moments": (
        lambda **options: APOLLOAdamW.apollo(transformer(), **options),
        {"rank": 4},
        {"rank": 4, "state_dtype": torch.bfloat16},
        "embeddings and heads hold 65% of the state: state_dtype=torch.bfloat16 halves float32 moments",
    ),
    "tables with enough elements for 8 bits": (
        lambda **options: APOLLOAdamW.apollo(transformer(embed_tokens=nn.Embedding(512, WIDTH)), **options),
        {"rank": 4},
        {"rank": 4, "embeddings": "rows-8bit"},
        "embeddings='rows-8bit' keeps a byte an element",
    ),
    "tables in a group by hand": (
        lambda **keys: APOLLOAdamW(by_hand(transformer(embed_tokens=nn.Embedding(512, WIDTH)), **keys)),
        {},
        CHOICES["rows-8bit"],
        "embed_tokens.weight, lm_head.weight in a group of their own with {'second_moment': 'row', 'state_bits': 8} "
        "keep a byte an element",
    ),
    "tables of AdamW": (
        lambda **keys: APOLLOAdamW(
            [{"params": named({"wte.weight": (512, 64)}), **keys}, {"params": named({"unembed.W_U": (64, 90)})}]
        ),
        {},
        CHOICES["rows-8bit"],
        "wte.weight in a group of its own with {'second_moment': 'row', 'state_bits': 8} keeps a byte an element",
    ),
}


def by_hand(model, **of_tables):
    """A group with a rank, one of embedding and head, and one of the rest."""
    groups = {"matrix": {"rank": 4}, "table": of_tables, "rest": {}}
    found = {name: {"params": [], **keys} for name, keys in groups.items()}
    for name, parameter in model.named_parameters():
        is_table = name.startswith(("embed", "lm_head"))
        found["table" if is_table else "matrix" if "layers" in name else "rest"]["params"].append((name, parameter))
    return [group for group in found.values() if group["params"]]


@pytest.mark.filterwarnings("ignore:.* targeted weights are")
@pytest.mark.parametrize("name", ADVICE)
def test_who_takes_the_advice_saves_what_it_says(name):
    """A saving that is not there, or is another one."""
    make, options, better, advice = ADVICE[name]
    before, after = make(**options).summary(), make(**better).summary()
    assert advice in before.advice
    saved = before.state_bytes - after.state_bytes
    assert f"saves {readable_bytes(saved)}" in before.advice


def test_an_optimizer_without_a_rank_is_told_what_rank_it_could_have():
    model = transformer()
    with pytest.warns(UserWarning, match="no parameter has a 'rank'"):
        optimizer = APOLLOAdamW(model.named_parameters())
    summary = optimizer.summary()
    saved = summary.state_bytes - APOLLOAdamW.apollo(model, rank=4).summary().state_bytes
    assert summary.advice.startswith("no weight has a rank, so this is AdamW: APOLLOAdamW.apollo(model, rank=4)")
    assert summary.advice.endswith(f"save {readable_bytes(saved)}")


def test_where_low_rank_weights_hold_the_state_there_is_no_advice():
    model = nn.ModuleDict({"mlp": nn.Linear(64, 64, bias=False), "embed": nn.Embedding(4, 16)})
    summary = APOLLOAdamW.apollo(model, rank=16).summary()
    assert summary.advice == ""
    assert "To save" not in str(summary)
