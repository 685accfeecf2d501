"""The versions, devices and settings that a report of a bug needs, in Markdown.

Nothing here may fail: if something cannot be found out, its line says why. Packages are not imported, except torch and
triton; their installed version is read.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch

from ..core.device_backend import device_backend
from ..version import __version__

# Packages that train with this one, or whose models it trains. Other packages change nothing here.
_PACKAGES = (
    "triton",
    "numpy",
    "transformers",
    "accelerate",
    "bitsandbytes",
    "peft",
    "trl",
    "datasets",
    "lightning",
    "deepspeed",
    "torchao",
    "apollo-torch",
)
# Settings that change which kernels run, how they are compiled, or how many threads and devices there are.
_PREFIXES = (
    "TRITON_",
    "PYTORCH_",
    "TORCH_",
    "TORCHINDUCTOR_",
    "CUDA_",
    "HIP_",
    "ROCR_",
    "NCCL_",
    "OMP_",
    "ACCELERATE_",
)
_NAMES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MKL_NUM_THREADS")
_SECRET = ("TOKEN", "KEY", "SECRET", "PASSWORD", "CREDENTIAL")


def run(options: argparse.Namespace) -> int:
    found = dict(facts())
    print(json.dumps(found, indent=2) if options.json else markdown(found))
    return 0


def markdown(found: dict[str, str]) -> str:
    """A Markdown table of two columns, for an issue."""
    first, *rest = (f"| {name} | {' '.join(value.split()).replace('|', '/')} |" for name, value in found.items())
    return "\n".join([first, "|---|---|", *rest])


def facts() -> Iterator[tuple[str, str]]:
    """Name and value of everything that is known here. This package's version comes first."""
    yield "apollo-triton", __version__
    yield "checkout", _or_why(_checkout)
    yield "python", f"{platform.python_version()} ({platform.python_implementation()})"
    yield "system", f"{platform.platform()}, {os.cpu_count()} cores"
    yield "torch", _or_why(_torch)
    for package in _PACKAGES:
        if version := _or_why(_version, package):
            yield package, version
    for device in _devices():
        yield str(device), _or_why(_about, device)
    for name, value in sorted(os.environ.items()):
        if name in _NAMES or name.startswith(_PREFIXES):
            # An address with an @ may hold a user and a password.
            yield name, "(set)" if "@" in value or any(word in name for word in _SECRET) else value


def machine_name(device: str) -> str:
    """The GPU's name; of a CPU the processor's, and the cores that this process may use."""
    if device.startswith("cuda"):
        return torch.cuda.get_device_properties(device).name
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return f"{_processor()}, {cores} cores"


def _processor() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _or_why(ask: Callable[..., str], *arguments: Any) -> str:
    try:
        return ask(*arguments)
    except Exception as error:  # the report may be about a broken driver or library
        return f"not known: {type(error).__name__}: {' '.join(str(error).split())}"


def _checkout() -> str:
    """The commit of the checkout that the package is imported from, if it is one."""
    folder = Path(__file__).parents[1]
    if not (folder.parent / ".git").exists():
        return f"none, installed in {folder}"

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(folder), *arguments]
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=20).stdout.strip()

    return git("rev-parse", "--short=12", "HEAD") + (", changed since" if git("status", "--porcelain", "-uno") else "")


def _torch() -> str:
    builds = {"CUDA": torch.version.cuda, "HIP": torch.version.hip, "XPU": getattr(torch.version, "xpu", None)}
    built = [f"{name} {version}" for name, version in builds.items() if version]
    return f"{torch.__version__}, built for {', '.join(built) or 'CPUs alone'}"


def _version(package: str) -> str:
    """The installed version, or "". On ROCm and XPU triton comes as another package; then it is imported and asked."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        if package == "triton" and importlib.util.find_spec(package) is not None:
            return str(importlib.import_module(package).__version__)
        return ""


def _devices() -> list[torch.device]:
    devices = [torch.device("cpu")]
    for kind in ("cuda", "xpu"):
        try:
            devices += [torch.device(kind, index) for index in range(getattr(torch, kind).device_count())]
        except Exception:  # without a driver there are no such devices
            continue
    return devices


def _about(device: torch.device) -> str:
    backend = device_backend(torch.empty(0, device=device), "auto")
    choice = f'backend="auto" is {backend.name}: {backend.reason}'
    if device.type == "cpu":
        return choice
    properties = getattr(torch, device.type).get_device_properties(device)
    capability = f", capability {properties.major}.{properties.minor}" if device.type == "cuda" else ""
    return f"{properties.name}{capability}, {properties.total_memory / 1e9:.1f} GB; {choice}"
