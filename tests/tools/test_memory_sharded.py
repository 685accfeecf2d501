"""``apollo-triton memory --gpus``: the prediction without memory against real ranks, part by part and byte by byte.

The ranks train a small LLaMA over gloo, and the same code follows their real tensors. Attention is written out in
PyTorch, since the fused kernels of a CPU and of CUDA keep different things; test_activations.py has CUDA's.
"""

from __future__ import annotations

import argparse
import copy
import functools
import json
import warnings

import pytest
import torch
from distributed_cases import needs_fsdp_on_a_cpu
from distributed_harness import run
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.device_mesh import init_device_mesh

from apollo_triton import APOLLOAdamW, quantize_model
from apollo_triton.tools import options as options_of
from apollo_triton.tools.memory import alike, command, many_cards, sharded
from apollo_triton.tools.memory.fake_world import fake_mesh
from apollo_triton.tools.memory.live_step import (
    GATHERED,
    GRADIENTS,
    REDUCING,
    SHARDED_GRADIENTS,
    STATE,
    UNSHARDED,
    UPDATE,
    WEIGHTS,
    LiveStep,
)
from apollo_triton.tools.memory.sharded import Setup
from apollo_triton.tools.memory.sharding import fake_of, shard

transformers = pytest.importorskip("transformers")
pytestmark = needs_fsdp_on_a_cpu

HIDDEN, INNER, VOCABULARY, TOKENS, GROUP = 64, 96, 257, 32, 16  # 257 rows make uneven shards
FULL = pytest.mark.full


def llama(device="meta", layers=2, int8=False, vocabulary=VOCABULARY, tied=False):
    config = transformers.LlamaConfig(
        hidden_size=HIDDEN,
        intermediate_size=INNER,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=vocabulary,
        tie_word_embeddings=tied,
        attn_implementation="eager",
    )
    with torch.device(device):
        model = transformers.LlamaForCausalLM(config).to(torch.bfloat16)
    return quantize_model(model, group_size=GROUP) if int8 else model


def real(setup, int8, vocabulary):
    """On one rank: two steps with real tensors."""
    mesh = init_device_mesh("cpu", tuple(setup.mesh.values()), mesh_dim_names=tuple(setup.mesh))
    tokens = torch.zeros(1, TOKENS, dtype=torch.long)
    return sharded.train(llama("cpu", int8=int8, vocabulary=vocabulary), setup, mesh, tokens).result()


@functools.cache
def predicted(setup, int8=False, vocabulary=VOCABULARY):
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a user would see them
        return sharded.predicted(llama(int8=int8, vocabulary=vocabulary), setup, 1, TOKENS, on_cuda=False)


CASES = {
    "FSDP2": (Setup(2), False),
    "FSDP2, layer-wise, int8, checkpointed": (Setup(2, layerwise=True, checkpointing=True), True),
    "FSDP2, layer-wise": (Setup(2, layerwise=True), False),
    "FSDP2, int8": (Setup(2), True),
    "FSDP2, 8-bit moments": (Setup(2, state_bits=8), False),
    "FSDP2, everything": (Setup(2, layerwise=True, state_bits=8, checkpointing=True), True),
    "FSDP2, rank 8": (Setup(2, rank=8), False),
    "FSDP2, rows of embeddings": (Setup(2, embeddings="rows"), False),
    "FSDP2 of 4": (Setup(4), False),
    "AdamW": (Setup(2, adamw=True), False),
    "HSDP": (Setup(4, "hsdp"), False),
    "HSDP, layer-wise, int8": (Setup(4, "hsdp", layerwise=True), True),
    "tensor parallel": (Setup(2, "tp"), False),
    "tensor parallel, layer-wise, int8": (Setup(2, "tp", layerwise=True, checkpointing=True), True),
}
DEFAULT = "FSDP2, layer-wise, int8, checkpointed"


