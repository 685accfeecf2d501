"""Optional libraries: only the code that needs one imports it, and the error says which extra to install."""

from __future__ import annotations

import importlib
from types import ModuleType


def require(module: str, extra: str) -> ModuleType:
    """Import ``module``. If it is missing, raise ModuleNotFoundError that names the extra which installs it.

    >>> require("math", "demo").floor(1.5)
    1
    """
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name != module.partition(".")[0]:
            raise
        package = error.name
        raise ModuleNotFoundError(
            f"{package} is needed here and is not installed: in a checkout pip install -c constraints.txt "
            f"'.[{extra}]', elsewhere pip install 'apollo-triton[{extra}]'",
            name=package,
        ) from error
