"""The warnings of a call, which have to point at the caller's line."""

from __future__ import annotations

import warnings


def warnings_of(call, *arguments, **keys):
    """Their texts. This file is the caller, whose line they must name."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call(*arguments, **keys)
    assert all(each.filename == __file__ for each in caught), "a warning does not point at the caller's line"
    return [str(each.message) for each in caught]
