"""Benchmarks. Each file answers one question: run it as ``python -m bench.NAME`` from the root of a checkout.

``python -m bench`` runs everything that suits this machine, in stages, and writes ``bench/REPORT.md``.
"""

from pathlib import Path

import apollo_triton

# In a checkout that is not installed the kernels are beside the package, not in it. Installed kernels are found first.
apollo_triton.__path__.append(str(Path(__file__).parent.parent))
