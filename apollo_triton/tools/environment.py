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
import re
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
# Parts of names of what is kept secret, in any case.
_SECRET = "token|key|secret|pass|auth|cred|pwd|pw(?![a-z])|cookie|session|signature|private"
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
# A report is public. So a value is shown only of a setting that is known, and only if it looks like that setting's
# values. Of all others with one of the prefixes the name is shown: any of them may hold a password, an address, or the
# name of a person or a machine.
_NUMBER = r"-?\d{1,6}(\.\d{1,3})?"
_FLAG = r"(?i:0|1|true|false|yes|no|on|off)"
_DEVICES = r"-1|\d{1,3}(,\d{1,3})*"
_PLACE = r"/(usr|opt)(/(local|bin|lib|lib64|rocm|cuda)([-.]\d+(\.\d+)*)?)*/?(ptxas|cuobjdump|nvdisasm)?"
_ALLOCATOR = (
    r"(backend|expandable_segments|garbage_collection_threshold|max_split_size_mb|pinned_use_cuda_host_register"
    rf"|roundup_power2_divisions):({_NUMBER}|True|False|native|cudaMallocAsync)"
)
_SHOWN = {
    r"(RANK|LOCAL_RANK|WORLD_SIZE|(OMP|MKL)_NUM_THREADS|TORCHINDUCTOR_COMPILE_THREADS|CUDA_DEVICE_MAX_CONNECTIONS"
    r"|ACCELERATE_GRADIENT_ACCUMULATION_STEPS|NCCL_(MIN|MAX)_NCHANNELS|NCCL_BUFFSIZE|NCCL_NTHREADS)": _NUMBER,
    r"(CUDA|HIP|ROCR)_VISIBLE_DEVICES": _DEVICES,
    r"CUDA_(HOME|PATH)|TRITON_(PTXAS(_BLACKWELL)?|CUOBJDUMP|NVDISASM)_PATH": _PLACE,
    r"TRITON_(INTERPRET|DEBUG|ALWAYS_COMPILE|DISABLE_LINE_INFO|ENABLE_LLVM_DEBUG|KERNEL_DUMP|PRINT_AUTOTUNING"
    r"|CACHE_AUTOTUNING|DEFAULT_FP_FUSION|STORE_BINARY_ONLY|F32_DEFAULT)": rf"{_FLAG}|ieee|tf32|tf32x3",
    r"TORCH_(COMPILE_DISABLE|ALLOW_TF32_CUBLAS_OVERRIDE|USE_CUDA_DSA|SHOW_CPP_STACKTRACES|NCCL_\w*(WAIT|HANDLING))"
    r"|TORCHINDUCTOR_(MAX_AUTOTUNE\w*|FREEZING|FORCE_DISABLE_CACHES|FX_GRAPH_CACHE|COORDINATE_DESCENT_TUNING)": _FLAG,
    r"PYTORCH_(NO_CUDA_MEMORY_CACHING|NVML_BASED_CUDA_CHECK|ENABLE_MPS_FALLBACK|JIT|DISABLE_JIT)": _FLAG,
    r"PYTORCH_((CUDA|HIP)_)?ALLOC_CONF": rf"({_ALLOCATOR})(,\s*({_ALLOCATOR}))*",
    r"TORCH_CUDA_ARCH_LIST": r"\d{1,2}\.\d[af]?(\+PTX)?([ ;]\d{1,2}\.\d[af]?(\+PTX)?)*",
    r"CUDA_(LAUNCH_BLOCKING|MODULE_LOADING|DEVICE_ORDER)": rf"{_FLAG}|LAZY|EAGER|DEFAULT|PCI_BUS_ID|FASTEST_FIRST",
    r"NCCL_((P2P|IB|SHM|NET|COLLNET|CUMEM|NVLS)_(DISABLE|ENABLE))": _FLAG,
    r"NCCL_(DEBUG|P2P_LEVEL|ALGO|PROTO)": r"VERSION|WARN|INFO|TRACE|LOC|NVL|PIX|PXB|PHB|SYS|Ring|Tree|LL|LL128|Simple",
    r"OMP_(PROC_BIND|DYNAMIC|NESTED|WAIT_POLICY)": rf"{_FLAG}|close|spread|master|ACTIVE|PASSIVE",
    r"ACCELERATE_(MIXED_PRECISION|USE_(CPU|FSDP|DEEPSPEED|MPS_DEVICE|XPU)|DYNAMO_BACKEND)": (
        rf"{_FLAG}|fp16|bf16|fp8|INDUCTOR|EAGER|inductor|eager"
    ),
}


def run(options: argparse.Namespace) -> int:
    found = dict(facts())
    print(json.dumps(found, indent=2) if options.json else markdown(found))
    return 0


def markdown(found: dict[str, str]) -> str:
    """A Markdown table of two columns, for an issue."""

    def cell(text: str) -> str:
        return " ".join("".join(c if c.isprintable() else " " for c in text).split()).replace("|", "/")

    first, *rest = (f"| {cell(name)} | {cell(value)} |" for name, value in found.items())
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
    yield from _settings()


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
        return _public(ask(*arguments))
    except Exception as error:  # the report may be about a broken driver or library
        return f"not known: {type(error).__name__}: {_public(' '.join(str(error).split()))}"


def _public(text: str) -> str:
    """The text, which may be any error's, without home folders, the user's name, and what an address or a setting of
    the environment keeps secret."""
    for name, value in os.environ.items():
        if len(value) > 5 and re.search(_SECRET, name, re.IGNORECASE):
            text = text.replace(value, "(hidden)")
    for home in {str(Path.home()), os.path.realpath(Path.home())} - {os.sep}:
        text = text.replace(home, "~")
    text = re.sub(r"(?i)(/home/|/Users/|\\Users\\)[^/\\\s'\":,]+", "~", text)
    text = re.sub(r"(?<=://)[^/\s@]*@", "", text)
    text = re.sub(r"(://[^\s?#'\"]*)[?#][^\s'\"]*", r"\1?(hidden)", text)
    return re.sub(rf"(?i)([\w-]*({_SECRET})[\w-]*=)[^\s,;&]+", r"\1(hidden)", text)


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


def _settings() -> Iterator[tuple[str, str]]:
    """The environment's settings by name, with their values where ``_SHOWN`` knows that these are harmless."""
    for name, value in sorted(os.environ.items()):
        known = [values for names, values in _SHOWN.items() if re.fullmatch(names, name)]
        if known or name.startswith(_PREFIXES):
            yield name, value if any(re.fullmatch(values, value) for values in known) else "(set)"


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
