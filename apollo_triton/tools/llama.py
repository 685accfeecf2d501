"""Models without memory for their weights: the paper's LLaMA sizes and any Hugging Face config, on the meta device."""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..core.extras import require


@cache
def paper_figures() -> dict[str, Any]:
    """The content of ``paper.json``, from the paper (arXiv 2412.05270 v4): LLaMA sizes, ranks, perplexities, memory.

    >>> paper_figures()["llama"]["60M"]["hidden"]
    512
    """
    return json.loads((files(__package__) / "paper.json").read_text(encoding="utf-8"))


def named_sizes() -> tuple[str, ...]:
    """The LLaMA sizes that ``meta_model`` knows by name.

    >>> named_sizes()
    ('60M', '130M', '350M', '1B', '7B', '13B')
    """
    return tuple(paper_figures()["llama"])


def default_rank(model: str) -> int:
    """APOLLO's rank for ``model``, as in the paper: a quarter of the hidden size for 60M to 1B, else 256.

    >>> default_rank("1B"), default_rank("7B"), default_rank("config.json")
    (512, 256, 256)
    """
    return paper_figures()["rank"].get(model.upper(), 256)


def meta_model(model: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The model on the meta device: all shapes and names, and no memory for its weights.

    Args:
        model: a size of ``named_sizes()``; the path of a ``config.json`` or of the directory that holds one; or the id
            of a Hugging Face hub model, "owner/name". Of that only the config is fetched.
        dtype: the dtype of the weights.

    A named size is the paper's LLaMA, whose output head does not share the embedding's weight.

    Raises ValueError for a name that is none of these, and for a config that no model class fits. Raises OSError for a
    config that cannot be read or fetched.

    >>> model = meta_model("60M")  # doctest: +SKIP
    >>> sum(parameter.numel() for parameter in model.parameters())  # doctest: +SKIP
    58073600
    """
    transformers = require("transformers", "demo")
    if model.upper() in named_sizes():
        config = _llama_config(transformers, model.upper())
    else:
        config = _loaded_config(transformers, model)
    # Import it here: under torch.device("meta") torch 2.6 cannot import what this imports.
    require("transformers.modeling_utils", "demo")
    with torch.device("meta"):
        return _from_config(transformers, config, model).to(dtype)


def _llama_config(transformers: Any, size: str) -> Any:
    shape = paper_figures()["llama"][size]
    return transformers.LlamaConfig(
        hidden_size=shape["hidden"],
        intermediate_size=shape["intermediate"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        vocab_size=shape["vocab"],
        tie_word_embeddings=False,
    )


def _loaded_config(transformers: Any, model: str) -> Any:
    is_path = Path(model).exists()
    if not is_path and "/" not in model and not model.endswith(".json"):
        raise ValueError(
            f"unknown model {model!r} (allowed: {', '.join(named_sizes())}, the path of a config.json or of "
            "the directory that holds one, or a Hugging Face hub id 'owner/name')"
        )
    if not is_path and (model.endswith(".json") or model.startswith((".", "/", "~"))):
        raise FileNotFoundError(f"there is no {model!r}; give a config.json or the directory that holds one")
    only_cached = not is_path and not _hub_answers()
    try:
        return transformers.AutoConfig.from_pretrained(model, trust_remote_code=False, local_files_only=only_cached)
    except ImportError:
        raise
    except (
        Exception
    ) as error:  # its type depends on the value: huggingface_hub's errors, ZeroDivisionError, TypeError...
        if is_path:
            raise ValueError(f"{model!r} is not a config that transformers can read: {_first_line(error)}") from error
        raise OSError(
            f"the config of {model!r} could not be fetched from the Hugging Face hub ({_first_line(error)}); "
            "without a network, give the path of its config.json"
        ) from error


@cache
def _hub_answers() -> bool:
    """Whether the hub can be reached. If not, its client would try for half a minute and print every try."""
    constants = require("huggingface_hub.constants", "demo")
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        urllib.request.urlopen(constants.ENDPOINT, timeout=10).close()
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # the hub is there, and its client has other certificates
    except OSError:
        return False
    return True


def _from_config(transformers: Any, config: Any, model: str) -> nn.Module:
    """The config's language model with its head or, for other kinds of models, the model without a head."""
    for auto in (transformers.AutoModelForCausalLM, transformers.AutoModel):
        try:
            return auto.from_config(config)
        except ImportError:
            raise
        except Exception as error:  # its type depends on the value: torch raises RuntimeError for a negative size
            problem = error
    raise ValueError(
        f"no model can be made of {model!r}, a {type(config).__name__}: {_first_line(problem)}"
    ) from problem


def _first_line(error: Exception) -> str:
    """The first line of one of transformers' long errors, and the second if the first ends in a colon."""
    first, *rest = str(error).strip().splitlines() or [type(error).__name__]
    return f"{first} {rest[0].strip()}" if first.endswith(":") and rest else first
