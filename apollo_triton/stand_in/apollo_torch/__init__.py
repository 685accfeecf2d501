"""The official package's names, answered by apollo_triton; on the path only where ``apollo_triton.compat`` put it."""

from typing import Any

from apollo_triton import APOLLOAdamW, QAPOLLOAdamW

__all__ = ["APOLLOAdamW", "QAPOLLOAdamW"]
__version__ = "1.0.3+apollo.triton"
_GALORE = ("GaLoreAdafactor", "GaLoreAdamW", "GaLoreAdamW8bit")


def __getattr__(name: str) -> Any:
    if name in _GALORE:
        raise ImportError(
            f"{name} is another algorithm's, which apollo_triton does not have: pip install galore-torch, and "
            f"from galore_torch import {name}"
        )
    raise AttributeError(f"module 'apollo_torch', for which apollo_triton stands in, has no {name!r}")
