"""The official package's names, provided by apollo_triton. On the path only if ``apollo_triton.compat`` put it there.

The classes are apollo_triton's with one difference: they accept a rank above a weight's width, as the official ones do.
The Trainer's default rank of 128 is above the width of many small models.
"""

from typing import Any

import apollo_triton
from apollo_triton.core.messages import warn
from apollo_triton.core.settings import Settings
from apollo_triton.params.member import geometry_of

__all__ = ["APOLLOAdamW", "QAPOLLOAdamW"]
__version__ = "1.0.3+apollo.triton"
_GALORE = ("GaLoreAdafactor", "GaLoreAdamW", "GaLoreAdamW8bit")


class APOLLOAdamW(apollo_triton.APOLLOAdamW):
    """``apollo_triton.APOLLOAdamW``, except that a rank above a weight's width is a warning."""

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if isinstance(param_group, dict) and param_group.get("rank") is not None:
            param_group = {"rank_above_width": True} | param_group
        super().add_param_group(param_group)
        _warn_of_wide_ranks(self.param_groups[-1])


class QAPOLLOAdamW(apollo_triton.QAPOLLOAdamW, APOLLOAdamW):
    """``apollo_triton.QAPOLLOAdamW``, except that a rank above a weight's width is a warning."""


def _warn_of_wide_ranks(group: dict[str, Any]) -> None:
    settings = Settings.of(group)
    geometries = (geometry_of(parameter, settings) for parameter in group["params"])
    widths = [geometry.width for geometry in geometries if geometry is not None]
    narrow = [width for width in widths if settings.rank is not None and settings.rank > width]
    if narrow:
        warn(
            f"rank {settings.rank} is above the projected width of {len(narrow)} weights, the narrowest {min(narrow)}: "
            "their state is larger than AdamW's; a smaller rank saves memory"
        )


def __getattr__(name: str) -> Any:
    if name in _GALORE:
        raise ImportError(
            f"{name} belongs to GaLore, which apollo_triton does not have: pip install galore-torch, then "
            f"from galore_torch import {name}"
        )
    raise AttributeError(f"module 'apollo_torch', for which apollo_triton stands in, has no {name!r}")
