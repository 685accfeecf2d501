"""Int8 weights: the tensor that a model holds, its linear layers, and the conversion of models."""

from . import operations, sending, sharded  # noqa: F401  # which register them
from .layers import Int8Linear, dequantize_model, quantize_model
from .linear import input_gradient  # importing this file also registers torch.nn.functional.linear
from .weight import Int8Weight

__all__ = ["Int8Linear", "Int8Weight", "dequantize_model", "input_gradient", "quantize_model"]
