"""This package where programs ask for ``apollo_torch``."""

from .redirect import as_apollo_torch, main

__all__ = ["as_apollo_torch", "main"]
