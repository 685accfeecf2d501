"""Activation memory: against bytes counted by hand, PyTorch's own tracker, and the same steps with real tensors."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from apollo_triton import quantize_model
from apollo_triton.tools.memory.activations import Allocations, AsOnCuda, Peak, training_peak

transformers = pytest.importorskip("transformers")
pytest.importorskip("transformers.modeling_utils")  # which torch 2.6 cannot import lazily, on the meta device

HIDDEN, VOCABULARY, LAYERS, HEADS = 128, 1024, 3, 4
BATCH, SEQUENCE = 2, 32
BOTH = pytest.mark.parametrize("layerwise", [True, False], ids=["layerwise", "plain"])


def make(dtype=torch.bfloat16, attention="sdpa", device="meta", **changes):
    sizes = {"hidden_size": HIDDEN, "num_hidden_layers": LAYERS, "vocab_size": VOCABULARY, "tie_word_embeddings": False}
    config = transformers.LlamaConfig(
        **sizes | {"intermediate_size": 256, "num_attention_heads": HEADS, "attn_implementation": attention} | changes
    )
    with torch.device(device):
        return transformers.LlamaForCausalLM(config).to(dtype)


def rounded(size):
    return (size + 511) // 512 * 512


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_two_linear_layers_counted_by_hand(device):
    """Not rounded, counted twice, freed late; a gradient not told from other bytes, or kept though layer-wise."""

    def step(layerwise):
        model = nn.Sequential(nn.Linear(5, 1000, bias=False), nn.Linear(1000, 7, bias=False)).to(device)
        with Allocations(model, layerwise) as allocations:
            loss = model(torch.ones(3, 5, device=device)).square().sum()
            allocations.end_forward()
            loss.backward()
        assert all((parameter.grad is None) == layerwise for parameter in model.parameters())
        return allocations.peak()

    x, hidden, y, scalar = (rounded(4 * elements) for elements in (3 * 5, 3 * 1000, 3 * 7, 1))
    first, second = rounded(4 * 5 * 1000), rounded(4 * 7 * 1000)
    # Backward of the second layer: y is gone after the square's, and the gradients of loss, y and hidden are alive.
    assert step(True) == Peak(saved=x + hidden + scalar, working=scalar + y + hidden, gradients=second)
    # Backward of the first layer, which needs no gradient of x.
    assert step(False) == Peak(saved=x + scalar, working=scalar + hidden, gradients=first + second)


def test_a_tied_weight_has_one_gradient_and_a_frozen_one_has_none():
    layer = nn.Linear(64, 64, bias=False)
    layer.twin = nn.Linear(64, 64, bias=False)
    layer.twin.weight.requires_grad_(False)
    with Allocations(layer, layerwise=False) as allocations:
        loss = layer.twin(layer(layer(torch.ones(2, 64)))).sum()
        allocations.end_forward()
        loss.backward()
    assert layer.weight.grad is not None
    assert allocations.peak().gradients in (0, 4 * 64 * 64)  # 0: before the two are added up
    assert allocations.peak().total >= 2 * 4 * 64 * 64  # both summands


def real_step(model, layerwise, checkpointing):
    """The same step with real tensors and an unpatched model."""
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    with Allocations(model, layerwise) as allocations:
        tokens = torch.zeros(BATCH, SEQUENCE, dtype=torch.long)
        loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        allocations.end_forward()
        loss.backward()
    return allocations.peak()


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable")
@BOTH
@pytest.mark.parametrize("checkpointing", [True, False], ids=["checkpointing", "all kept"])
@pytest.mark.parametrize("vocabulary", [64, VOCABULARY])
def test_the_meta_device_allocates_what_real_tensors_do(checkpointing, layerwise, vocabulary):
    """Bytes of one kind of device alone, another mask, buffers taken for activations, copies between devices."""
    options = {"dtype": torch.float32, "attention": "eager", "vocab_size": vocabulary}
    traced = training_peak(make(**options), BATCH, SEQUENCE, checkpointing, layerwise)
    real = real_step(make(device="cpu", **options), layerwise, checkpointing)
    assert traced == real


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable")
@BOTH
def test_pytorchs_own_tracker_finds_the_same_total(layerwise):
    mem_tracker = pytest.importorskip("torch.distributed._tools.mem_tracker")
    model = make(torch.float32, "eager", "cpu")
    model.train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ours = real_step(model, layerwise, True)
    model.zero_grad()
    for parameter in model.parameters() if layerwise else []:
        parameter.register_post_accumulate_grad_hook(lambda parameter: setattr(parameter, "grad", None))
    tracker = mem_tracker.MemTracker()
    tracker.track_external(model)
    with tracker:
        tokens = torch.zeros(BATCH, SEQUENCE, dtype=torch.long)
        model(input_ids=tokens, labels=tokens, use_cache=False).loss.backward()
    found = {str(kind): size for kind, size in tracker.get_tracker_snapshot("peak")[torch.device("cpu")].items()}
    kept = sum(size for kind, size in found.items() if kind.endswith(("PARAM", "BUFFER", "Parameter", "Buffer")))
    assert ours.total == pytest.approx(found["Total"] - kept, abs=8 * 512)  # which rounds what is on a GPU alone


def test_a_checkpointed_layer_keeps_its_input_and_no_more():
    """Layers that are not checkpointed, or recomputed twice over."""
    peaks = [training_peak(make(num_hidden_layers=layers), BATCH, SEQUENCE) for layers in (3, 4)]
    assert peaks[1].saved - peaks[0].saved == 2 * BATCH * SEQUENCE * HIDDEN
    assert (peaks[1].working, peaks[1].gradients) == (peaks[0].working, peaks[0].gradients)
    kept = training_peak(make(), BATCH, SEQUENCE, checkpointing=False)
    assert kept.total - peaks[0].total == kept.saved - peaks[0].saved
    # At least the inputs of q, k and v, of gate and up, of o and of down, which are all kept then.
    assert kept.saved - peaks[0].saved > LAYERS * 2 * BATCH * SEQUENCE * (3 * HIDDEN + 256)


def test_layerwise_holds_one_gradient_instead_of_all():
    model = make(vocab_size=4096)
    one, all_ = (training_peak(model, 1, 1, layerwise=layerwise) for layerwise in (True, False))
    assert one.gradients == 2 * 4096 * HIDDEN  # the head's or the embedding's
    assert all_.gradients == sum(rounded(parameter.nbytes) for parameter in model.parameters())


def test_weights_without_gradients_have_none_at_the_peak():
    """At a small vocabulary the largest gradient is an MLP's, [128, 256]: without it an embedding's of [64, 128] is."""
    model = make(vocab_size=64)
    layers = [name for name, each in model.named_modules() if isinstance(each, nn.Linear) and name != "lm_head"]
    freed, none = (training_peak(model, 1, 1, without_gradient=names) for names in ((), layers))
    assert freed.gradients == 2 * HIDDEN * 256
    assert none.gradients <= 2 * HIDDEN * 64
    assert not any("forward" in each.__dict__ for each in model.modules())


def test_the_loss_of_a_large_vocabulary_is_in_float32():
    """At 32 more tokens: their logits and float32 copies, not less than three of them, and not more than eight."""
    small, large = (training_peak(make(vocab_size=32768), 1, sequence) for sequence in (32, 64))
    assert 3 < (large.activations - small.activations) / (4 * 32 * 32768) < 8


class Kernels(torch.utils._python_dispatch.TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.names = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.names.add(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("dtype", "masked", "width", "kernel"),
    [
        (torch.bfloat16, False, 64, "flash"),
        (torch.float16, False, 256, "flash"),
        (torch.bfloat16, True, 64, "efficient"),
        (torch.float32, False, 64, "efficient"),
        (torch.bfloat16, False, 264, "efficient"),
    ],
)
def test_attention_is_cudas_kernel(dtype, masked, width, kernel):
    query, key = (torch.empty(2, heads, 256, width, dtype=dtype, device="meta") for heads in (4, 2))
    mask = torch.ones(256, 256, dtype=torch.bool, device="meta") if masked else None
    with Kernels() as kernels, Allocations(nn.Module(), layerwise=False) as allocations, AsOnCuda():
        result = F.scaled_dot_product_attention(query, key, key, mask, is_causal=not masked, enable_gqa=True)
    assert result.shape == query.shape
    assert f"_scaled_dot_product_{kernel}_attention" in kernels.names
    repeated = 0 if kernel == "flash" else 2 * query.nbytes  # the flash kernel takes fewer heads of keys and values
    allocated = allocations.peak().total - query.nbytes - repeated
    scores = 2 * 4 * 256 * 256 * query.element_size()
    assert 0 < allocated < max(scores / 2, query.nbytes)  # logsumexps, and the mask as floats: no scores


def test_flash_attention_keeps_no_scores():
    """Output, a float32 logsumexp a row, and the state of the random numbers: no 256 x 256 matrix."""
    query, key, value = (
        torch.empty(2, 4, 256, 64, dtype=torch.bfloat16, device="meta", requires_grad=True) for _ in range(3)
    )
    with Allocations(nn.Module(), layerwise=False) as allocations, AsOnCuda():
        result = F.scaled_dot_product_attention(query, key, value, is_causal=True)
    assert result.shape == query.shape
    assert allocations.peak() == Peak(2 * 2 * 4 * 256 * 64 + 4 * 2 * 4 * 256 + 2 * 512, 0, 0)


def test_the_models_attention_takes_the_flash_kernel_in_backward_too():
    """A mask made of positions, or a recomputation without the patch, which would fail or keep scores."""
    with Kernels() as kernels:
        training_peak(make(), 1, 64)
    assert {name for name in kernels.names if "scaled_dot_product" in name} == {
        "_scaled_dot_product_flash_attention",
        "_scaled_dot_product_flash_attention_backward",
    }


def test_a_move_to_the_device_where_it_is_allocates_nothing():
    with Allocations(nn.Module(), layerwise=False) as allocations, AsOnCuda():
        x = torch.ones(64, 64, device="meta", requires_grad=True)
        moved = x.to(x.device)
        assert allocations.peak().total == 4 * 64 * 64
        narrow = moved.to(x.device, torch.bfloat16)
        assert allocations.peak().total == (4 + 2) * 64 * 64
        narrow.sum().backward()
    assert x.grad.shape == x.shape


def test_the_model_stays_as_it_is():
    model = make().eval()
    training_peak(model, 1, 8, layerwise=False)
    assert not model.training
    assert not any(getattr(module, "gradient_checkpointing", False) for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_what_cannot_be_traced_is_named():
    model = make()
    for batch, sequence, message in ((0, 8, r"batch=0 \(allowed: 1 or more\)"), (1, -1, "sequence=-1")):
        with pytest.raises(ValueError, match=message):
            training_peak(model, batch, sequence)
    with pytest.raises(ValueError, match="weight is on cpu: give a model on the meta device"):
        training_peak(nn.Linear(2, 2), 1, 8)
    with pytest.raises(ValueError, match="a Linear takes no input_ids and labels"):
        training_peak(nn.Linear(2, 2, device="meta"), 1, 8)
    with pytest.raises(ValueError, match="a LlamaModel takes no input_ids and labels"):
        training_peak(model.model, 1, 8)
    model.model.norm.register_forward_hook(lambda module, arguments, result: print(result.sum().item()))
    with pytest.raises(ValueError, match="a LlamaForCausalLM cannot be traced without its values: "):
        training_peak(model, 1, 8)
    with pytest.raises(ValueError, match=r"q_proj\.weight is a .*: trace the model before quantize_model"):
        training_peak(quantize_model(make()), 1, 8)
