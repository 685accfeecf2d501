"""Int8Linear and quantize_model: what a user does with a model, from conversion to checkpoint."""

from __future__ import annotations

import copy
import io

import pytest
import torch
import torch.distributed as dist
from distributed_cases import Collectives, assert_ranks_agree, drawn
from distributed_harness import run
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from apollo_triton import APOLLOAdamW, attach_layerwise, dequantize_model, quantize_model
from apollo_triton.int8.layers import Int8Linear
from apollo_triton.int8.weight import Int8Weight, dequantized


def net(dtype=torch.float32):
    """Two layers to convert, one that is not, of drawn weights."""
    model = nn.ModuleDict(
        {"mlp": nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 24, bias=False)), "head": nn.Linear(24, 5)}
    )
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(drawn(tuple(parameter.shape), name) * 0.3)
    return model.to(dtype)


def through(model, x):
    return model["head"](x + model["mlp"](x))


def optimizer_of(model, **options):
    low_rank = [layer.weight for layer in model["mlp"] if isinstance(layer, nn.Linear)]
    rest = [each for each in model.parameters() if not any(each is other for other in low_rank)]
    groups = [{"params": low_rank, "rank": 4, "update_proj_gap": 3}, {"params": rest}]
    return APOLLOAdamW(groups, **({"lr": 1e-2} | options))


def train(model, optimizer, steps):
    for step in steps:
        through(model, drawn((6, 24), "x", step).to(model["head"].weight.dtype)).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def bits(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(24,), (7, 24), (2, 3, 24), (0, 24)])
def test_a_layer_computes_as_its_dequantised_twin(dtype, shape, monkeypatch):
    """Forward and all three gradients, over several blocks of rows; a gradient in another dtype or layout."""
    monkeypatch.setattr("apollo_triton.int8.weight.BLOCK_ELEMENTS", 100)
    int8 = quantize_model(net(dtype), group_size=8)["mlp"][0]
    plain = dequantize_model(copy.deepcopy(nn.ModuleDict({"a": int8})))["a"]
    assert type(plain) is nn.Linear
    ends = []
    for layer in (int8, plain):
        x = drawn(shape, "x").to(dtype).requires_grad_()
        y = layer(x)
        (y * drawn((*shape[:-1], 40), "g").to(dtype)).sum().backward()
        ends.append((y.detach(), x.grad, layer.weight.grad, layer.bias.grad))
    tolerance = {"rtol": 1e-5, "atol": 1e-5} if dtype == torch.float32 else {"rtol": 2e-2, "atol": 2e-2}
    for mine, theirs in zip(*ends, strict=True):
        assert mine.dtype == theirs.dtype == dtype
        assert type(mine) is torch.Tensor
        torch.testing.assert_close(mine, theirs, **tolerance)


def test_autocast_and_accumulation():
    """Activations in bfloat16 over a float32 weight, whose gradients add up in float32."""
    model = quantize_model(net(), group_size=8)
    for _ in range(2):
        with torch.autocast("cpu", torch.bfloat16):
            y = through(model, drawn((6, 24), "x"))
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
    weight = model["mlp"][0].weight
    assert weight.grad.dtype == torch.float32
    once = quantize_model(net(), group_size=8)
    with torch.autocast("cpu", torch.bfloat16):
        y = through(once, drawn((6, 24), "x"))
    y.float().sum().backward()
    torch.testing.assert_close(weight.grad, 2 * once["mlp"][0].weight.grad)
    with pytest.raises(RuntimeError, match=r"the input has dtype torch\.bfloat16"):
        model["mlp"](drawn((6, 24), "x").bfloat16())


def test_gradients_reach_hooks_and_clipping():
    model = quantize_model(net(), group_size=8)
    seen = []
    model["mlp"][0].weight.register_hook(lambda gradient: seen.append(tuple(gradient.shape)))
    model["mlp"][0].weight.register_post_accumulate_grad_hook(lambda weight: seen.append(type(weight)))
    through(model, drawn((6, 24), "x")).sum().backward()
    assert seen == [(40, 24), Int8Weight]
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
    assert norm > 1e-3
    assert torch.nn.utils.get_total_norm([p.grad for p in model.parameters()]) == pytest.approx(1e-3, rel=1e-3)


