"""Warnings point at the user's line, and a value in a message is short, on one line and without control characters."""

import warnings

import pytest
import torch

from apollo_triton.core.messages import shown, warn


def nested(depth):
    value = ()
    for _ in range(depth):
        value = (value, value)
    return value


class Wordy:
    def __repr__(self):
        return "word " * 10**6


MONSTERS = [
    nested(300),
    "x" * 10**6,
    "\x1b[31m\n" * 100,
    [1] * 10**6,
    {i: i for i in range(1000)},
    2**100_000,
    Wordy(),
    torch.zeros(1000, 1000),
    {"\x1b[2J": [torch.zeros(3)] * 100},
    torch.empty((), device="meta"),
    [[0.1234567890123456 + i for i in range(9)]] * 9,
    torch.ones(3, 6, 5).numpy(),
    torch.nn.Parameter(torch.ones(())),
]


@pytest.mark.parametrize("value", MONSTERS, ids=lambda value: type(value).__name__)
def test_any_value_is_short_and_on_one_line(value):
    """A checkpoint whose value, quoted in the error, fills memory, the screen, or the terminal's title."""
    text = shown(value)
    assert len(text) <= 200
    assert text.isprintable()


def test_small_values_are_quoted_whole():
    """A shortening that hides the wrong value itself."""
    for value in ("1e-2", 0.5, None, (0.9, 0.999), ["attn", "mlp"], torch.tensor(3.0)):
        assert shown(value) == repr(value)


def test_a_warning_points_at_the_line_outside_of_the_package():
    """A warning that names a file of the package, of which the user has no use."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with torch.no_grad():  # torch's own wrappers are no line of the user's either
            torch.no_grad()(warn)("something")
    assert [warning.filename for warning in caught] == [__file__]
