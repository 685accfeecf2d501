"""The version, alone so that packaging can read it without importing torch."""

from __future__ import annotations

__version__ = "0.1.0"
