"""Tables of cases of which some run in ``make test``, and the rest, marked ``full``, in ``make test-all``."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Collection, Iterable, Mapping
from itertools import combinations, product
from typing import Any

import pytest

HAS_TRITON = importlib.util.find_spec("triton") is not None
BACKEND_MARKS = {
    "reference": [],
    # Slow as a whole: the kernels have quick cases of their own, and make quick is for every save.
    "interpreter": [pytest.mark.skipif(not HAS_TRITON, reason="triton is not installed"), pytest.mark.slow],
    "cuda": [pytest.mark.gpu],
}
# For what the interpreter only repeats, slowly: ``parametrize("backend", INTERPRETER_FULL, indirect=True)``.
INTERPRETER_FULL = [
    pytest.param(name, marks=[*marks, *([pytest.mark.full] if name == "interpreter" else [])])
    for name, marks in BACKEND_MARKS.items()
]


def tiers(cases: Iterable[Any], fast: Callable[..., bool]) -> list[Any]:
    """All ``cases``; those that are not ``fast`` are marked full."""
    rows = [case if isinstance(case, tuple) else (case,) for case in cases]
    return [row[0] if len(row) == 1 and fast(*row) else _row(row, fast(*row)) for row in rows]


def values(*factors: Iterable[Any]) -> list[Any]:
    """The product of ``factors``, of which as many cases are fast as it takes to have every value in one."""
    return _covering([list(factor) for factor in factors], 1)


def pairs(*factors: Iterable[Any]) -> list[Any]:
    """The product of ``factors``, of which as many cases are fast as it takes to have every pair of values in one."""
    return _covering([list(factor) for factor in factors], 2)


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


def _row(row: tuple[Any, ...], is_fast: bool) -> Any:
    return row if is_fast else pytest.param(*row, marks=pytest.mark.full)


def _covering(factors: list[list[Any]], together: int) -> list[Any]:
    """Greedy: the first of the cases that have the most combinations of ``together`` values that none has yet."""
    rows = list(product(*(range(len(factor)) for factor in factors)))
    chosen: set[tuple[int, ...]] = set()
    missing = {each for row in rows for each in combinations(enumerate(row), together)}
    while missing:
        best = max(rows, key=lambda row: len(missing.intersection(combinations(enumerate(row), together))))
        missing.difference_update(combinations(enumerate(best), together))
        chosen.add(best)
    return [_row(tuple(f[i] for f, i in zip(factors, row, strict=True)), row in chosen) for row in rows]
