"""APOLLO (arXiv 2412.05270) for PyTorch: it replaces AdamW where AdamW's memory does not fit.

>>> from apollo_triton import APOLLOAdamW
>>> optimizer = APOLLOAdamW.mini(model, lr=1e-3)  # doctest: +SKIP
"""

from typing import TYPE_CHECKING

from .version import __version__

__all__ = [
    "APOLLOAdamW",
    "QAPOLLOAdamW",
    "__version__",
    "apollo_param_groups",
    "attach_layerwise",
    "dequantize_model",
    "load_float_weights",
    "projection_matrix",
    "quantize_model",
]

if TYPE_CHECKING:
    from .core.param_groups import apollo_param_groups
    from .core.projection import projection_matrix
    from .int8.filling import load_float_weights
    from .int8.layers import dequantize_model, quantize_model
    from .layerwise.handle import attach_layerwise
    from .optimizer import APOLLOAdamW
    from .qapollo import QAPOLLOAdamW
else:
    # These import torch, which takes seconds: at the first use, so that ``apollo-triton --help`` answers at once. Type
    # checkers read the imports above, and so they know every name here and refuse all others.
    _MODULES = {
        "APOLLOAdamW": "optimizer",
        "QAPOLLOAdamW": "qapollo",
        "apollo_param_groups": "core.param_groups",
        "attach_layerwise": "layerwise.handle",
        "dequantize_model": "int8.layers",
        "load_float_weights": "int8.filling",
        "projection_matrix": "core.projection",
        "quantize_model": "int8.layers",
    }
    _FOLDERS = ("backends", "core", "engine", "int8", "layerwise", "optimizer", "params", "qapollo")

    def __getattr__(name: str) -> object:
        from importlib import import_module

        if name in _FOLDERS:
            return import_module(f"{__name__}.{name}")
        if name not in _MODULES:
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
        value = globals()[name] = getattr(import_module(f"{__name__}.{_MODULES[name]}"), name)
        return value

    def __dir__() -> list[str]:
        return sorted({*globals(), *__all__, *_FOLDERS})
