"""What each parameter of a model is: a matrix, an embedding, a head, or a vector such as a norm or bias.

``Weight`` is a parameter with its name, its module and its kind. A model tells all of it. Named parameters tell less:
their modules are not known, so that names and shapes decide.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from torch import Tensor, nn

from .targets import heads_of, is_head_name

MATRIX = "matrix"  # could be low-rank
EMBEDDING = "embedding"  # a table with a row a token or position, or a head that is tied to one
HEAD = "head"  # the output layer
VECTOR = "norm or bias"  # what has one dimension, a bias of more, and anything else that is no matrix

# What an embedding is called where its module is not known. "embed" in a name says it everywhere.
_EMBEDDING_NAMES = re.compile(r"(^|\.)(wte|wpe|word_embeddings|shared)$")


class Weight(NamedTuple):
    """A parameter: its name, itself, the name of its module and the module (None where it is not known), its kind.

    A parameter of several modules is one weight for each, with the same kind.
    """

    name: str
    tensor: Tensor
    module_name: str
    module: nn.Module | None
    kind: str


def weights_of(source: nn.Module | Iterable[tuple[str, Tensor]]) -> list[Weight]:
    """The weights of a model, or of named parameters, in their order.

    >>> model = nn.ModuleDict({"up": nn.Linear(2, 2), "wte": nn.Embedding(2, 2), "lm_head": nn.Linear(2, 2, False)})
    >>> [weight.kind for weight in weights_of(model)]
    ['matrix', 'norm or bias', 'embedding', 'head']
    >>> [weight.kind for weight in weights_of(model.named_parameters())]  # by their names
    ['matrix', 'norm or bias', 'embedding', 'head']
    """
    return list(_of_model(source) if isinstance(source, nn.Module) else _of_names(source))


def _of_model(model: nn.Module) -> Iterator[Weight]:
    embeddings, heads = embedding_weights(model), heads_of(model)
    for module_name, module in model.named_modules():
        is_head = id(module) in heads or is_head_name(module_name)
        for own_name, parameter in module.named_parameters(recurse=False):
            name = f"{module_name}.{own_name}" if module_name else own_name
            if id(parameter) in embeddings:
                kind = EMBEDDING
            elif _is_vector(name, parameter) or isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):
                kind = VECTOR  # [out, in, kernel] would be taken for experts
            elif is_head:
                kind = HEAD
            else:
                kind = EMBEDDING if "embed" in name else MATRIX
            yield Weight(name, parameter, module_name, module, kind)


def _of_names(named: Iterable[tuple[str, Tensor]]) -> Iterator[Weight]:
    for name, parameter in named:
        module_name = name.rpartition(".")[0]
        if _is_vector(name, parameter):
            kind = VECTOR
        elif is_head_name(module_name):
            kind = HEAD
        else:
            kind = EMBEDDING if "embed" in name or _EMBEDDING_NAMES.search(module_name) else MATRIX
        yield Weight(name, parameter, module_name, None, kind)


def _is_vector(name: str, parameter: Tensor) -> bool:
    # A bias may have dimensions: of experts [experts, n], as a table of relative positions, of attention. Such a table
    # may also be a module, as LayoutLMv3's `rel_pos_bias.weight` is.
    words = "_".join(name.split(".")[-2:]).split("_")
    return parameter.dim() < 2 or not {"bias", "biases"}.isdisjoint(words)


def embedding_weights(model: nn.Module) -> set[int]:
    """The ids of the weights of embeddings. A head that is tied to one has the same."""
    return {id(module.weight) for module in model.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))}
