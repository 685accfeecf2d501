"""What a plan was made for, as values that a step compares with those of the last one.

Where every tensor lies, which launches the groups can share, and the settings that a plan depends on.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from ..core.dtensors import local
from ..core.implicit_gradient import ImplicitGradient
from ..core.settings import FIELD_NAMES, STRUCTURAL, Settings
from ..int8.weight import int8_weight_of
from ..params.member import gradient_of
from ..params.state import SHARDED

Groups = list[dict[str, Any]]
States = Mapping[Tensor, dict[str, Any]]
Given = Mapping[Tensor, ImplicitGradient]

_SHAPE, _DTYPE = operator.attrgetter("shape"), operator.attrgetter("dtype")
_MISALIGNED = (15).__and__  # by how many bytes
_END = object()
_ADDRESSED = ("step", *SHARDED)
# A sparse gradient has no address, and what is no tensor has no strides.
_NO_ADDRESS = (RuntimeError, KeyError, AttributeError, TypeError)


def identities(settings: list[Settings]) -> list[int]:
    """For each group the first that it can share launches with: all hyperparameters are equal.

    Each group has a tensor lr of its own. On the host its value counts, which the launches are given. On a device it is
    the tensor, since to read it would wait for the device, so that each group has launches of its own there.
    """
    first: dict[tuple[Any, ...], int] = {}
    result = []
    for position, group in enumerate(settings):
        lr: Any = group.lr
        is_read = not isinstance(lr, Tensor)
        if isinstance(lr, Tensor):
            is_read = lr.device.type == "cpu" and not group.capturable
            lr = lr.tolist() if is_read else lr.data_ptr()
        key = (is_read, lr, *(getattr(group, name) for name in FIELD_NAMES if name != "lr"))
        result.append(first.setdefault(key, position))
    return result


def structure(settings: list[Settings]) -> list[Any]:
    """What a plan was made for, without the numbers that may change from step to step."""
    return [identities(settings), *(tuple(getattr(group, name) for name in STRUCTURAL) for group in settings)]


class Places:
    """Where every parameter with a gradient and its state are, to be looked at again at each step.

    Parameters and whatever their state holds are to be the very same objects: a tensor of another dtype may come to lie
    where the old one was. Addresses, shapes, strides and dtypes are compared as lists of one kind, which ``map`` fills
    and ``==`` compares in C: 0.2 ms for 224 parameters, of which a tuple for each took 0.35. Of gradients only numbers
    are kept: in ``gradients`` their addresses, 0 for one that is never formed. They are the plan's to change, once its
    tables know the new ones.
    """

    def __init__(self, groups: Groups, states: States, given: Given) -> None:
        """Raises as tensors do that have no address."""
        self._parameters, gradients, self._counts = _with_gradients(groups, given)
        self._states = [states[each] for each in self._parameters]
        self._values = [*self._held()]
        self._state = [state[name] for state in self._states for name in _ADDRESSED if name in state]
        self._is_plain = {*map(type, self._parameters)} <= {torch.nn.Parameter}
        self.gradients, self._facts = self._numbers(gradients, given)

    def unless_moved(self, groups: Groups, states: States, given: Given) -> list[int] | None:
        """The addresses of the gradients, if nothing but gradients has moved; else None."""
        parameters, gradients, counts = _with_gradients(groups, given)
        if (
            counts != self._counts
            or not all(map(operator.is_, parameters, self._parameters))
            or not self._are_in(states)
            or not all(map(operator.is_, self._held(), self._values))
        ):
            return None
        try:
            addresses, facts = self._numbers(gradients, given)
        except _NO_ADDRESS:
            return None
        is_new = addresses != self.gradients
        if facts != self._facts or (is_new and [*map(_MISALIGNED, addresses)] != [*map(_MISALIGNED, self.gradients)]):
            return None
        return addresses

    def _held(self) -> Iterator[Any]:
        """What the states hold, and a mark, so that no longer sequence is taken for the same."""
        return chain(chain.from_iterable(map(dict.values, self._states)), (_END,))

    def _are_in(self, states: States) -> bool:
        """Whether each parameter's state is the dictionary that it was."""
        # Most often these are all, in this order, and no parameter's hash is needed, which is a function of Python's.
        if len(states) == len(self._states) and all(map(operator.is_, states, self._parameters)):
            return all(map(operator.is_, states.values(), self._states))
        return all(map(operator.is_, map(states.get, self._parameters), self._states))

    def _numbers(self, gradients: list[Any], given: Given) -> tuple[list[int], tuple[list[Any], ...]]:
        """The gradients' addresses, and what is not to change."""
        formed, state, weights = gradients, self._state, self._parameters
        never_formed: list[Any] = []
        formats: list[Any] = []
        if given:
            formed = [each for each in gradients if isinstance(each, Tensor)]
            never_formed = [(at, each.dtype) for at, each in enumerate(gradients) if not isinstance(each, Tensor)]
        if not self._is_plain:
            formed, state = [*map(local, formed)], [*map(local, state)]
            formats = [(w.group_size, w.stochastic_rounding) for w in map(int8_weight_of, weights) if w is not None]
            weights = [part for each in weights for part in _parts(each)]
        addresses = [*map(Tensor.data_ptr, formed)]
        if 0 in addresses and any(each.numel() and not each.data_ptr() for each in formed):
            raise RuntimeError("a tensor subclass, which keeps its numbers elsewhere")
        tensors = weights + formed
        contiguous = [*map(Tensor.is_contiguous, tensors)]  # most are: their strides follow
        facts = (
            never_formed,
            formats,
            [*map(Tensor.data_ptr, state), *map(Tensor.data_ptr, weights)],
            [*map(_SHAPE, tensors)],
            contiguous,
            [each.stride() for each, is_contiguous in zip(tensors, contiguous, strict=True) if not is_contiguous],
            [*map(_DTYPE, tensors)],
            [*map(Tensor.is_neg, formed)],
        )
        for at, _ in never_formed:
            addresses.insert(at, 0)
        return addresses, facts


def places_of(groups: Groups, states: States, given: Given) -> Places | None:
    """None where a tensor has no address of its own, or where there is no state."""
    try:
        return Places(groups, states, given)
    except _NO_ADDRESS:
        return None


def _with_gradients(groups: Groups, given: Given) -> tuple[list[Any], list[Any], list[int]]:
    """The parameters that have a gradient, their gradients, and how many there are up to the end of each group."""
    parameters: list[Any] = []
    gradients: list[Any] = []
    counts = []
    for group in groups:
        own = group["params"]
        if given:
            gradients += [gradient for each in own if (gradient := gradient_of(each, given)) is not None]
        else:
            gradients += [gradient for each in own if (gradient := each.grad) is not None]
        every = len(gradients) - len(parameters) == len(own)
        parameters += own if every else [each for each in own if gradient_of(each, given) is not None]
        counts.append(len(parameters))
    return parameters, gradients, counts


def _parts(parameter: Tensor) -> tuple[Tensor, ...]:
    """The tensors on this rank in which a parameter keeps its numbers."""
    weight = int8_weight_of(parameter)
    return (local(parameter),) if weight is None else (weight.q, weight.scale, weight.zero)
