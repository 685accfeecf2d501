"""How the package speaks to its user: warnings that point at the user's own line, and values that fit into a message.

Values may come from a file that someone else made. A message shows them short, on one line, with control characters
escaped.
"""

from __future__ import annotations

import reprlib
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

_PACKAGE = str(Path(__file__).parents[1])
_TORCH = str(Path(torch.__file__).parent)


def warn(message: str, category: type[Warning] = UserWarning) -> None:
    """Warn at the innermost line that is neither in this package nor in torch: the caller's, however deep we are."""
    level, frame = 1, sys._getframe()
    while frame.f_back is not None and frame.f_code.co_filename.startswith((_PACKAGE, _TORCH)):
        level, frame = level + 1, frame.f_back
    warnings.warn(message, category, stacklevel=level)


def listed(names: Sequence[str], most: int) -> str:
    """The first names, and how many there are beyond them.

    >>> listed(["a", "b", "c"], 2)
    'a, b and 1 more'
    """
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


class _Short(reprlib.Repr):
    """``reprlib`` with a tensor as its dtype and shape, since the text of its elements may take gigabytes."""

    def __init__(self) -> None:
        super().__init__()
        self.maxlevel, self.maxstring, self.maxother, self.maxlong = 3, 100, 100, 40

    def repr1(self, x: Any, level: int) -> str:
        if isinstance(x, Tensor) and (x.dim() or x.is_meta):
            return f"a {x.dtype} tensor of shape {tuple(x.shape)}"
        if isinstance(x, Tensor):
            x = x.detach()  # a parameter's text has two lines
        if isinstance(x, int) and x.bit_length() > 128:  # Python refuses to print more than 4300 digits
            return f"an integer of {x.bit_length()} bits"
        return super().repr1(x, level)


def shown(value: Any) -> str:
    """``repr(value)`` in at most 200 characters.

    >>> shown(torch.zeros(2, 3))
    'a torch.float32 tensor of shape (2, 3)'
    >>> shown("x" * 300)[:8]
    "'xxxxxxx"
    """
    text = "".join(each if each.isprintable() else repr(each)[1:-1] for each in _SHORT.repr(value))
    return text if len(text) <= 200 else f"{text[:197]}..."


_SHORT = _Short()


def readable_bytes(count: int) -> str:
    """A number of bytes as text, in units of 1e3, 1e6, 1e9 or 1e12.

    >>> readable_bytes(196_608_000), readable_bytes(0)
    ('196.6 MB', '0 B')
    """
    for unit, name in ((1e12, "TB"), (1e9, "GB"), (1e6, "MB"), (1e3, "kB")):
        if count >= unit:
            return f"{count / unit:.1f} {name}"
    return f"{count} B"