def test_quantize_model_converts_what_it_is_told_to():
    model = net()
    model["mlp"][2].weight.requires_grad_(False)
    start = bits(model)
    assert quantize_model(model, group_size=8, stochastic_rounding=False) is model
    kinds = [type(model["mlp"][0]), type(model["mlp"][2]), type(model["head"])]
    assert kinds == [Int8Linear, Int8Linear, nn.Linear]
    first, last = model["mlp"][0].weight, model["mlp"][2].weight
    assert (first.requires_grad, last.requires_grad) == (True, False)
    assert isinstance(first, nn.Parameter)
    assert not first.stochastic_rounding
    assert {name for name, _ in model.named_parameters()} == {name for name, _ in net().named_parameters()}
    step = first.scale.max()
    assert (first.dequantize() - start["mlp.0.weight"]).abs().max() <= 0.51 * step
    assert "int8, group_size=8" in repr(model)
    quantize_model(model, "head", group_size=5)
    assert type(model["head"]) is Int8Linear


def test_tied_layers_share_the_int8_weight():
    model = net()
    model["mlp"].append(nn.Tanh()).append(nn.Linear(24, 40))
    model["mlp"][4].weight = model["mlp"][0].weight
    quantize_model(model, group_size=8)
    assert model["mlp"][4].weight is model["mlp"][0].weight
    dequantize_model(model.eval())
    assert not any(module.training for module in model.modules())
    assert model["mlp"][4].weight is model["mlp"][0].weight
    assert type(model["mlp"][0]) is nn.Linear


def test_copies_moves_and_pickles_keep_every_bit():
    """Attributes that deepcopy, ``to``, ``swap_tensors`` or pickle drop, or a copy that shares memory."""
    model = quantize_model(net(torch.bfloat16), group_size=8, stochastic_rounding=False)
    train(model, optimizer_of(model), range(2))
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for other in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        assert same(bits(other), bits(model))
        weight = other["mlp"][0].weight
        assert (weight.group_size, weight.stochastic_rounding, weight.dtype) == (8, False, torch.bfloat16)
        assert weight.q.data_ptr() != model["mlp"][0].weight.q.data_ptr()
        train(other, optimizer_of(other), range(1))
        assert not same(bits(other), bits(model))
    before, weight = bits(model), model["mlp"][0].weight
    model.to(torch.float32)
    assert model["mlp"][0].weight is weight
    assert (weight.dtype, weight.q.dtype) == (torch.float32, torch.uint8)
    assert torch.equal(bits(model)["mlp.0.weight_q"], before["mlp.0.weight_q"])
    train(model, optimizer_of(model), range(2))  # an optimizer finds it under its own name still


def test_checkpoints_are_plain_tensors(tmp_path):
    """A subclass in a file: weights_only refuses it, and safetensors too."""
    safetensors = pytest.importorskip("safetensors.torch")
    model = quantize_model(net(), group_size=8)
    train(model, optimizer_of(model), range(2))
    assert all(type(value) is torch.Tensor for value in model.state_dict().values())
    torch.save(model.state_dict(), tmp_path / "model.pt")
    safetensors.save_file(model.state_dict(), tmp_path / "model.safetensors")
    for state in (torch.load(tmp_path / "model.pt", weights_only=True),
                  safetensors.load_file(tmp_path / "model.safetensors")):  # fmt: skip
        fresh = quantize_model(net(), group_size=8)
        assert not same(bits(fresh), bits(model))
        fresh.load_state_dict(state)
        assert same(bits(fresh), bits(model))
    float_one = quantize_model(nn.ModuleDict({name: copy.deepcopy(each) for name, each in net().items()}), group_size=8)
    float_one.load_state_dict(net().state_dict())  # a float checkpoint is rounded to the nearest
    assert same(bits(float_one), bits(quantize_model(net(), group_size=8)))


def test_a_model_on_the_meta_device_is_filled_without_a_float_copy():
    model = net()
    with torch.device("meta"):
        empty = net()
    quantize_model(empty, group_size=8)
    assert empty["mlp"][0].weight.is_meta
    empty.to_empty(device="cpu")
    empty.load_state_dict(model.state_dict())
    assert same(bits(empty), bits(quantize_model(model, group_size=8)))