@pytest.mark.slow
@pytest.mark.parametrize("name", [each if each == DEFAULT else pytest.param(each, marks=FULL) for each in CASES])
def test_every_part_is_that_of_a_real_run(name):
    """A part that is counted twice or not at all, a buffer that FSDP2 holds longer than was thought, a collective that
    is not seen."""
    setup, int8 = CASES[name]
    vocabulary = 256 if setup.state_bits == 8 else VOCABULARY  # whole blocks of 256 moments a rank
    first, *others = run(real, setup.gpus, setup=setup, int8=int8, vocabulary=vocabulary)
    assert sum(first.parts.values()) >= max(sum(rank.parts.values()) for rank in others)  # the first rank holds most
    expected = predicted(setup, int8, vocabulary)
    if setup.state_bits == 8:  # bitsandbytes' moments are copied before an update, except on a CPU
        first.parts[UPDATE] = expected.parts[UPDATE]
    assert expected == first


def weights_of(model):
    return {name: weight.numel() for name, weight in model.named_parameters()}


@pytest.mark.slow
def test_the_parts_are_what_they_are_called():
    """A part under another's name would still be the same in both runs. Expected by arithmetic, over two ranks."""
    sizes = weights_of(llama())
    found = predicted(*CASES["FSDP2"])
    even = sum(size // 2 for name, size in sizes.items() if "embed" not in name and "head" not in name)
    piece = (VOCABULARY // 2 + 1) * HIDDEN  # of embedding and head
    assert found.parts[WEIGHTS] == 2 * (even + 2 * piece)
    # FSDP2 gathers each weight for forward and backward, the embedding too, whose backward needs none. The root's norm
    # stays. Each brings half, and so does the reduction of gradients. Uneven pieces are padded.
    padded = sum(sizes.values()) + 2 * HIDDEN
    norm = sizes["model.norm.weight"]
    assert found.received["model"] == 2 * (3 * padded - norm) // 2
    # Forward gathers five units, backward all except the root, and each reduces once.
    assert found.exchanges["model"] == 5 + 4 + 5
    # Moments are cut in two, those of uneven pieces after padding. Each low-rank weight has a norm on every rank.
    summary = APOLLOAdamW.mini(llama()).summary()
    moments = sum(row.moment_bytes for row in summary.rows) + 8 * 2 * HIDDEN
    assert found.parts[STATE] == moments // 2 + 4 * len(summary.low_rank)
    # The peak is in the backward of the last layer, whose attention comes next. The layer before is gathered, and the
    # head is being reduced.
    layer = {name: size for name, size in sizes.items() if name.startswith("model.layers.0.")}
    assert found.parts[UNSHARDED] == 2 * (sum(layer.values()) + norm)
    assert found.parts[GATHERED] == 2 * sum(layer.values())
    done = sum(size for name, size in layer.items() if "mlp" in name or "post_attention" in name) + norm
    assert found.parts[GRADIENTS] == 2 * done
    assert found.parts[REDUCING] == 2 * 2 * piece
    assert found.parts[SHARDED_GRADIENTS] == 2 * piece
    freed = predicted(*CASES["FSDP2, layer-wise, int8, checkpointed"])
    assert SHARDED_GRADIENTS not in freed.parts
    assert freed.parts[STATE] == found.parts[STATE]


@pytest.mark.slow
def test_int8_weights_are_kept_and_gathered_as_codes():
    matrices = sum(size for name, size in weights_of(llama()).items() if "proj" in name)
    plain = predicted(*CASES["FSDP2"])
    int8 = predicted(*CASES["FSDP2, layer-wise, int8, checkpointed"])
    scales = 5 * matrices // GROUP  # a float32 and a byte for each group
    saved = 2 * matrices - (matrices + scales)
    assert plain.parts[WEIGHTS] - int8.parts[WEIGHTS] == saved // 2
    assert plain.received["model"] - int8.received["model"] == 2 * saved // 2  # two gathers, half from the other rank


@pytest.mark.full
@pytest.mark.parametrize("on_cuda", [True, False])
def test_few_layers_tell_of_many(on_cuda, monkeypatch):
    """What is extended from few layers is what a model of more holds: which moment is the peak may change."""
    monkeypatch.setattr(alike, "FEW", (4, 5, 6))
    model, setup = llama(layers=8), Setup(2, layerwise=True, checkpointing=True)
    few = [sharded.followed(sharded._with_layers(model, count), setup, 1, TOKENS, on_cuda, True) for count in alike.FEW]
    whole = sharded.followed(copy.deepcopy(model), setup, 1, TOKENS, on_cuda).result()
    assert alike.extended(few, 8) == whole


def test_layers_that_differ_are_not_extended():
    model = llama(layers=3)
    assert alike.like_layers(model) is model.model.layers
    model.config.layer_types = ["full_attention", "sliding_attention", "full_attention"]
    assert alike.like_layers(model) is None
    model.config.layer_types = None
    model.model.layers[1].mlp.up_proj = torch.nn.Linear(HIDDEN, 2 * INNER, bias=False, device="meta")
    assert alike.like_layers(model) is None


@pytest.mark.parametrize("how", ["tp", pytest.param("fsdp2", marks=FULL)])
def test_a_tied_head_stays_the_embedding(how):
    """Tensor parallelism cut it twice, and counted it twice."""
    model = llama(layers=1, tied=True)
    with fake_mesh(shards=2) as mesh, FakeTensorMode():
        model = fake_of(model)
        shard(model, how, mesh)
    weight = model.lm_head.weight
    assert weight is model.model.embed_tokens.weight
    assert weight.to_local().shape == (VOCABULARY // 2 + 1, HIDDEN)


def config_of(folder, **changes):
    path = folder / "config.json"
    path.write_text(json.dumps(llama().config.to_dict() | {"attn_implementation": None} | changes))
    return str(path)


def memory(*arguments):
    parser = argparse.ArgumentParser()
    options_of.memory(parser)
    return command.run(parser.parse_args(arguments))


@pytest.mark.slow
def test_a_users_own_model(tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "60")
    arguments = ["--model", config_of(tmp_path), "--gpus", "2", "--layerwise", "--checkpointing", "--tokens", "64"]
    assert memory(*arguments) == 0
    text = capsys.readouterr().out
    assert max(map(len, text.replace(str(tmp_path), "").splitlines())) <= 60
    assert memory(*arguments, "--json") == 0
    (found,) = json.loads(capsys.readouterr().out)
    assert found["total"] == sum(found["parts"].values())
    assert f"{found['total']:,}" in text
    assert found["setup"]["layerwise"] is True
    assert found["fits"] == {"24": True, "80": True}
    assert found["parts"][WEIGHTS] % 2 == 0


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--shard", "tp"], "without --gpus nothing is sharded.*add --gpus, or leave out --shard"),
        (["--tokens", "64"], "leave out --tokens"),
        (["--gpus", "2", "--single-card"], "leave out --gpus"),
        (["--gpus", "2", "--paper"], "leave out --gpus"),
        (["--gpus", "2", "--batch", "2"], "leave out --batch"),
        (["--gpus", "2", "--group-size", "64"], "add --int8"),
        (["--gpus", "1"], "--gpus 1: it must be 2 or more; leave it out for a single card"),
        (["--gpus", "6", "--shard", "hsdp", "--tokens", "0"], "--tokens 0: it must be an integer of 1 or more"),
        (["--gpus", "5", "--shard", "hsdp"], "5 GPUs with hsdp .*even number"),
        (["--gpus", "4", "--shard", "tp"], "num_key_value_heads=2 is no multiple of 4 GPUs"),
    ],
)
def test_what_does_not_go_together_is_refused_by_name(tmp_path, arguments, text):
    model = [] if "--paper" in arguments else ["--model", config_of(tmp_path)]
    with pytest.raises(ValueError, match=text):
        memory(*model, *arguments)


def test_a_process_that_has_a_process_group_is_told_so():
    with fake_mesh(shards=2), pytest.raises(ValueError, match="has a process group"):
        sharded.predicted(llama(), Setup(2), 1, TOKENS)


def test_the_reserve_is_what_the_page_says():
    assert {size: round(room / many_cards.GIB, 1) for size, room in many_cards.CARDS.items()} == {24: 22.0, 80: 77.5}


def test_the_engine_is_given_back():
    """Whoever counts in a program that trains later must not leave his hook there."""
    from apollo_triton.engine.agreement import Agreement
    from apollo_triton.engine.engine import Engine

    def patched():
        return Engine.run, Agreement.check, torch.UntypedStorage.resize_

    def stopped():
        model = torch.nn.Linear(2, 2)
        with FakeTensorMode(), LiveStep(model, torch.optim.SGD(model.parameters())):
            assert not any(one is other for one, other in zip(patched(), before, strict=True))
            raise RuntimeError("stop")

    before = patched()
    with pytest.raises(RuntimeError, match="stop"):
        stopped()
    assert patched() == before
