"""Benchmarks, one file a question; run them as ``python -m bench.NAME`` from the root of a checkout.

``python -m bench`` runs what this machine can in stages, and writes ``bench/REPORT.md``.
"""

from pathlib import Path

import apollo_triton

# In a checkout that is not installed the kernels lie beside the package, not in it. Installed ones are found first.
apollo_triton.__path__.append(str(Path(__file__).parent.parent))