def test_resuming_from_a_checkpoint_is_exact(tmp_path):
    model = quantize_model(net(torch.bfloat16), group_size=8)
    optimizer = optimizer_of(model)
    train(model, optimizer, range(4))
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "run.pt")
    train(model, optimizer, range(4, 8))
    resumed = quantize_model(net(torch.bfloat16), group_size=8)
    continued = optimizer_of(resumed)
    saved = torch.load(tmp_path / "run.pt", weights_only=True)
    resumed.load_state_dict(saved["model"])
    continued.load_state_dict(saved["optimizer"])
    train(resumed, continued, range(4, 8))
    assert same(bits(resumed), bits(model))


def test_layerwise_updates_are_the_same():
    ends = []
    for layerwise in (False, True):
        model = quantize_model(net(), group_size=8)
        optimizer = optimizer_of(model)
        if layerwise:
            attach_layerwise(model, optimizer)
        train(model, optimizer, range(4))
        ends.append(bits(model))
    assert same(*ends)


def test_no_float_copy_of_a_weight_is_made(monkeypatch):
    """A forward, backward or step that dequantises a whole weight: what int8 is there to avoid."""
    monkeypatch.setattr("apollo_triton.int8.weight.BLOCK_ELEMENTS", 64)
    monkeypatch.setattr("apollo_triton.core.scratch.BLOCK_ELEMENTS", 64)
    model = quantize_model(net(), group_size=8)
    largest = []

    def watched(q, scale, zero):
        largest.append(q.numel())
        return dequantized(q, scale, zero)

    monkeypatch.setattr("apollo_triton.int8.weight.dequantized", watched)
    train(model, optimizer_of(model), range(2))
    assert max(largest) <= 64


def trained_once():
    """Weights that an update has rounded stochastically: their groups do not end where their grids do."""
    model = quantize_model(net(), group_size=8)
    train(model, optimizer_of(model), range(1))
    return model


def under_ddp(steps, **options):
    """Training that begins with the weights of rank 0: what they are after the first broadcast, and at the end."""
    model = trained_once()
    if dist.get_rank():
        with torch.no_grad():
            for name, part in model.state_dict().items():
                part.copy_(part + 1 if "scale" not in name else part * 2)
    wrapped = DistributedDataParallel(Wrapper(model), **options)
    start = bits(model)
    optimizer = optimizer_of(model)
    counts = []
    for step in range(steps):
        wrapped(drawn((6, 24), "x", step, dist.get_rank())).square().mean().backward()
        with Collectives() as collectives:
            optimizer.step()
        counts.append(collectives.total)
        optimizer.zero_grad()
    return start, bits(model), counts


class Wrapper(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, x):
        return through(self.model, x)


def alone(steps):
    model = trained_once()
    optimizer = optimizer_of(model)
    for step in range(steps):
        sum(through(model, drawn((6, 24), "x", step, rank)).square().mean() / 2 for rank in range(2)).backward()
        optimizer.step()
        optimizer.zero_grad()
    return bits(model)


def test_distributed_data_parallel():
    """Weights that the first broadcast rounds anew; ranks whose stochastic rounding differs."""
    results = run(under_ddp, 2, steps=4)
    assert_ranks_agree([values for _, values, _ in results])
    for start, values, counts in results:
        assert same(start, bits(trained_once()))
        assert sum(counts) == 0
        for name, expected in alone(4).items():
            apart = (values[name].float() - expected.float()).abs().max()
            assert apart <= (1 if expected.dtype == torch.uint8 else 1e-5), name


def under_fsdp():
    mesh = init_device_mesh("cpu", (2,))
    flat = FullyShardedDataParallel(Wrapper(net()), device_id=torch.device("cpu"), use_orig_params=True)
    wrapped = DistributedDataParallel(Wrapper(net()))
    tensors = Wrapper(net())
    tensors.model["mlp"][0].weight = nn.Parameter(distribute_tensor(net()["mlp"][0].weight.detach(), mesh, [Shard(0)]))
    for sharded, text in (
        (flat, r"mlp\.0 cannot become int8: FSDP has sharded the model; call .* before fully_shard"),
        (fully_shard(Wrapper(net()), mesh=mesh), r"mlp\.0 cannot become int8: FSDP has sharded the model"),
        (tensors, r"mlp\.0 cannot become int8: its weight is sharded, a DTensor; call .* before parallelize_module"),
        (wrapped, r"the model is a DistributedDataParallel, .* before wrapping"),
    ):
        before = [type(module) for module in sharded.modules()]
        with pytest.raises(ValueError, match=text):
            quantize_model(sharded, group_size=8)
        assert [type(module) for module in sharded.modules()] == before
    return True


