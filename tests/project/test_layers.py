"""The layering of the package: a file imports from its own layer or from one below, and no two files form a circle.

Imports inside functions and under ``TYPE_CHECKING`` count as well.
"""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

PACKAGE = Path(__file__).parents[2] / "apollo_triton"
# From the bottom to the top. "" is ``apollo_triton/__init__.py``.
LAYERS = ["version", "core", "int8", "params", "backends", "engine", "optimizer", "layerwise"]
LAYERS += ["", "tools", "compat", "cli"]
# The single files at the top of the package, each with the layer that it belongs to.
FACE = {"summary": "optimizer", "qapollo": "layerwise", "trainer": "layerwise", "checkpoint": "int8", "__main__": "cli"}


def modules():
    """The path of every module of the package by its name, relative to the package."""
    files = [path for path in PACKAGE.rglob("*.py") if not {"stand_in", "kernels"} & {*path.parts}]
    names = (".".join(path.relative_to(PACKAGE).with_suffix("").parts) for path in files)
    return dict(zip((name.removesuffix("__init__").rstrip(".") for name in names), files, strict=True))


def imports(name, path, known):
    """Every module of the package that a file imports."""
    parts = name.split(".") if path.stem == "__init__" and name else name.split(".")[:-1]
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            base = ".".join([*parts[: len(parts) - node.level + 1], *filter(None, [node.module])])
            for alias in node.names:
                inner = f"{base}.{alias.name}".lstrip(".")
                yield inner if inner in known else base


def graph():
    """The modules that each module imports. The kernels import nothing of the package and are left out."""
    known = modules()
    return {
        name: {target for target in imports(name, path, known) if target != name and not target.startswith("kernels")}
        for name, path in known.items()
    }


def layer(module):
    first = module.partition(".")[0]
    return LAYERS.index(FACE.get(first, first))


def test_imports_go_down():
    upward = [
        f"{name} -> {target}" for name, targets in graph().items() for target in targets if layer(target) > layer(name)
    ]
    assert not upward, f"these imports go up: {upward}"


def test_no_two_files_form_a_circle():
    TopologicalSorter(graph()).prepare()  # raises CycleError, which names the files


def test_the_backends_do_not_import_each_other():
    for name, other in (("reference", "triton"), ("triton", "reference")):
        for module, targets in graph().items():
            if module.startswith(f"backends.{name}"):
                assert not [target for target in targets if target.startswith(f"backends.{other}")], module


# The files that only one backend has: what bitsandbytes does and how results are rounded; what launches are given and
# what ``rescale`` reads.
ONLY_REFERENCE = {"dense_8bit", "rounding"}
ONLY_TRITON = {"arguments", "channels", "layout", "projections"}


def public(backend, file):
    """The public functions and classes of a file of a backend, in their order."""
    tree = ast.parse((PACKAGE / "backends" / backend / f"{file}.py").read_text(encoding="utf-8"))
    names = [node.name for node in tree.body if isinstance(node, (ast.FunctionDef, ast.ClassDef))]
    return [name for name in names if not name.startswith("_")]


def test_reading_one_backend_teaches_the_other():
    files = {}
    for backend in ("reference", "triton"):
        files[backend] = {path.stem for path in (PACKAGE / "backends" / backend).glob("[!_]*.py")}
    shared = files["reference"] - ONLY_REFERENCE
    assert shared == files["triton"] - ONLY_TRITON
    for file in ("verbs", "dense"):
        assert public("reference", file) == public("triton", file)
    for file in shared:
        reference, triton = public("reference", file), public("triton", file)
        assert [name for name in reference if name in triton] == [name for name in triton if name in reference]
