"""The memory of a training, counted without allocating it."""

from .count import Memory, adamw, adamw_8bit, apollo, apollo_mini

__all__ = ["Memory", "adamw", "adamw_8bit", "apollo", "apollo_mini"]