def test_shards_are_not_converted():
    """DDP and FSDP would keep the old parameters."""
    assert run(under_fsdp, 2) == [True, True]


def test_a_hugging_face_llama_trains(tmp_path):
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file

    config = transformers.LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                                      num_key_value_heads=2, vocab_size=64, max_position_embeddings=32)  # fmt: skip
    torch.manual_seed(0)
    model = quantize_model(transformers.LlamaForCausalLM(config), group_size=32)
    optimizer = APOLLOAdamW.mini(model, lr=2e-2, scale=8.0)
    tokens = torch.randint(64, (4, 16), generator=torch.Generator().manual_seed(0))
    losses = []
    for _ in range(30):
        loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss))
    assert losses[-1] < 0.6 * losses[0]

    # from_pretrained of a float model took the codes for weights. It is handed on as docs/int8.md shows.
    model.save_pretrained(tmp_path / "int8", max_shard_size="5KB")
    _, found = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "int8", output_loading_info=True)
    int8_names = {name for name, weight in model.named_parameters() if isinstance(weight, Int8Weight)}
    assert len(int8_names) == 14
    assert set(found["missing_keys"]) == int8_names
    loaded = quantize_model(transformers.LlamaForCausalLM(config), group_size=32)
    files = sorted((tmp_path / "int8").glob("*.safetensors"))
    assert len(files) > 4
    for file in files:
        loaded.load_state_dict(load_file(file), strict=False)
    assert same(bits(loaded), bits(model))
    dequantize_model(loaded).save_pretrained(tmp_path / "float")
    handed, found = transformers.LlamaForCausalLM.from_pretrained(tmp_path / "float", output_loading_info=True)
    assert not found["missing_keys"]
    assert not found["unexpected_keys"]
    torch.testing.assert_close(handed(tokens).logits, loaded.eval()(tokens).logits)


def test_a_float_checkpoint_streams_into_an_int8_model(tmp_path):
    """As docs/int8.md shows it: file by file into a model that never was a float one."""
    transformers = pytest.importorskip("transformers")
    from safetensors.torch import load_file
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = transformers.LlamaConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
                                      vocab_size=64, max_position_embeddings=32)  # fmt: skip
    source = transformers.LlamaForCausalLM(config)
    source.save_pretrained(tmp_path, max_shard_size="20KB")
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(config)
    quantize_model(model, group_size=32).to_empty(device="cpu")
    for file in files:
        model.load_state_dict(load_file(file), strict=False)
    model.model.rotary_emb = LlamaRotaryEmbedding(config)
    tokens = torch.arange(12)[None]
    expected = quantize_model(source, group_size=32).eval()(input_ids=tokens).logits
    assert torch.equal(model.eval()(input_ids=tokens).logits, expected)


def test_a_layer_of_two_names_stays_one_and_keeps_its_hooks():
    """Two layers where there was one, whose weights then part; hooks that are gone."""
    layer, calls = nn.Linear(16, 8), []
    layer.register_forward_hook(lambda *arguments: calls.append("forward"))
    handle = layer.register_full_backward_hook(lambda *arguments: calls.append("backward"))
    model = nn.ModuleDict({"mlp": layer, "other": layer})
    for convert, kind in ((lambda: quantize_model(model, ["mlp"], group_size=8), Int8Linear),
                          (lambda: dequantize_model(model), nn.Linear)):  # fmt: skip
        convert()
        assert type(model["mlp"]) is kind
        assert model["mlp"] is model["other"]
        model["mlp"](torch.ones(2, 16, requires_grad=True)).sum().backward()
        assert calls == ["forward", "backward"]
        calls.clear()
    handle.remove()
    model["mlp"](torch.ones(2, 16, requires_grad=True)).sum().backward()
    assert calls == ["forward"]
