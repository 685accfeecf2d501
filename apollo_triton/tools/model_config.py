"""A ``config.json`` that somebody else wrote: read as data alone, and refused by name where a size is absurd.

A config can ask transformers to import code from its folder or from the hub, and to load attention kernels. It can ask
for so many layers that the model's Python objects fill the memory, although its weights take none. A named size takes
no time to refuse here. ``bounds.py`` stops what has no name here.
"""

from __future__ import annotations

import json
import os
import re
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..core.messages import shown

LARGEST_FILE = 4 << 20  # bytes; with the names of 21,841 labels a config takes 2 MB
DEEPEST = 20
MOST_LAYERS = 1_000  # which takes 8 seconds
MOST = 100_000  # labels, heads, experts of a layer, and what else is counted
MOST_EXPERTS = 1_000_000  # in all layers together; Doge has 16,384 in each of 32

# Keys by which a config makes transformers run code that is not transformers' own, fetch something, or build layers in
# another way than a training in the asked dtype does. No count needs them.
_IGNORED = re.compile(
    r"auto_map|_?(attn|attention|experts)_impl(ementation)?(_internal|_autoset)?|(torch_)?dtype|quantization_config"
    r"|use_kernels?|kernel_config|trust_remote_code|_?name_or_path|_commit_hash|configuration_files|custom_pipelines"
    r"|use_pretrained_backbone"
)
_FETCHED = "backbone", "architecture"  # keys whose value may be the name of a model on the hub
_AT_LEAST_ONE = re.compile(
    r"(num_hidden|num|n|encoder|decoder)_layers|n_layer|(num|n|num_attention|encoder_attention|decoder_attention)_heads"
    r"|n_head|num_key_value_heads|hidden_size|d_model|n_embd|vocab_size|intermediate_size|d_ff|ffn_dim"
    r"|max_position_embeddings|n_positions"
)
_LAYERS = re.compile(r"layers?$|^n_layer|depths?$|blocks?$|stages$")
_EXPERTS = re.compile(r"^(num|n)_(local_|routed_)?experts$")
_COUNTS = re.compile(r"(experts|heads|labels|groups)$|^(num|n)_")
# Of those that begin with num_ or n_, the ones that are the size of a tensor, which takes no memory here.
_SIZES = re.compile(
    r"(positions?|ctx|embd?|embeddings?|inner|tokens?|vocab|words|samples?|points?|steps?|features?|images)$"
)


def read_config(path: Path) -> dict[str, Any]:
    """The content of a ``config.json``, or of that in a folder. Raises ValueError or OSError with one line of text."""
    if path.is_dir():
        path = path / "config.json"
        if not path.exists():
            raise FileNotFoundError(f"there is no {str(path)!r}; give a config.json or the directory that holds one")
    # A pipe would be waited for, and a device may never end.
    try:
        file = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    except OSError as error:
        raise OSError(f"{str(path)!r} cannot be read: {error.strerror}") from error
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode):  # Python's own open refuses a folder with another text
        os.close(file)
        raise ValueError(f"{str(path)!r} is not a file: a config.json is JSON text")
    with os.fdopen(file, "rb") as opened:
        if status.st_size > LARGEST_FILE:
            raise ValueError(f"{str(path)!r} has {status.st_size} bytes (a config.json has at most {LARGEST_FILE})")
        content = opened.read(LARGEST_FILE + 1)
    problem = f"{str(path)!r} is not a config that transformers can read: "
    try:
        config = json.loads(content)
    except RecursionError:
        raise ValueError(f"{problem}it is nested too deeply") from None
    except ValueError as error:  # no JSON, no UTF-8, an integer of more digits than Python reads
        raise ValueError(f"{problem}{error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{problem}it is {shown(config)} and not an object with keys")
    if not isinstance(config.get("model_type"), str):
        raise ValueError(f"{problem}it has no 'model_type' such as \"llama\", by which transformers knows the model")
    return config


def checked(config: dict[str, Any], model: str) -> tuple[dict[str, Any], list[str]]:
    """The config without the keys that are ignored, and their names. Raises ValueError that names a key which is out of
    all reason, or which names something to be fetched."""
    ignored: list[str] = []
    kept = _without_ignored(config, "", model, ignored)
    layers, experts = ("", 1), ("", 1)
    for name, key, value in _numbers(kept):
        _check(name, key, value, model)
        if isinstance(value, int):
            layers = max(layers, (name, value), key=lambda item: item[1]) if _LAYERS.search(key) else layers
            experts = max(experts, (name, value), key=lambda item: item[1]) if _EXPERTS.search(key) else experts
    if layers[1] * experts[1] > MOST_EXPERTS:
        raise ValueError(
            f"{model!r}: {layers[0]} is {layers[1]} and {experts[0]} is {experts[1]} (allowed: a product of up to "
            f"{MOST_EXPERTS})"
        )
    return kept, ignored


def _without_ignored(value: Any, name: str, model: str, ignored: list[str], depth: int = 0) -> Any:
    if depth > DEEPEST:
        raise ValueError(f"{model!r}: its config is nested more than {DEEPEST} deep")
    if isinstance(value, list):
        return [_without_ignored(item, name, model, ignored, depth + 1) for item in value]
    if not isinstance(value, dict):
        return value
    kept = {}
    for key, item in value.items():
        full_name = f"{name}.{key}" if name else key
        if _IGNORED.fullmatch(key):
            ignored.append(full_name)
            continue
        if key in _FETCHED and isinstance(item, str) and re.search("[/:]", item):
            raise ValueError(f"{model!r}: {shown(full_name)} is {shown(item)}, another model, which is not fetched")
        kept[key] = _without_ignored(item, full_name, model, ignored, depth + 1)
    return kept


def _numbers(value: Any, name: str = "", key: str = "") -> Iterator[tuple[str, str, Any]]:
    """Full name, key and value of everything that is no object, no list and not null. A list's items have its key."""
    if isinstance(value, dict):
        for inner, item in value.items():
            yield from _numbers(item, f"{name}.{inner}" if name else inner, inner)
    elif isinstance(value, list):
        if _LAYERS.search(key):
            yield f"length of {name}", key, len(value)
        for item in value:
            yield from _numbers(item, name, key)
    elif value is not None:
        yield name, key, value


def _check(name: str, key: str, value: Any, model: str) -> None:
    needed, layers = _AT_LEAST_ONE.fullmatch(key), _LAYERS.search(key)
    counted = layers or (_COUNTS.search(key) and not _SIZES.search(key))
    most = MOST_LAYERS if layers else MOST if counted else None
    is_number = isinstance(value, (int, float))
    # In a list, 0 and -1 mean that a layer has none or the default. An index of a layer counts from the end below 0.
    refused = needed and (not isinstance(value, int) or isinstance(value, bool) or value < 1)
    if refused or (is_number and most is not None and abs(value) > most):
        allowed = f"{1 if needed else 0} or more" if most is None else f"{1 if needed else 0} to {most}"
        raise ValueError(f"{model!r}: {shown(name)} is {shown(value)} (allowed: an integer of {allowed})")
