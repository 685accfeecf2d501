"""Lets test files import their helpers (``from oracle import ...``), and keeps float sums the same on every machine."""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))
torch.set_num_threads(1)
