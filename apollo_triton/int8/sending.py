"""How an int8 weight is sent: each part by itself, with its bytes as they are.

``distribute_tensor`` scatters and broadcasts weights. DistributedDataParallel's first broadcast joins tensors of one
dtype to a ``Bucket``, sends it from rank 0, and copies each piece back. To round anew would change the weights of rank
0 too: after stochastic rounding a group's largest value need not be the end of its grid.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .weight import FUNCTIONS, OPERATIONS, Int8Weight, refusal

_aten, _c10d = torch.ops.aten, torch.ops.c10d


def _parts(tensor: Tensor) -> list[Tensor]:
    """The plain tensors that are sent of a tensor."""
    if isinstance(tensor, Bucket):
        return [part for piece in tensor.pieces for part in _parts(piece)]
    return [tensor.q, tensor.scale, tensor.zero] if isinstance(tensor, Int8Weight) else [tensor]


def _broadcast(tensors: list[Tensor], *arguments: Any) -> Any:
    works = [_c10d.broadcast_.default([part], *arguments)[1] for tensor in tensors for part in _parts(tensor)]
    return tensors, _last_of(works)


def _scatter(outputs: list[Tensor], inputs: list[list[Tensor]], *arguments: Any) -> Any:
    """Of one output, whose rank may have nothing to send."""
    (output,), (pieces, *_) = outputs, inputs or [[]]
    sent = list(zip(*map(_parts, pieces), strict=True))
    works = []
    for at, part in enumerate(_parts(output)):
        works.append(_c10d.scatter_.default([part], [[*sent[at]]] if pieces else [], *arguments)[1])
    return outputs, _last_of(works)


def _last_of(works: Sequence[Any]) -> Any:
    """The last of works that are one to the caller, who waits for it."""
    for work in works[:-1]:
        torch.distributed.Work.unbox(work).wait()
    return works[-1]


class Bucket(Tensor):
    """Flat tensors of one dtype in a row, int8 weights among them, as DistributedDataParallel joins them. The pieces
    are the tensors themselves, so that what is received is in place."""

    pieces: list[Tensor]

    @staticmethod
    def __new__(cls, pieces: Sequence[Tensor]) -> Bucket:
        length, first = sum(piece.numel() for piece in pieces), pieces[0]
        return Tensor._make_wrapper_subclass(cls, (length,), dtype=first.dtype, device=first.device)

    def __init__(self, pieces: Sequence[Tensor]) -> None:
        self.pieces = [*pieces]

    def __repr__(self, *, tensor_contents: Any = None) -> str:  # type: ignore[override]
        return f"Bucket({self.pieces})"

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        if function is _c10d.broadcast_.default:
            return _broadcast(*args, **(kwargs or {}))
        if function is _aten.slice.Tensor:
            return args[0]._piece(*args[1:], **(kwargs or {}))
        raise refusal(function)

    def _piece(self, dim: int = 0, start: int | None = 0, end: int | None = None, step: int = 1) -> Tensor:
        first, last, _ = slice(start, end).indices(self.shape[0])
        begin = 0
        for piece in self.pieces:
            if (begin, begin + piece.numel()) == (first, last):
                return piece.detach()  # another tensor object, as autograd asks of a view
            begin += piece.numel()
        raise refusal(_aten.slice.Tensor)


def _joined(tensors: Sequence[Tensor], dim: int = 0) -> Bucket:
    """``cat`` of flat tensors, which C++ calls. What Python calls is refused before: see ``FUNCTIONS``."""
    if any(tensor.dim() != 1 for tensor in tensors):
        raise refusal(_aten.cat.default)
    return Bucket(tensors)


def _no_cat(*args: Any, **kwargs: Any) -> Any:
    raise refusal(torch.cat)


FUNCTIONS.update(dict.fromkeys((torch.cat, torch.concat, torch.concatenate), _no_cat))
OPERATIONS[_aten.cat.default] = _joined
if torch.distributed.is_available():  # some builds of torch have none of it
    OPERATIONS.update({_c10d.broadcast_.default: _broadcast, _c10d.scatter_.default: _scatter})
