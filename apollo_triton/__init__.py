"""APOLLO (arXiv 2412.05270) for PyTorch: it replaces AdamW where AdamW's memory does not fit.

>>> from apollo_triton import APOLLOAdamW
>>> optimizer = APOLLOAdamW.mini(model, lr=1e-2)  # doctest: +SKIP
"""

from .core.param_groups import apollo_param_groups
from .core.projection import projection_matrix
from .int8.layers import dequantize_model, quantize_model
from .layerwise.handle import attach_layerwise
from .optimizer import APOLLOAdamW
from .qapollo import QAPOLLOAdamW
from .version import __version__

__all__ = [
    "APOLLOAdamW",
    "QAPOLLOAdamW",
    "__version__",
    "apollo_param_groups",
    "attach_layerwise",
    "dequantize_model",
    "projection_matrix",
    "quantize_model",
]
