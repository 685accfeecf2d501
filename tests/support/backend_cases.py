"""Tables of cases: which are repetitions, by pairs of values and by backend."""

from __future__ import annotations

import importlib.util
import itertools
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import pytest

HAS_TRITON = importlib.util.find_spec("triton") is not None
BACKEND_MARKS = {
    "reference": [],
    "interpreter": [pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed")],
    "cuda": [pytest.mark.gpu],
}


def backend_params(
    names: Iterable[str], full: Mapping[str, Collection[str]] = {}, slow: Collection[str] = ()
) -> list[Any]:
    """Every name on every backend, for ``parametrize(("backend", "name"), ..., indirect=["backend"])``.

    ``full``: the names that are repetitions, by backend. ``slow``: the backends that take more than a second a case.
    """
    params = []
    for name in names:
        for backend, marks in BACKEND_MARKS.items():
            more = [pytest.mark.full] if name in full.get(backend, ()) else []
            more += [pytest.mark.slow] if backend in slow else []
            params.append(pytest.param(backend, name, marks=[*marks, *more], id=f"{backend}-{name}"))
    return params


def pairs_first(*values: list[Any]) -> list[Any]:
    """Every combination of the values. Those that add no pair to the ones before them are marked ``full``.

    So ``make test`` has a case for each pair of values of two parameters, and ``make test-all`` has every combination.
    The combination with the most new pairs comes first.
    """

    def pairs(choice: tuple[int, ...]) -> set[Any]:
        return set(itertools.combinations(enumerate(choice), 2))

    combinations = list(itertools.product(*(range(len(each)) for each in values)))
    left = set().union(*(pairs(choice) for choice in combinations))
    params = []
    while combinations:
        best = max(combinations, key=lambda choice: len(pairs(choice) & left))
        is_new = bool(pairs(best) & left)
        left -= pairs(best)
        combinations.remove(best)
        row = [each[index] for each, index in zip(values, best, strict=True)]
        params.append(pytest.param(*row, marks=[] if is_new else [pytest.mark.full]))
    return params
