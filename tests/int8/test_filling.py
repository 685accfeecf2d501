"""``load_float_weights``: models of the meta device, int8 or not, sharded or not, filled from a float checkpoint."""

from __future__ import annotations

import json
import weakref

import pytest
import torch
from distributed_cases import drawn, needs_fsdp_on_a_cpu, whole
from distributed_harness import run
from int8_models import bits, same
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from apollo_triton import load_float_weights, quantize_model
from apollo_triton.int8 import weight as int8

safetensors = pytest.importorskip("safetensors.torch")


class Net(nn.Module):
    """Two layers that become int8, one that does not and shares its weight with an embedding, vectors and buffers."""

    def __init__(self):
        super().__init__()
        self.embedding, self.norm = nn.Embedding(6, 16), nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 32), nn.Linear(32, 16, bias=False)
        self.head = nn.Linear(16, 6, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("positions", torch.arange(4.0), persistent=False)


def floats(dtype=torch.float32):
    model = Net()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(drawn(tuple(parameter.shape), name) * 0.3)
    return model.to(dtype)


def saved(path, model=None, **more):
    state = {name: tensor for name, tensor in (model or floats()).state_dict().items() if name != "head.weight"}
    safetensors.save_file(state | more, path)
    return path


def on_meta(dtype=torch.float32):
    with torch.device("meta"):
        model = Net().to(dtype)
    model.head.weight = model.embedding.weight
    return quantize_model(model, ["up", "down"], group_size=8)


def emptied(model):
    model.to_empty(device="cpu")
    model.head.weight = model.embedding.weight  # which to_empty has untied
    return model


def expected(dtype=torch.float32):
    return bits(quantize_model(floats(dtype), ["up", "down"], group_size=8))


@pytest.mark.parametrize("how", ["file", "files", "folder", "index", "folder with an index"])
def test_every_form_of_a_checkpoint(tmp_path, how):
    """A file that is not read, and one that an index leaves out."""
    state = {name: tensor for name, tensor in floats(torch.bfloat16).state_dict().items() if name != "head.weight"}
    names = sorted(state)
    first, second = tmp_path / "a.safetensors", tmp_path / "b.safetensors"
    safetensors.save_file({name: state[name] for name in names[:3]}, first)
    safetensors.save_file({name: state[name] for name in names[3:]}, second)
    files = {"files": [first, str(second)], "folder": tmp_path}.get(how)
    if how == "file":
        files = saved(tmp_path / "whole.safetensors", floats(torch.bfloat16))
    elif "index" in how:
        safetensors.save_file({"left over": torch.ones(2)}, tmp_path / "consolidated.safetensors")
        index = tmp_path / "model.safetensors.index.json"
        places = {name: (first if name in names[:3] else second).name for name in names}
        index.write_text(json.dumps({"weight_map": places}))
        files = index if how == "index" else tmp_path
    model = emptied(on_meta(torch.bfloat16))
    load_float_weights(model, files)
    assert same(bits(model), expected(torch.bfloat16))
    assert model.head.weight is model.embedding.weight


class LiveBytes(TorchDispatchMode):
    """The most bytes that were alive at once of what operations have made. What lies in a file is not."""

    def __init__(self):
        super().__init__()
        self.alive, self.peak, self.in_files = {}, 0, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if not isinstance(tensor, torch.Tensor):
                continue
            storage = tensor.untyped_storage()
            if function is torch.ops.aten.set_.source_Storage:
                self.in_files.add(storage._cdata)
            if storage._cdata not in self.alive and storage._cdata not in self.in_files:
                self.alive[storage._cdata] = storage.nbytes()
                weakref.finalize(storage, self.alive.pop, storage._cdata, None)
        self.peak = max(self.peak, sum(self.alive.values()))
        return result


def test_no_weight_is_ever_in_floats(tmp_path, monkeypatch):
    """A whole weight, or a whole shard, in floats: of 70 billion parameters a card has no room for it."""
    monkeypatch.setattr(int8, "BLOCK_ELEMENTS", 64)
    path = saved(tmp_path / "a.safetensors")
    model = emptied(on_meta())
    with LiveBytes() as live:
        load_float_weights(model, path)
    assert same(bits(model), expected())
    assert 64 * 4 < live.peak <= 12 * 64 * 4  # what quantising 64 elements takes; a weight is 512


def sharded_fill(path):
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))

    def by_tensor(model):
        return parallelize_module(model, mesh["tensor"], {"up": ColwiseParallel(), "down": RowwiseParallel()})

    def by_data(model, mesh):
        fully_shard(model.up, mesh=mesh)
        return fully_shard(model, mesh=mesh)  # the embedding has 6 rows: shards of 2, 2, 2 and 0, or of 3

    ways = {
        "fsdp": lambda model: by_data(model, init_device_mesh("cpu", (4,))),
        "hybrid": lambda model: by_data(model, mesh),
        "tensor": by_tensor,
        "both": lambda model: by_data(by_tensor(model), mesh["data"]),
    }
    wrong = []
    for way, shard in ways.items():
        model = emptied(shard(on_meta()))
        load_float_weights(model, path)
        if not same({name: whole(tensor) for name, tensor in model.state_dict().items()}, expected()):
            wrong.append(way)
    return wrong


