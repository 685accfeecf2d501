"""Tests import their helpers (``oracle``, ``official``) by name, and run on one thread each, so that float sums are the
same everywhere and two workers fit two cores. In CI hypothesis draws the same examples every time, elsewhere new ones.
"""

import os
import sys
from pathlib import Path

import torch
from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")
