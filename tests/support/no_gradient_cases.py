"""Shared by the tests of steps without a gradient: known factors, whole small models, and a record of allocations."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from apollo_triton import APOLLOAdamW, apollo_param_groups, attach_layerwise

LR = 1e-2
GROUPS = {
    "mini": {"rank": 1, "scale_type": "tensor", "scale": 128.0},
    "rank 4": {"rank": 4},
    "rank 16": {"rank": 16, "scale": 2.0, "rank_above_width": True},
    "rademacher": {"rank": 5, "distribution": "rademacher", "scale_type": "tensor"},
    "left": {"rank": 3, "proj_type": "left"},
    "right": {"rank": 3, "proj_type": "right"},
}
# (tokens, out, in): both orientations, norms by the Gram matrix and by rows of G, and a single token.
SHAPES = [(5, 48, 32), (5, 32, 48), (64, 48, 32), (64, 32, 48), (1, 40, 24)]


class Layer:
    """A linear layer with given factors: the weight's gradient of ``(layer(X) * dY).sum()`` is dY^T X."""

    def __init__(self, rows, columns, group, gradients="none", dtype=torch.float32, bias=False, **options):
        torch.manual_seed(7)
        self.module = nn.Linear(columns, rows, bias=bias)
        self.module.to(dtype)
        self.weight = self.module.weight
        group = {"params": [self.weight], "update_proj_gap": 3, "weight_decay": 0.1} | group
        dense = [{"params": [self.module.bias]}] if bias else []
        norm = options.pop("limiter_norm", "exact")
        self.optimizer = APOLLOAdamW([group, *dense], lr=LR, **options)
        self.handle = None
        if gradients != "plain":
            extra = {"limiter_norm": norm} if gradients in ("none", "auto") else {}
            self.handle = attach_layerwise(self.module, self.optimizer, gradients=gradients, **extra)

    def step(self, X, dY, autocast=False):
        with torch.autocast(X.device.type, torch.bfloat16, enabled=autocast):
            y = self.module(X)
        (y * dY).sum().backward()
        self.optimizer.step()
        self.optimizer.zero_grad()


def operands(step, tokens, rows, columns, dtype=torch.float32) -> tuple[Tensor, Tensor]:
    """X and dY of a step: bfloat16 numbers in ``dtype``. They grow by half at each step, so that the limiter acts."""
    generator = torch.Generator("cpu").manual_seed(step)
    drawn = [torch.randn(tokens, n, generator=generator, device="cpu") * 1.5**step for n in (columns, rows)]
    X, dY = (factor.bfloat16().to(torch.get_default_device(), dtype) for factor in drawn)
    return X, dY


def language_model(kind="llama", seed=0, **changes):
    """A small LLaMA, Qwen2 or Gemma with grouped queries. Qwen2's projections have biases. ``changes`` are to its
    config."""
    import transformers

    config, model = {
        "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
        "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
        "gemma": (transformers.GemmaConfig, transformers.GemmaForCausalLM),
    }[kind]
    torch.manual_seed(seed)
    options = {
        "vocab_size": 61,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "max_position_embeddings": 16,
        "bos_token_id": None,
        "eos_token_id": None,
        "pad_token_id": None,
        # From 0.2 on attention is sharp, and multiplies rounding errors by a thousand in 30 steps.
        "initializer_range": 0.1,
    }
    return model(config(**(options | changes))).train()


def optimizer_of(model, lr=LR, **group):
    groups = apollo_param_groups(
        model, **({"rank": 4, "scale": 1.0, "update_proj_gap": 7, "weight_decay": 0.1} | group)
    )
    return APOLLOAdamW(groups, lr=lr, seed=3)


def low_rank(model):
    """The weights of attention and MLP."""
    return [p for name, p in model.named_parameters() if ("attn" in name or "mlp" in name) and p.dim() == 2]


def train(model, optimizer, steps, first=0, autocast=False, check=None):
    """Steps on batches that depend on the step alone. ``check`` runs between backward and step."""
    for step in range(first, first + steps):
        tokens = torch.randint(61, (2, 8), generator=torch.Generator("cpu").manual_seed(step), device="cpu")
        tokens = tokens.to(next(model.parameters()).device)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=tokens, labels=tokens, use_cache=False).loss
        loss.backward()
        if check is not None:
            check()
        optimizer.step()
        optimizer.zero_grad()


def distances(first, second, start) -> dict[str, float]:
    """The distance between two models' parameters, relative to the distance that they have moved.

    The biases of keys are left out. Attention hardly depends on them, so that their gradients are rounding errors. Adam
    scales these up.
    """
    named = zip(first.named_parameters(), second.parameters(), start, strict=True)
    return {
        name: ((p - q).norm() / (p - s).norm()).item() for (name, p), q, s in named if not name.endswith("k_proj.bias")
    }


def assert_close(first, second, start):
    """Within 5e-6 for low-rank weights, and 2e-5 for the others, where Adam divides small gradients by themselves."""
    matrices = {id(p) for p in low_rank(first)}
    bound = {name: 5e-6 if id(p) in matrices else 2e-5 for name, p in first.named_parameters()}
    assert {name: far for name, far in distances(first, second, start).items() if far > bound[name]} == {}


def copies(model):
    return [p.detach().clone() for p in model.parameters()]


class NewTensors(TorchDispatchMode):
    """Follows the tensors that operations make. Raises at a read of the device.

    ``largest``: the elements of the largest tensor. ``peak``: the most bytes that are alive at one time.
    """

    def __init__(self):
        super().__init__()
        self.largest = self.peak = self._live = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        import weakref

        assert function is not torch.ops.aten._local_scalar_dense.default, "a host sync"
        leaves = torch.utils._pytree.tree_leaves((args, kwargs))
        old = {leaf.untyped_storage()._cdata for leaf in leaves if type(leaf) in (Tensor, nn.Parameter)}
        result = function(*args, **(kwargs or {}))
        for leaf in torch.utils._pytree.tree_leaves(result):
            if type(leaf) is not Tensor:
                continue
            storage = leaf.untyped_storage()
            key = storage._cdata
            if key in old or key in self._known:
                continue
            self.largest = max(self.largest, storage.nbytes() // leaf.element_size())
            self._known[key] = storage.nbytes()
            self._live += storage.nbytes()
            self.peak = max(self.peak, self._live)
            weakref.finalize(storage, self._freed, key)
        return result

    def _freed(self, key):
        self._live -= self._known.pop(key)
