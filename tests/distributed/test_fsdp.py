"""A real model under FSDP2, tensor parallelism and both: a tiny LLaMA with tied embeddings, grouped queries and biases,
whose vocabulary of 33 leaves uneven shards.

Beside the sharded model each rank keeps a plain copy, which a plain optimizer moves by the gathered gradients of the
sharded one. So gradients are the same to the bit, and what differs is the optimizer's alone.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist
from distributed_cases import (
    Collectives,
    assert_close,
    assert_ranks_agree,
    drawn,
    needs_fsdp_on_a_cpu,
    tensor_parallel,
    whole,
)
from distributed_harness import optimizer_class, run
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Shard

transformers = pytest.importorskip("transformers")

APOLLO = {"rank": 4, "update_proj_gap": 3, "weight_decay": 0.05}
MINI = {"rank": 1, "scale_type": "tensor", "scale": 16.0, "update_proj_gap": 3}


def tiny_llama():
    config = transformers.LlamaConfig(
        hidden_size=24,
        intermediate_size=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=33,
        max_position_embeddings=32,
        attention_bias=True,
        mlp_bias=True,
        tie_word_embeddings=True,
        attn_implementation="eager",
    )
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(drawn(tuple(parameter.shape), name) * (0.1 if parameter.dim() > 1 else 0.3))
    return model


def groups_of(model, low_rank):
    """Attention and MLP weights in the low-rank group, all else dense; tied weights once."""
    named = list(model.named_parameters())
    chosen = [(name, each) for name, each in named if each.dim() == 2 and ("attn" in name or "mlp" in name)]
    names = {name for name, _ in chosen}
    rest = [(name, each) for name, each in named if name not in names]
    return [{"params": chosen, **low_rank}, {"params": rest, "weight_decay": 0.1}]


def tokens(step, rank=0):
    generator = torch.Generator().manual_seed(100 * step + rank)
    return torch.randint(33, (2, 12), generator=generator)


def with_fsdp(model, mesh):
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def with_tensor_parallel(model, mesh):
    tensor_parallel(model, mesh)
    model.lm_head.weight = model.model.embed_tokens.weight  # parallelize_module makes two parameters of it
    return model


def parallel(kind, world):
    """The model, the mesh that data is split over (None: all ranks see the same), and a copy that is not sharded."""
    plain = tiny_llama()
    model = copy.deepcopy(plain)
    if kind == "fsdp":
        mesh = init_device_mesh("cpu", (world,), mesh_dim_names=("data",))
        return with_fsdp(model, mesh), mesh, plain
    if kind == "hybrid":  # replicas of shards
        mesh = init_device_mesh("cpu", (2, world // 2), mesh_dim_names=("replica", "shard"))
        return with_fsdp(model, mesh), mesh, plain
    if kind == "tensor":
        return with_tensor_parallel(model, init_device_mesh("cpu", (world,))), None, plain
    mesh = init_device_mesh("cpu", (world // 2, 2), mesh_dim_names=("data", "tensor"))
    return with_fsdp(with_tensor_parallel(model, mesh["tensor"]), mesh["data"]), mesh["data"], plain


def beside_a_plain_copy(kind, steps, low_rank, options):
    """Trains both, and returns what they hold at the end."""
    model, data, plain = parallel(kind, dist.get_world_size())
    optimizer = optimizer_class()(groups_of(model, low_rank), lr=1e-2, **options)
    shadow = optimizer_class()(groups_of(plain, low_rank), lr=1e-2, **options)
    counts = []
    for step in range(steps):
        source = 0 if data is None else (data.get_local_rank() if data.ndim == 1 else dist.get_rank())
        batch = tokens(step, source)
        model(input_ids=batch, labels=batch).loss.backward()
        for parameter, copied in zip(model.parameters(), plain.parameters(), strict=True):
            copied.grad = whole(parameter.grad)
        with Collectives() as collectives:
            optimizer.step()
        counts.append(dict(collectives.counts))
        shadow.step()
        optimizer.zero_grad()

    def held(of, by):
        named = {name: whole(parameter) for name, parameter in of.named_parameters()}
        for name, parameter in of.named_parameters():
            named |= {f"{name}.{key}": whole(value) for key, value in by.state[parameter].items()}
        return named

    cut = {
        name: [getattr(each, "dim", None) for each in parameter.placements]
        if isinstance(parameter, DTensor)
        else "plain"
        for name, parameter in model.named_parameters()
    }
    ends = {"ours": held(model, optimizer), "theirs": held(plain, shadow)}
    batch = tokens(1000)
    with torch.no_grad():  # last, since FSDP2 leaves the root's parameters gathered after a forward pass
        losses = [float(each(input_ids=batch, labels=batch).loss) for each in (model, plain)]
    return {
        **ends,
        "losses": losses,
        "counts": counts,
        "cut": cut,
        "norms": (optimizer.gradient_norm, shadow.gradient_norm) if options else None,
    }


def check(results, mesh_dims):
    assert_ranks_agree([result["ours"] for result in results])
    for result in results:
        assert_close(result["ours"], result["theirs"], 1e-6, "against the plain copy")
        ours, theirs = result["losses"]
        assert ours == pytest.approx(theirs, rel=1e-5), "the model does not compute with the weights that were moved"
        start = dict(tiny_llama().named_parameters())
        for name, parameter in start.items():
            assert (result["ours"][name] - parameter).norm() > 1e-3 * parameter.norm(), f"{name} did not move"
        for counts in result["counts"][1:]:
            assert sum(counts.values()) <= 2 * mesh_dims, counts


@needs_fsdp_on_a_cpu
@pytest.mark.parametrize(
    ("world", "low_rank"),
    [
        pytest.param(2, APOLLO, marks=pytest.mark.slow, id="2-apollo"),
        pytest.param(2, MINI, marks=pytest.mark.full, id="2-mini"),
        pytest.param(4, APOLLO, marks=pytest.mark.full, id="4-apollo"),
        pytest.param(4, MINI, marks=pytest.mark.full, id="4-mini"),
    ],
)
def test_fully_shard(world, low_rank):
    """FSDP2's Shard(0): wide weights lose the dimension that is projected, tied embeddings are updated twice, biases
    of 12 elements leave an empty share of state."""
    results = run(beside_a_plain_copy, world, kind="fsdp", steps=8, low_rank=low_rank, options={})
    assert all(cut == [0] for cut in results[0]["cut"].values()), "the harness shards nothing"
    check(results, 1)


@needs_fsdp_on_a_cpu
@pytest.mark.slow
def test_fully_shard_with_three_ranks_clips_by_the_norm_of_the_model():
    """24 rows on three ranks are even, 33 of the vocabulary too, 40 are not: a norm that counts padding or shards."""
    results = run(beside_a_plain_copy, 3, kind="fsdp", steps=8, low_rank=APOLLO, options={"max_grad_norm": 0.1})
    check(results, 1)
    for result in results:
        ours, theirs = result["norms"]
        assert torch.equal(ours, results[0]["norms"][0]), "ranks clip by different norms"
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)
        assert theirs > 0.1, "nothing was clipped"


@needs_fsdp_on_a_cpu
@pytest.mark.full
def test_hybrid_sharding():
    """Replicas of shards: [Replicate, Shard(0)]. Sums over the replicas as well would double every sketch."""
    check(run(beside_a_plain_copy, 4, kind="hybrid", steps=8, low_rank=APOLLO, options={}), 2)


@pytest.mark.parametrize(
    "low_rank",
    [
        pytest.param(APOLLO, marks=pytest.mark.full, id="apollo"),
        pytest.param(MINI, marks=pytest.mark.slow, id="mini"),
    ],
)
def test_tensor_parallel(low_rank):
    """Shard(1) of row-parallel weights, replicated biases beside them, norms that stay plain tensors."""
    results = run(beside_a_plain_copy, 2, kind="tensor", steps=8, low_rank=low_rank, options={})
    assert all(cut in results[0]["cut"].values() for cut in ([0], [1], "plain")), "the harness shards nothing"
    check(results, 1)


@needs_fsdp_on_a_cpu
@pytest.mark.full
def test_fsdp_and_tensor_parallel():
    """A 2-D mesh, where FSDP2 cuts the shards of tensor parallelism once more along the same dimension, and some
    parameters lie on one mesh dimension only."""
    check(run(beside_a_plain_copy, 4, kind="both", steps=8, low_rank=APOLLO, options={}), 2)


def whole_model_constructors(make):
    model, _, plain = parallel("fsdp", dist.get_world_size())
    options = {"rank": 4, "update_proj_gap": 5} if make == "apollo" else {"update_proj_gap": 5}
    optimizers = [getattr(optimizer_class(), make)(each, lr=1e-2, **options) for each in (model, plain)]
    for step in range(6):
        batch = tokens(step, dist.get_rank())
        model(input_ids=batch, labels=batch).loss.backward()
        for parameter, copied in zip(model.parameters(), plain.parameters(), strict=True):
            copied.grad = whole(parameter.grad)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    ranks = [{id(p): g.get("rank") for g in o.param_groups for p in g["params"]} for o in optimizers]
    return {
        "ours": {name: whole(parameter) for name, parameter in model.named_parameters()},
        "theirs": {name: whole(parameter) for name, parameter in plain.named_parameters()},
        "ranks": [[found[id(p)] for p in each.parameters()] for found, each in zip(ranks, (model, plain), strict=True)],
    }


@needs_fsdp_on_a_cpu
@pytest.mark.parametrize(
    "make", [pytest.param("apollo", marks=pytest.mark.slow), pytest.param("mini", marks=pytest.mark.full)]
)
def test_constructors_choose_the_same_weights_as_without_sharding(make):
    """``APOLLOAdamW.apollo(model)`` after fully_shard: module names that FSDP changes, ranks checked against shards."""
    results = run(whole_model_constructors, 2, make=make)
    assert_ranks_agree([result["ours"] for result in results])
    for result in results:
        assert result["ranks"][0] == result["ranks"][1]
        assert any(result["ranks"][0])
        assert_close(result["ours"], result["theirs"], 1e-6, make)


def accumulated(steps):
    """Two backward passes a step, the first without gradient synchronisation."""
    model, _, plain = parallel("fsdp", dist.get_world_size())
    optimizer = optimizer_class()(groups_of(model, APOLLO), lr=1e-2)
    shadow = optimizer_class()(groups_of(plain, APOLLO), lr=1e-2)
    for step in range(steps):
        for part in range(2):
            model.set_requires_gradient_sync(part == 1)
            batch = tokens(10 * step + part, dist.get_rank())
            model(input_ids=batch, labels=batch).loss.backward()
        for parameter, copied in zip(model.parameters(), plain.parameters(), strict=True):
            assert parameter.grad.placements == (Shard(0),)
            copied.grad = whole(parameter.grad)
        optimizer.step()
        shadow.step()
        optimizer.zero_grad()
    return {name: (whole(p), q.detach()) for (name, p), q in zip(model.named_parameters(), plain.parameters(),
            strict=True)}  # fmt: skip


@needs_fsdp_on_a_cpu
@pytest.mark.slow
def test_gradient_accumulation_under_fsdp():
    """A kept plan that holds on to the address of a gradient of an earlier pass."""
    for result in run(accumulated, 2, steps=6):
        assert_close({name: pair[0] for name, pair in result.items()}, {name: pair[1] for name, pair in result.items()},
                     1e-6, "accumulated")  # fmt: skip
