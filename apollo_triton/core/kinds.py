"""What each parameter of a model is: a matrix, an embedding, a head, a norm or bias, or something else.

``target_modules="auto"`` makes the matrices low-rank. A matrix is the weight of a matrix product within the model: what
a linear layer holds, or one matrix for each expert, ``[experts, rows, columns]``. Tensors that only look like one are
told apart by these rules, in this order:

1. What an ``nn.Embedding`` holds is an embedding, and so is a head that is tied to one. T5's table of
   ``relative_attention_bias`` is a bias.
2. Tensors of one dimension, or of one row such as a class token ``[1, 1, n]``, biases of any shape, and what a norm
   holds are norms and biases.
3. The kernel of a convolution in one dimension, ``[out, in, size]``, is no stack of experts. It is always dense.
4. What the model's ``get_input_embeddings`` and ``get_output_embeddings`` return is embedding and head, and so is what
   is called so. A numbered block within a module of such a name is a block nonetheless.
5. What an ``nn.Linear``, a class derived from it, or the ``Conv1D`` of transformers holds is a matrix.
6. Any other tensor of two dimensions, or stack of more than one matrix, is a matrix if it is called a weight or lies in
   experts: ``weight``, ``in_proj_weight``, ``down_proj``, ``w1``. What is left are tables and convolutions: a Mamba's
   ``A_log``, queries that are learned, tables of relative positions, kernels of images.

How wide a matrix is, is not asked here: ``core/coverage.py`` leaves narrow ones dense, such as gates and routers. Of
named parameters the modules are not known. For them names stand in for classes, and the rules are the same.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor, nn
from torch.nn.parameter import is_lazy
from torch.nn.utils.parametrize import ParametrizationList

from .module_names import is_bias_name, is_embedding_name, is_head_name, is_norm_name, is_weight_name, plain_name

MATRIX = "matrix"  # of a matrix product in the model
EMBEDDING = "embedding"  # a table with a row a token or position, or a head that is tied to one
HEAD = "head"  # the output layer
VECTOR = "norm or bias"  # what has one dimension, and norms and biases that have more
CONVOLUTION_1D = "1-D convolution"
OTHER = "table or convolution"  # could be low-rank, if somebody wants it

_NORMS = (nn.LayerNorm, nn.GroupNorm, nn.RMSNorm)


class Weight(NamedTuple):
    """A parameter: its name, itself, the name of its module and the module (None where it is not known), its kind.

    A parameter of several modules is one weight for each, with the same kind.
    """

    name: str
    tensor: Tensor
    module_name: str
    module: nn.Module | None
    kind: str


@dataclass(frozen=True)
class Roles:
    """What a model says of itself, as ids of parameters: ``tables`` of ``nn.Embedding``, further ``embeddings``, and
    ``heads``. All are empty where the model is not known."""

    tables: frozenset[int] = frozenset()
    embeddings: frozenset[int] = frozenset()
    heads: frozenset[int] = frozenset()

    @classmethod
    def of(cls, source: object) -> Roles:
        """The roles of a model; none of anything else."""
        if not isinstance(source, nn.Module):
            return cls()
        embeddings = frozenset(_answers(source, "get_input_embeddings"))
        return cls(
            frozenset(embedding_weights(source)), embeddings, frozenset(_answers(source, "get_output_embeddings"))
        )


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
    roles, modules = Roles.of(model), dict(model.named_modules())
    for module_name, module in modules.items():
        name, computed_for = module_name, module
        if isinstance(module, ParametrizationList):  # `layer.parametrizations.weight` computes for `layer`
            name = module_name.rpartition(".parametrizations.")[0]
            computed_for = modules.get(name, module)
        yield from module_weights(module_name, module, roles, computed_for)


def module_weights(
    name: str, module: nn.Module, roles: Roles, computed_for: nn.Module | None = None
) -> Iterator[Weight]:
    """The weights of a module's own, without those of the modules in it."""
    for own_name, parameter in module.named_parameters(recurse=False):
        full_name = f"{name}.{own_name}" if name else own_name
        kind = _kind(full_name, parameter, computed_for or module, roles)
        yield Weight(full_name, parameter, name, module, kind)


