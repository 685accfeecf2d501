"""What the names of modules and parameters tell: output layers, embeddings, norms, biases, weights of matrix products.

Names are all that is known of named parameters. Of a model they tell what its classes do not.
"""

from __future__ import annotations

import re
from collections.abc import Callable

# What an output layer is called. As in the paper, the head is dense, with all that lies in it.
_HEADS = frozenset(
    {"head", "heads", "classifier", "pre_classifier", "score", "cls", "embed_out", "qa_outputs", "logits", "to_logits"}
    | {"output_projection", "unembed", "proj_out", "vocab_projector"}
)
# A "head" or "score" in a numbered layer or in attention is most likely attention's own. These are heads there too, as
# DeepSeek's `mtp.layers.0.shared_head.head` is.
_HEADS_IN_LAYERS = frozenset({"lm_head", "lm_heads", "shared_head", "embed_out"})
_IN_LAYERS = re.compile("attn|attention|mlp|ffn|feed_forward")
# Embeddings: `embed_tokens`, `tok_embeddings`, `tok_embd`, `token_emb`; GPT-2's wte and wpe; T5's and BART's shared.
_EMBEDDINGS = re.compile(r"embed|embd|(^|_)embs?(_|$)|^(wte|wpe|shared)$")
_NORMS = re.compile(r"norm|(^|_)ln(_|\d|$)")
# What a module calls a parameter that it multiplies inputs by: `weight`, `weight_ih_l0`, `in_proj_weight`, `down_proj`,
# `kernel`, `w1`, `W_Q`, `gate_up`, `fc1`; the `v1` beside DBRX's `w1`, and XLNet's q, k, v, o and r.
_WEIGHTS = re.compile(
    r"weight|proj|kernel|^w(_|\d|[a-z]?$)|^v\d|^[qkvor]$|(^|_)(gate|up|down|fc\d?|experts?)(_|$)", re.IGNORECASE
)
_EXPERTS = re.compile(r"(^|_)experts?(_|$)")
# What PEFT and torchtune call the parts of an adapter: `lora_A`, `lora_embedding_B`, `hada_w1_a`, `lokr_w2`, `oft_R`.
_ADAPTERS = re.compile(r"(^|_)lora_|^(hada|lokr|oft)_")
_PARAMETRIZED = re.compile(r"parametrizations\.(\w+)\.original\d*$")
# Modules that wrap another one under its own name: PEFT's, torch.compile's, DDP's, FSDP1's, activation checkpointing's.
_WRAPPERS = frozenset(
    {"original_module", "base_layer", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "module"}
    | {"_forward_module"}
)


def is_head_name(name: str) -> bool:
    """Whether the name of a module is that of an output layer, or of what lies in one.

    >>> [is_head_name(name) for name in ("lm_head.modules_to_save.default", "classifier.dense", "output")]
    [True, True, True]
    >>> [is_head_name(name) for name in ("layer.0.attention.output.dense", "multi_head_attention.q", "h.1.sa.heads.0")]
    [False, False, False]
    """
    parts = unwrapped(name)
    if parts and parts[-1] == "output":  # LLaMA's own code and torchtune; in a layer it is BERT's
        return not _is_in_layer(parts[:-1])

    def is_head(index: int) -> bool:
        part = parts[index]
        return part in _HEADS_IN_LAYERS or (_is_head_part(part) and not _is_in_layer(parts[:index]))

    return _leads_to(parts, is_head)


def is_embedding_name(name: str) -> bool:
    """Whether the name of a parameter is that of an embedding, or of what lies in one.

    >>> [is_embedding_name(name) for name in ("model.embed_tokens.weight", "h.wte.weight", "time_embed.0.weight")]
    [True, True, True]
    >>> is_embedding_name("vision_embed_tokens.encoder.layers.0.mlp.fc1.weight")  # a tower of blocks
    False
    """
    *parts, own = unwrapped(name)
    return bool(_EMBEDDINGS.search(own)) or _leads_to(parts, lambda index: bool(_EMBEDDINGS.search(parts[index])))


