"""What docs/design.md shows is so: the algorithm in thirty lines, ``Engine.run``, the tables of files."""

import ast
import inspect
import re
import textwrap
from pathlib import Path

import pytest
import torch

from apollo_triton import APOLLOAdamW
from apollo_triton.engine.engine import Engine

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")


def section(title):
    """The text of a section of the page."""
    return PAGE.partition(f"\n## {title}\n")[2].partition("\n## ")[0]


def first_block(title):
    return re.search(r"(?ms)^```python\n(.*?)^```$", section(title))[1]


# Of G's entries, step by step: without a gradient in step 2, and so small in step 5 that eps and the 1e-8 of the norms
# count. In steps 3 and 4 u grows by a quarter, and the limiter bites. P changes in step 5.
SIZES = [1e-3, 0.0, 1e-3, 4e-3, 1e-6, 1e-3, 1e-3]
METHODS = {
    "apollo": {"rank": 4, "scale_type": "channel", "scale": 1.0},
    "mini": {"rank": 1, "scale_type": "tensor", "scale": 128.0},
}
OPTIONS = {"plain": {}, "no limiter": {"disable_nl": True}, "no correction": {"correct_bias": False}}


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", [(48, 20), (20, 48)], ids=["tall", "wide"])
@pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
def test_the_thirty_lines_are_what_the_package_computes(method, shape, options):
    """A line of docs/design.md that the package has left behind, or that never was true."""
    names = {}
    exec(compile(first_block("The algorithm"), "docs/design.md", "exec"), names)
    generator = torch.Generator().manual_seed(0)
    start = 0.1 * torch.randn(shape, generator=generator)
    W, weight, state = start.clone(), torch.nn.Parameter(start.clone()), {}
    options = method | {"lr": 0.01, "weight_decay": 0.1, "update_proj_gap": 4, "seed": 5} | options
    group = {name: value for name, value in options.items() if name != "seed"}
    optimizer = APOLLOAdamW([{"params": [weight], **group}], seed=options["seed"], backend="reference")
    common = torch.randn(shape, generator=generator)
    distance = 0.0
    for step, size in enumerate(SIZES, 1):
        G = size * (common + 0.1 * torch.randn(shape, generator=generator))
        before = W.clone()
        names["apollo_step"](W, G, state, **options)
        weight.grad = G
        optimizer.step()
        distance += (W - before).abs().max()
        # float32 rounds to 6e-8. R's error, and with it that of s, is up to |G| |P| / |R| times as large, below 30 for
        # every channel here. That is 2e-6 of the distance moved. W is rounded twice a step, by 6e-8 of its size.
        tolerance = 2e-6 * distance + 2 * 6e-8 * step * W.abs().max()
        assert (W - weight).abs().max() <= tolerance, f"step {step}"


def test_the_body_of_a_step_is_shown_as_it_is():
    """An ``Engine.run`` that was changed, and the page was left as it is."""
    shown = ast.parse(first_block("The way through the code")).body[0]
    real = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(Engine.run)))).body[0]
    without_docstring = real.body[1:]
    assert [ast.dump(line) for line in shown.body] == [ast.dump(line) for line in without_docstring]


def test_every_file_is_in_the_tables_of_files():
    """A file that was added, moved or removed, and the tables were left as they are."""
    shown = []
    for part in section("Files").split("\n### `")[1:]:
        folder, _, table = part.partition("`\n")
        shown += [folder + name for name in re.findall(r"(?m)^\| `([^`]+)` \|", table)]
    folders = ROOT / "apollo_triton", ROOT / "kernels"
    files = {path.relative_to(ROOT).as_posix() for folder in folders for path in folder.rglob("*.py")}
    # A folder's __init__.py says what the folder is; the stand-in's has its code.
    files = {file for file in files if not file.endswith("__init__.py") or "/stand_in/" in file}
    assert sorted(shown) == sorted(files - {"kernels/__init__.py"})
