"""Models without memory for their weights: the paper's LLaMA sizes and any Hugging Face config, on the meta device."""

from __future__ import annotations

import json
import ssl
import urllib.error
import urllib.request
from functools import cache
from importlib.resources import files
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from torch import nn

from ..core.extras import require
from ..core.messages import shown, warn
from .bounds import TooLarge, bounded
from .model_config import checked, read_config

# Larger models than the paper's: LLaMA-33B, and the published shapes of Llama 3.1.
LARGER: dict[str, dict[str, int]] = {
    "33B": {"hidden": 6656, "intermediate": 17920, "layers": 60, "heads": 52, "key_value_heads": 52, "vocab": 32000},
    "70B": {"hidden": 8192, "intermediate": 28672, "layers": 80, "heads": 64, "key_value_heads": 8, "vocab": 128256},
    "405B": {
        "hidden": 16384,
        "intermediate": 53248,
        "layers": 126,
        "heads": 128,
        "key_value_heads": 8,
        "vocab": 128256,
    },
}
_MOST_ELEMENTS = 2**50  # of one weight; the bytes of more could overflow where torch counts them


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


def default_rank(model: str, width: int = 1024) -> int:
    """APOLLO's rank: as in the paper for a named size, else a quarter of the model's width, at most 256.

    >>> default_rank("1B"), default_rank("7B"), default_rank("config.json", 128)
    (512, 256, 32)
    """
    return paper_figures()["rank"].get(model.upper(), max(1, min(256, width // 4)))


def meta_model(model: str, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """The model on the meta device: all shapes and names, and no memory for its weights.

    Args:
        model: a size of ``named_sizes()`` or ``LARGER``; the path of a ``config.json`` or of the directory that holds
            one; or the id of a Hugging Face hub model, "owner/name". Of that only the config is fetched.
        dtype: the dtype of the weights.

    A named size is the paper's LLaMA, whose output head does not share the embedding's weight. A config is data: no
    code of its folder or of the hub runs, no kernel is fetched, and what it says of dtypes and quantization is ignored.

    Raises ValueError for a name that is none of these, for a config that no model class fits, and for sizes out of all
    reason. Raises OSError for a config that cannot be read or fetched. Warns of code that a config names, since the
    model is then transformers' own and may be another.

    >>> model = meta_model("60M")  # doctest: +SKIP
    >>> sum(parameter.numel() for parameter in model.parameters())  # doctest: +SKIP
    58073600
    """
    transformers = require("transformers", "demo")
    named = model.upper() in (*named_sizes(), *LARGER)
    path = None if named else _config_path(model)
    # Import it here: under torch.device("meta") torch 2.6 cannot import what this imports.
    require("transformers.modeling_utils", "demo")
    with bounded(repr(model)):
        if path is None:
            config = _llama_config(transformers, model.upper())
        else:
            config = _loaded_config(transformers, path, model)
        with torch.device("meta"):
            made = _from_config(transformers, config, model).to(dtype)
    for name, weight in made.named_parameters():
        if weight.numel() > _MOST_ELEMENTS:
            raise ValueError(f"{model!r}: {name} has {weight.numel()} elements (allowed: up to {_MOST_ELEMENTS})")
    return made


def _llama_config(transformers: Any, size: str) -> Any:
    shape = LARGER.get(size) or paper_figures()["llama"][size]
    return transformers.LlamaConfig(
        hidden_size=shape["hidden"],
        intermediate_size=shape["intermediate"],
        num_hidden_layers=shape["layers"],
        num_attention_heads=shape["heads"],
        num_key_value_heads=shape.get("key_value_heads", shape["heads"]),
        vocab_size=shape["vocab"],
        tie_word_embeddings=False,
    )


def _config_path(model: str) -> Path:
    """Where the config of ``model`` lies. That of a hub model is fetched, and nothing else of it."""
    path = Path(model)
    if path.exists():
        return path
    if "/" not in model and not model.endswith(".json"):
        raise ValueError(
            f"unknown model {model!r} (allowed: {', '.join([*named_sizes(), *LARGER])}, the path of a config.json or "
            "of the directory that holds one, or a Hugging Face hub id 'owner/name')"
        )
    if model.endswith(".json") or model.startswith((".", "/", "~")):
        raise FileNotFoundError(f"there is no {model!r}; give a config.json or the directory that holds one")
    hub = require("huggingface_hub", "demo")
    try:
        return Path(hub.hf_hub_download(model, "config.json", local_files_only=not _hub_answers()))
    except Exception as error:  # huggingface_hub's errors are of many kinds
        raise OSError(
            f"the config of {model!r} could not be fetched from the Hugging Face hub ({_first_line(error)}); "
            "without a network, give the path of its config.json"
        ) from error


def _loaded_config(transformers: Any, path: Path, model: str) -> Any:
    """transformers' config of a file, of which it sees nothing but what ``model_config`` lets through."""
    content, ignored = checked(read_config(path), model)
    own_code = any(name.rpartition(".")[2] == "auto_map" for name in ignored)
    kind = shown(content["model_type"])
    if content["model_type"] not in transformers.CONFIG_MAPPING:  # which has what the caller registered, too
        raise ValueError(
            f"{model!r}: transformers {transformers.__version__} has no model_type {kind}"
            + ("; the code that its config names (auto_map) is never run here" if own_code else "")
        )
    if own_code:
        warn(f"{model!r} names code of its own (auto_map), which is not run: the model is transformers' own {kind}")
    with TemporaryDirectory() as folder:
        (Path(folder) / "config.json").write_text(json.dumps(content), encoding="utf-8")
        try:
            config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
        except TooLarge:
            raise
        except Exception as error:  # its type depends on the value: ZeroDivisionError, TypeError...
            reason = _first_line(error).replace(folder, model)
            raise ValueError(f"{model!r} is not a config that transformers can read: {reason}") from error
    config.name_or_path = model
    return config


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
            return auto.from_config(config, trust_remote_code=False)
        except TooLarge:
            raise
        except ImportError as error:  # a library of this model alone
            raise ModuleNotFoundError(f"{model!r}: {_first_line(error)}") from error
        except Exception as error:  # its type depends on the value: torch raises RuntimeError for a negative size
            problem = error
    raise ValueError(
        f"no model can be made of {model!r}, a {type(config).__name__}: {_first_line(problem)}"
    ) from problem


def _first_line(error: Exception) -> str:
    """The first line of one of transformers' long errors, and the second if the first ends in a colon. At most 300
    characters, and none that a terminal would obey, because the text may hold any value of a config."""
    first, *rest = str(error).strip().splitlines() or [type(error).__name__]
    line = f"{first} {rest[0].strip()}" if first.endswith(":") and rest else first
    line = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in line[:300])
    return line if len(line) < 300 else f"{line[:300]}..."
