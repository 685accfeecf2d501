"""Updates within the backward pass: each weight moves as soon as its gradient is known, or without one."""

from .handle import Layerwise, attach_layerwise

__all__ = ["Layerwise", "attach_layerwise"]
