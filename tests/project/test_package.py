"""What an import costs and brings, what a step may allocate, and how the package is laid out."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from apollo_triton import APOLLOAdamW, __version__
from apollo_triton.core.extras import require

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_import_needs_torch_alone():
    """Modules that ``import torch`` does not load already are not loaded by us either."""
    code = (
        "import torch, sys; before = set(sys.modules); from apollo_triton import *; print(*set(sys.modules) - before)"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    brought = {name.partition(".")[0] for name in found.split()}
    assert brought == {"apollo_triton"}
    assert [line for line in requires("apollo-triton") if "extra ==" not in line] == ["torch>=2.6"]


def test_missing_extras_are_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ModuleNotFoundError) as error:
        require("transformers", "demo")
    assert "in a checkout pip install -c constraints.txt '.[demo]'" in str(error.value)
    assert "pip install 'apollo-triton[demo]'" in str(error.value)


def test_the_extra_of_triton_brings_what_its_interpreter_imports():
    """apollo-triton validate on a CPU where nothing else has brought numpy."""
    text = (ROOT / "pyproject.toml").read_text()
    extra = re.search(r"^triton = \[(.*)\]$", text, re.MULTILINE)
    assert extra
    assert '"numpy"' in extra[1]


def test_every_folder_of_the_package_is_installed():
    """A folder that pyproject.toml leaves out works in a checkout and is missing from the wheel."""
    text = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"^packages = \[(.*?)\]", text, re.MULTILINE | re.DOTALL)
    found = {".".join(path.parent.relative_to(ROOT).parts) for path in (ROOT / "apollo_triton").rglob("__init__.py")}
    found = {name for name in found if ".stand_in" not in name} | {"apollo_triton.kernels"}
    assert sorted(re.findall(r'"([\w.]+)"', listed[1])) == sorted(found)


def test_every_other_file_of_the_package_is_installed():
    """A data file that pyproject.toml leaves out works in a checkout and is missing from the wheel."""
    text = (ROOT / "pyproject.toml").read_text()
    listed = re.search(r"^apollo_triton = (\[.*\])$", text, re.MULTILINE)
    patterns = ast.literal_eval(listed[1])
    package = ROOT / "apollo_triton"
    code = {path.relative_to(package).as_posix() for path in package.rglob("__init__.py")}
    modules = {path for name in code for path in (package / name).parent.glob("*.py")}
    others = {path for path in package.rglob("*") if path.is_file() and path.suffix != ".pyc"} - modules
    installed = {path for pattern in patterns for path in package.glob(pattern)}
    stand_in = {path for path in modules if "stand_in" in path.parts}  # no subpackage: its folders go on the path
    assert others | stand_in <= installed


def test_kernels_are_a_subpackage_and_nothing_else_takes_their_name():
    assert importlib.import_module("apollo_triton.kernels").__name__ == "apollo_triton.kernels"
    assert '"""' in (ROOT / "kernels/__init__.py").read_text()
    code = compile((ROOT / "kernels/__init__.py").read_text(), "kernels", "exec")
    assert code.co_names in ((), ("__doc__",))


class LargestTensor(TorchDispatchMode):
    """Bytes of the largest storage that an operation made, inputs and views of them aside."""

    def __init__(self):
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {x.untyped_storage().data_ptr() for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr() not in given:
                self.bytes = max(self.bytes, x.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(4096, 1024), (1024, 4096), (2, 4096, 512)])
@pytest.mark.parametrize(
    "group", [{"rank": 1, "scale_type": "tensor"}, {"rank": 16}, {}], ids=["mini", "channel", "dense"]
)
def test_no_temporary_has_a_weights_size(dtype, shape, group):
    """The largest is a block, 4 MB of float32, whatever the weight: 16 MB in float32 here."""
    weight = torch.nn.Parameter(torch.zeros(shape, dtype=dtype))
    optimizer = APOLLOAdamW([{"params": [weight], **group}], weight_decay=0.1, max_grad_norm=1.0)
    weight.grad = torch.ones_like(weight)
    optimizer.step()  # makes the state
    with LargestTensor() as largest:
        optimizer.step()
    assert 0 < largest.bytes <= 4 << 20


def test_the_state_is_as_small_as_promised():
    weight = torch.nn.Parameter(torch.zeros(512, 384, dtype=torch.bfloat16))
    for rank in (1, 32):
        optimizer = APOLLOAdamW([{"params": [weight], "rank": rank}])
        weight.grad = torch.ones_like(weight)
        optimizer.step()
        tensors = [value for value in optimizer.state[weight].values() if isinstance(value, torch.Tensor)]
        # two float32 moments of [512, rank], u_prev, and the step count on the host
        assert sum(x.numel() * x.element_size() for x in tensors) == 2 * 4 * 512 * rank + 4 + 4


def test_the_version_is_the_same_wherever_it_is_written():
    """A release of which the citation or the changelog was forgotten."""
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert re.search(rf"^## {re.escape(__version__)}\b", (ROOT / "CHANGELOG.md").read_text(), re.MULTILINE)
