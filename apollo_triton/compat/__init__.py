"""Lets programs that import ``apollo_torch`` use this package."""

from .redirect import as_apollo_torch, main

__all__ = ["as_apollo_torch", "main"]