@needs_fsdp_on_a_cpu
@pytest.mark.slow
def test_each_rank_reads_its_own_part(tmp_path):
    """Rows of another rank; groups counted from a shard's own beginning; columns that are cut as rows are."""
    assert run(sharded_fill, 4, path=str(saved(tmp_path / "a.safetensors"))) == [[]] * 4


def test_what_does_not_fit_is_refused_before_anything_changes(tmp_path):
    path = tmp_path / "a.safetensors"
    for spoil, text in (
        ({"up.weight": None}, r"the checkpoint lacks 'up\.weight'"),
        ({"embedding.weight": None}, r"the checkpoint lacks 'embedding\.weight'; .* model\.tie_weights"),
        ({"other": torch.ones(2)}, r"the checkpoint has 'other', which the model does not"),
        ({"up.weight_q": torch.ones(2)}, r"holds int8 weights \('up\.weight_q'\), which model\.load"),
        ({"up.weight": torch.ones(16, 32)}, r"up\.weight has shape \(16, 32\), and the model's \(32, 16\)"),
        ({"norm.weight": torch.ones(16, dtype=torch.int64)}, r"norm\.weight is I64, and is to be one of"),
        ({"count": torch.tensor(3.5)}, r"count is F32, and the model's torch\.int64"),
    ):
        state = {name: tensor for name, tensor in floats().state_dict().items() if name != "head.weight"} | spoil
        safetensors.save_file({name: tensor for name, tensor in state.items() if tensor is not None}, path)
        model = quantize_model(Net(), ["up", "down"], group_size=8)
        before = bits(model)
        with pytest.raises(ValueError, match=text):
            load_float_weights(model, path)
        assert same(bits(model), before)
    saved(path)
    with pytest.raises(ValueError, match=r"embedding\.weight is on the meta device; model\.to_empty.*; and 4 more$"):
        load_float_weights(on_meta(), path)
    state = floats().state_dict() | {"up.weight": torch.full((32, 16), float("nan"))}
    safetensors.save_file({name: tensor for name, tensor in state.items() if name != "head.weight"}, path)
    with pytest.raises(
        ValueError, match=r"up\.weight has values that are NaN or infinite.*other weights are filled already"
    ):
        load_float_weights(quantize_model(Net(), ["up", "down"], group_size=8), path)
    safetensors.save_file({"count": torch.tensor(3)}, tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match=r"b\.safetensors has 'count' once more; name the files of one checkpoint"):
        load_float_weights(Net(), tmp_path)
    (tmp_path / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"config\.json is no index of safetensors files"):
        load_float_weights(Net(), tmp_path / "config.json")
    with pytest.raises(FileNotFoundError, match=r"no \.safetensors file"):
        load_float_weights(Net(), tmp_path / "..")


def test_buffers_that_no_state_dict_holds(tmp_path):
    """Read where the file has them, and else left as they are."""
    model = quantize_model(Net(), ["up", "down"], group_size=8)
    model.positions.fill_(7)
    load_float_weights(model, saved(tmp_path / "a.safetensors"))
    assert model.positions.tolist() == [7] * 4
    load_float_weights(model, saved(tmp_path / "a.safetensors", positions=torch.full((4,), 5.0)))
    assert model.positions.tolist() == [5] * 4
    assert model.count == 3