def _of_names(named: Iterable[tuple[str, Tensor]]) -> Iterator[Weight]:
    for name, parameter in named:
        yield Weight(name, parameter, name.rpartition(".")[0], None, _kind(name, parameter, None, Roles()))


def _kind(full_name: str, parameter: Tensor, module: nn.Module | None, roles: Roles) -> str:
    name = plain_name(full_name)
    module_name = name.rpartition(".")[0]
    if id(parameter) in roles.tables:
        return VECTOR if is_bias_name(name) else EMBEDDING
    if is_lazy(parameter):  # nn.LazyLinear before its first batch
        return VECTOR if is_bias_name(name) else MATRIX
    if _is_vector(name, parameter, module):
        return VECTOR
    if isinstance(module, (nn.Conv1d, nn.ConvTranspose1d)):
        return CONVOLUTION_1D
    if module is None and parameter.dim() == 3 and "conv" in module_name:
        return CONVOLUTION_1D
    if id(parameter) in roles.embeddings:
        return EMBEDDING
    if id(parameter) in roles.heads or is_head_name(module_name):
        return HEAD
    if is_embedding_name(name) or type(module).__name__.endswith("Embedding"):
        return EMBEDDING
    return MATRIX if is_linear(module) or _is_product(name, parameter, module) else OTHER


def _is_vector(name: str, parameter: Tensor, module: nn.Module | None) -> bool:
    if parameter.dim() < 2 or is_bias_name(name) or isinstance(module, _NORMS):
        return True
    if is_linear(module):
        return False
    is_row = parameter.numel() == max(parameter.shape) and not is_weight_name(name)
    return is_row or is_norm_name(name.rpartition(".")[0])


def _is_product(name: str, parameter: Tensor, module: nn.Module | None) -> bool:
    """Whether inputs are multiplied by a tensor that is no linear layer's."""
    if isinstance(module, nn.modules.conv._ConvNd):
        return False
    is_stack = parameter.dim() == 3 and parameter.shape[0] > 1  # a stack of one is a table, for any batch
    return (is_stack or parameter.dim() == 2) and is_weight_name(name)


def has_token_rows(name: str, tensor: Tensor) -> bool:
    """Whether the rows of an embedding or a head are known to be tokens: it is the ``weight`` of a module, as
    ``nn.Embedding`` and ``nn.Linear`` have it, a matrix of more than one row.

    Of a parameter with another name, as TransformerLens' ``unembed.W_U [width, tokens]``, the tokens may be the
    columns. A kernel of a convolution that makes embeddings of an image has no tokens at all.

    >>> [has_token_rows(name, nn.Linear(4, 9).weight) for name in ("wte.weight", "unembed.W_U", "pos_embed")]
    [True, False, False]
    """
    return plain_name(name).rpartition(".")[2] == "weight" and tensor.dim() == 2 and tensor.shape[0] > 1


def is_linear(module: nn.Module | None) -> bool:
    """Whether "all-linear" may take the module: nn.Linear, and the Conv1D of transformers, which is one as well."""
    return isinstance(module, nn.Linear) or any(
        kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.") for kind in type(module).__mro__
    )


def embedding_weights(model: nn.Module) -> set[int]:
    """The ids of the weights of embeddings. A head that is tied to one has the same."""
    return {id(module.weight) for module in model.modules() if isinstance(module, (nn.Embedding, nn.EmbeddingBag))}


def _answers(model: nn.Module, question: str) -> Iterator[int]:
    """The ids of the parameters of what a transformers model, or one within ``model``, answers."""
    for module in model.modules():
        if not callable(getattr(type(module), question, None)):
            continue
        try:
            found: Any = getattr(module, question)()
        except Exception:  # of a model that has none; what it raises is the model's business
            continue
        for part in found if isinstance(found, (list, tuple)) else [found]:
            if isinstance(part, nn.Module) and part is not module:
                yield from map(id, part.parameters())
