"""Optimizers with every kind of state, and all ways to break what ``state_dict`` returns."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from apollo_triton import APOLLOAdamW

SHAPES = {
    "up": (12, 8),
    "down": (8, 12),
    "experts": (3, 6, 5),
    "mini": (9, 7),
    "svd": (6, 10),
    "eight": (40, 24),
    "bias": (5,),
    "embedding": (7, 4),
}
GROUPS: list[tuple[tuple[str, ...], dict[str, Any]]] = [
    (("up", "down", "experts"), {"rank": 4}),
    (("mini",), {"rank": 1, "scale_type": "tensor", "scale": 16.0}),
    (("svd",), {"rank": 3, "proj": "svd"}),
    (("eight",), {"rank": 16, "state_bits": 8, "min_8bit_size": 0}),
    (("bias", "embedding"), {"weight_decay": 0.1}),
]

Named = dict[str, nn.Parameter]


def make(seed: int = 0, steps: int = 0, **options: Any) -> tuple[APOLLOAdamW, Named]:
    """An optimizer of named parameters, one of every kind, after some steps."""
    generator = torch.Generator("cpu").manual_seed(seed)
    device = torch.get_default_device()
    named = {
        name: nn.Parameter(torch.randn(shape, generator=generator, device="cpu").to(device))
        for name, shape in SHAPES.items()
    }
    groups = [{"params": [(name, named[name]) for name in names], **keys} for names, keys in GROUPS]
    optimizer = APOLLOAdamW(groups, lr=1e-2, **options)
    train(optimizer, named, 0, steps)
    return optimizer, named


def train(optimizer: APOLLOAdamW, named: Named, first: int, steps: int = 1) -> None:
    """Steps number ``first`` and on, each with gradients of its own."""
    for step in range(first, first + steps):
        generator = torch.Generator("cpu").manual_seed(step)
        for parameter in named.values():
            gradient = torch.randn(parameter.shape, generator=generator, device="cpu")
            parameter.grad = gradient.to(parameter.device, parameter.dtype)
        optimizer.step()


def paths(value: Any, at: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """The keys that lead to each value of nested dictionaries and lists."""
    if at:
        yield at
    if isinstance(value, dict):
        for key in value:
            yield from paths(value[key], (*at, key))
    elif isinstance(value, list):
        for index in range(len(value)):
            yield from paths(value[index], (*at, index))


def at(value: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def nested(depth: int) -> list[Any]:
    """Lists within lists: deeper than ``copy.deepcopy`` and ``repr`` can follow."""
    value: list[Any] = []
    for _ in range(depth):
        value = [value]
    return value


class Unprintable:
    def __repr__(self) -> str:
        raise RuntimeError("no text")

    def __deepcopy__(self, memo: Any) -> Any:
        raise RuntimeError("no copy")


PLAIN: list[Any] = [
    None, "", "x", b"x", [], {}, (), [1, 2], ["a"], {"a": {}}, nested(5000), Unprintable(), object(),
    True, False, 0, 1, 2, 3.0, 0.5, -1, -0.5, 1j, float("nan"), float("inf"), 1e300, 1e-300,
    4, 8, 32, 2**24, 2**52, 2**64, 10**400,
    "float16", "bfloat16", "svd", "tensor", "channel", "left", "right", "reverse_std", "rademacher",
    torch.float16, torch.bfloat16,
]  # fmt: skip

# Whatever stands at its place, a tensor of no use; and what ``of`` makes of a tensor.
SCALARS: dict[str, Any] = {
    "one": lambda: torch.tensor(1.0),
    "an integer": lambda: torch.tensor(3),
    "True": lambda: torch.tensor(True),
    "NaN": lambda: torch.tensor(float("nan")),
    "-1": lambda: torch.tensor(-1.0),
    "2**24": lambda: torch.tensor(2.0**24),
    "a vector of one": lambda: torch.tensor([5.0]),
    "a vector": lambda: torch.ones(3),
    "empty": lambda: torch.zeros(0),
    "complex": lambda: torch.tensor(1j),
    "meta": lambda: torch.zeros((), device="meta"),
    "sparse": lambda: torch.zeros(1).to_sparse(),
    "a parameter": lambda: nn.Parameter(torch.tensor(2.0)),
}
CAST = (
    torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.int64, torch.uint8, torch.bool, torch.complex64,
    torch.float8_e4m3fn,
)  # fmt: skip
OF_TENSORS: dict[str, Any] = {
    **{str(dtype): lambda x, dtype=dtype: x.to(dtype) for dtype in CAST},
    "on meta": lambda x: x.to("meta"),
    "sparse of it": lambda x: x.to_sparse(),
    "CSR": lambda x: x.float().to_sparse_csr() if x.dim() == 2 else x.to_sparse(),
    "quantised": lambda x: torch.quantize_per_tensor(x.float(), 0.1, 0, torch.quint8),
    "zeros": torch.zeros_like,
    "negative": lambda x: -1 - x.float().abs(),
    "all NaN": lambda x: x.float() * float("nan"),
    "all infinite": lambda x: x.float() + float("inf"),
    "beyond float32": lambda x: x.double() + 1e300,
    "tiny": lambda x: x.float() * 1e-40,
    "a list": lambda x: x.tolist(),
    "an array": lambda x: x.numpy(),
    "one dimension more": lambda x: x[None],
    "flat": lambda x: x.reshape(-1),
    "shorter": lambda x: x[..., :-1] if x.dim() else x,
    "expanded": lambda x: x.new_zeros(()).expand(x.shape),
    "column-major": lambda x: x.mT.contiguous().mT if x.dim() > 1 else x,
    "transposed": lambda x: x.mT if x.dim() > 1 else x,
    "strided": lambda x: x.repeat_interleave(2, -1)[..., ::2] if x.dim() else x,
    "negated where it is read": lambda x: torch._neg_view(-x.float()),
    "with gradient": lambda x: nn.Parameter(x.float()),
}


def ways(value: Any) -> list[Any]:
    """What ``broken`` may do to a value: positions in ``PLAIN``, names, "removed"."""
    return [*range(len(PLAIN)), *SCALARS, *(OF_TENSORS if isinstance(value, torch.Tensor) else ()), "removed"]


def broken(state_dict: dict[str, Any], path: tuple[Any, ...], way: Any) -> dict[str, Any]:
    """A copy of which one value is another."""
    result = copy.deepcopy(state_dict)
    parent, old = at(result, path[:-1]), at(result, path)
    if way == "removed":
        del parent[path[-1]]
    else:
        make = SCALARS.get(way)
        parent[path[-1]] = PLAIN[way] if isinstance(way, int) else make() if make else OF_TENSORS[way](old)
    return result


def everything(optimizer: APOLLOAdamW) -> Any:
    """Groups, defaults, weights and state, as copies that ``same`` compares byte for byte."""

    def frozen(value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            strides = value.stride() if value.layout == torch.strided else value.layout
            return type(value), value.dtype, value.device, value.shape, strides, content(value)
        return copy.deepcopy(value)

    groups = [
        {key: list(map(id, value)) if key == "params" else frozen(value) for key, value in group.items()}
        for group in optimizer.param_groups
    ]
    weights = [frozen(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    state = {id(key): {name: frozen(value) for name, value in each.items()} for key, each in optimizer.state.items()}
    return [groups, dict(optimizer.defaults), weights, state]


def content(tensor: torch.Tensor) -> bytes:
    """The bytes of a tensor's elements, none where it has no values."""
    if tensor.is_meta:
        return b""
    dense = tensor.detach().cpu() if tensor.layout == torch.strided else tensor.detach().cpu().to_dense()
    return bytes(dense.resolve_neg().contiguous().reshape(-1).view(torch.uint8).tolist())


def same(one: Any, other: Any) -> bool:
    """Whether nested values are equal, tensors byte for byte."""
    if type(one) is not type(other):
        return False
    if isinstance(one, dict):
        return list(one) == list(other) and all(same(one[key], other[key]) for key in one)
    if isinstance(one, (list, tuple)):
        return len(one) == len(other) and all(map(same, one, other))
    return bool(one == other)
