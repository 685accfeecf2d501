"""Build the sdist and the wheel, install each into an empty environment, and try it outside the checkout.

    python tests/smoke.py                                    # this Python, with the torch that it has
    python tests/smoke.py --python python3.10 --torch 2.6.0  # another Python, with a torch of the package registry

Tests that run in the checkout do not notice a file that is missing from the package.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
TRY = """
import importlib.util, os, sys, warnings
from importlib.resources import files
os.environ["TRITON_INTERPRET"] = "1"
import torch, apollo_triton
from apollo_triton.compat import as_apollo_torch
assert apollo_triton.__file__.startswith(sys.prefix), apollo_triton.__file__
assert all((files("apollo_triton") / name).is_file() for name in ("py.typed", "tools/paper.json"))
torch.manual_seed(0)
start = torch.nn.Linear(24, 40).weight.detach()
moved = {}
for backend in ["reference", *(["triton"] if importlib.util.find_spec("triton") else [])]:
    weight = torch.nn.Parameter(start.clone())
    optimizer = apollo_triton.APOLLOAdamW([{"params": [weight], "rank": 4}], lr=1e-2, backend=backend)
    for _ in range(2):
        weight.grad = torch.ones_like(weight)
        optimizer.step()
    moved[backend] = weight.detach()
    assert (weight - start).abs().max() > 1e-3
for weight in moved.values():
    assert torch.allclose(weight, moved["reference"], atol=1e-6)
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    as_apollo_torch()
import apollo_torch
assert issubclass(apollo_torch.APOLLOAdamW, apollo_triton.APOLLOAdamW)
print("trained on", *moved, "with torch", torch.__version__)
"""
COMMANDS = (["--version"], ["env"], ["memory", "--help"], ["validate", "--help"], ["demo", "--help"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--python", action="append", help="a Python to try it with, may be repeated (this one)")
    parser.add_argument("--torch", help="a torch to install there, e.g. 2.6.0 (that of this Python)")
    options = parser.parse_args()
    if options.python and not options.torch:
        parser.error("--python needs --torch: another Python cannot use the torch of this one; e.g. --torch 2.6.0")
    with tempfile.TemporaryDirectory() as folder:
        packages = build(Path(folder) / "dist")
        for python in options.python or [sys.executable]:
            for package in packages:
                with tempfile.TemporaryDirectory() as environment:  # a CUDA build of torch takes 6 GB in each
                    found = smoke(python, package, Path(environment), options.torch)
                print(f"{python}, {package.name}: {found}", flush=True)


def build(folder: Path) -> list[Path]:
    """Build the sdist, and the wheel from it."""
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    run(command, cwd=folder.parent)
    return sorted(folder.iterdir())


def smoke(python: str, package: Path, environment: Path, torch: str | None) -> str:
    """Install ``package`` into a new environment and use it there. Returns what it printed."""
    run([python, "-m", "venv", "--without-pip", str(environment)], cwd=environment.parent)
    executable = environment / "bin" / "python"
    pip = [sys.executable, "-m", "pip", "--python", str(executable), "--disable-pip-version-check", "install", "-q"]
    if torch is None:  # no download: the environment also sees the packages of this Python, after those installed in it
        packages_here = sysconfig.get_path("purelib")
        [site] = environment.glob("lib/python*/site-packages")
        (site / "packages_here.pth").write_text(packages_here)
        run([*pip, "--no-deps", "--no-build-isolation", str(package)], cwd=environment)
    else:
        run([*pip, f"torch=={torch}", "numpy", "setuptools"], cwd=environment)  # triton 3.2 imports setuptools
        run([*pip, str(package)], cwd=environment)
    commands = environment / "bin" / "apollo-triton"
    for arguments in COMMANDS:
        run([str(commands), *arguments], cwd=environment)
    return run([str(executable), "-c", TRY], cwd=environment).strip()


def run(command: list[str], cwd: Path) -> str:
    """The standard output of a command. If it fails, this program ends with all of its output."""
    environment = {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
    found = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    if found.returncode != 0:
        raise SystemExit(f"{' '.join(command)}\n{found.stdout}{found.stderr}")
    return found.stdout


if __name__ == "__main__":
    main()