def is_norm_name(name: str) -> bool:
    """Whether the module is called a norm. Cohere's norm of queries has a weight [heads, size of a head]."""
    return bool(_NORMS.search((unwrapped(name) or [""])[-1].lower()))


def is_bias_name(name: str) -> bool:
    """Whether a parameter is a bias.

    A bias may have dimensions: of experts [experts, n], as a table of relative positions, of attention. Such a table
    may also be a module, as LayoutLMv3's `rel_pos_bias.weight` is.
    """
    words = "_".join(name.split(".")[-2:]).split("_")
    return not {"bias", "biases"}.isdisjoint(words)


def is_adapter_name(name: str) -> bool:
    """Whether a parameter is an adapter's, which stands under the name of the layer that it adapts.

    >>> [is_adapter_name(name) for name in ("wte.lora_embedding_A.default", "lm_head.lora_B.default.weight")]
    [True, True]
    >>> [is_adapter_name(name) for name in ("wte.base_layer.weight", "lm_head.modules_to_save.default.weight")]
    [False, False]
    """
    return any(map(_ADAPTERS.search, name.split(".")))


def is_weight_name(name: str) -> bool:
    """Whether a parameter is called as what inputs are multiplied by, or lies in experts.

    >>> [is_weight_name(name) for name in ("weight", "mlp.w1", "gate_up_proj", "experts.3.inner")]
    [True, True, True, True]
    >>> [is_weight_name(name) for name in ("mixer.A_log", "query_tokens", "attn.rel_pos_h")]
    [False, False, False]
    """
    *parts, own = name.split(".")
    return bool(_WEIGHTS.search(own)) or any(map(_EXPERTS.search, parts))


def plain_name(name: str) -> str:
    """The name that a parameter had before torch.nn.utils.parametrize took it.

    >>> plain_name("conv.parametrizations.weight.original1")
    'conv.weight'
    """
    return _PARAMETRIZED.sub(r"\1", name)


def unwrapped(name: str) -> list[str]:
    """The parts of a path without those of wrappers."""
    parts: list[str] = []
    previous = ""
    for part in name.removeprefix("base_model.model.").split("."):  # PEFT's
        # after `modules_to_save` comes the name of an adapter
        if part not in _WRAPPERS and part != "modules_to_save" and previous != "modules_to_save":
            parts.append(part)
        previous = part
    return parts


def _leads_to(parts: list[str], is_role: Callable[[int], bool]) -> bool:
    """Whether a part has the role, and no block lies between it and the end. A whole network may be called a classifier
    or an embedder, and SigLIP's `head` pools by attention: their blocks are blocks. A number right behind the part is
    an nn.Sequential's, or one of several."""
    blocks = [
        index - part.isdigit()
        for index, part in enumerate(parts)
        if _IN_LAYERS.search(part) or (part.isdigit() and index < len(parts) - 1)
    ]
    return any(is_role(index) and index >= max(blocks, default=0) for index in range(len(parts)))


def _is_head_part(part: str) -> bool:
    return part in _HEADS or (part.endswith("_head") and not re.search("multi_head|attn|attention", part))


def _is_in_layer(parts: list[str]) -> bool:
    """Whether the way leads through a numbered layer or a part of one. The first number may be an nn.Sequential's."""
    return any(part.isdigit() for part in parts[1:]) or any(_IN_LAYERS.search(part) for part in parts)


def without_indices(name: str) -> str:
    """A name with the numbers of layers as "*": one for the same weight of all layers.

    >>> without_indices("layers.3.mlp.up.weight"), without_indices("0.weight")
    ('layers.*.mlp.up.weight', '*.weight')
    """
    return re.sub(r"(?<![^.])\d+(?=\.)", "*", name)
