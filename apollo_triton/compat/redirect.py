"""Lets programs that import ``apollo_torch`` use apollo_triton: by one call, or without editing them:

    python -m apollo_triton.compat train.py --optim apollo_adamw ...
    python -m apollo_triton.compat -m some.module ...
    python -m apollo_triton.compat torchrun --nproc-per-node 2 train.py ...

This puts a folder with a package ``apollo_torch`` first on the path. ``import``, ``find_spec`` and
``importlib.metadata`` then find it like any package, in this process and in those that it starts.

PROGRAM is a script if it ends in .py or has a path separator, as in ./train, and a command otherwise. Python looks
beside a script, and with -m in the current folder, before it looks anywhere else. So a program is not started where an
apollo_torch of its own lies there.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from importlib.machinery import PathFinder
from pathlib import Path

_FOLDER = str(Path(__file__).parent / "stand_in")


def as_apollo_torch() -> None:
    """Make ``import apollo_torch`` give this package's ``APOLLOAdamW`` and ``QAPOLLOAdamW`` from here on.

    Call it before anything imports ``apollo_torch`` or looks for it, because transformers remembers whether it is
    there. The stand-in has the names and arguments of version 1.0.3, and is found as version 1.0.3+apollo.triton.
    Processes that this one starts find it too. A rank above a weight's width, which is an error in ``APOLLOAdamW``, is
    only a warning there, so that programs which ran with apollo-torch still run.

    Warns if there is another ``apollo_torch``, installed or in a folder of the path; it is then not used. Raises
    RuntimeError if one has been imported already.

    >>> as_apollo_torch()  # doctest: +SKIP
    >>> import apollo_torch  # doctest: +SKIP
    >>> issubclass(apollo_torch.APOLLOAdamW, apollo_triton.APOLLOAdamW)  # doctest: +SKIP
    True
    """
    loaded = sys.modules.get("apollo_torch")
    if loaded is not None and not str(loaded.__file__).startswith(_FOLDER):
        raise RuntimeError(
            f"apollo_torch is imported already, from {loaded.__file__}; call as_apollo_torch() at the beginning of the "
            "program"
        )
    found = _found_in(sys.path)
    if found == Path(_FOLDER).resolve():  # a second call, or the program was started by ``main``
        return
    sys.path[:] = [path for path in sys.path if path != _FOLDER]  # inherited, and not first
    installed = next(iter(importlib.metadata.distributions(name="apollo-torch")), None)
    if installed is not None and found in (None, Path(str(installed.locate_file(""))).resolve()):
        warnings.warn(
            f"apollo-torch {installed.version} is installed and stays unused: import apollo_torch gives apollo_triton",
            stacklevel=2,
        )
    elif found is not None:
        warnings.warn(
            f"the apollo_torch in {found} stays unused here: import apollo_torch gives apollo_triton. A script that is "
            "started from here and lies beside it would use it all the same, so rename it",
            stacklevel=2,
        )
    sys.path.insert(0, _FOLDER)
    inherited = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path not in ("", _FOLDER)]
    os.environ["PYTHONPATH"] = os.pathsep.join([_FOLDER, *inherited])
    importlib.invalidate_caches()


def _found_in(path: Sequence[str]) -> Path | None:
    """The folder of ``path`` from which Python would import ``apollo_torch``. A folder of this name without an
    ``__init__.py`` does not count, because any package or module comes before it."""
    spec = PathFinder.find_spec("apollo_torch", path)
    if spec is None or spec.origin is None:
        return None
    where = Path(spec.origin).resolve().parent
    return where.parent if spec.submodule_search_locations else where


def _looks_first(arguments: Sequence[str], is_script: bool) -> Iterator[Path]:
    """The folders in which Python would look before it comes to the stand-in."""
    if os.environ.get("PYTHONSAFEPATH"):
        return
    if is_script:
        yield Path(arguments[0]).resolve().parent
    elif arguments[0] == "-m":
        yield Path.cwd()
    else:  # a launcher such as torchrun: what it starts
        words = list(arguments[1:])
        yield from (Path(word).resolve().parent for word in words if word.endswith(".py") and Path(word).is_file())
        if {"-c", "-m", "--module"} & set(words):
            yield Path.cwd()


def main(arguments: Sequence[str]) -> None:
    """Run a program in this process's place, with ``apollo_torch`` as the stand-in. ``arguments`` are a script, ``-m``
    and a module, or a command, each with its own arguments. Exits with 2 and says what is missing if there is no such
    program."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: python -m apollo_triton.compat PROGRAM [ARGUMENT ...]\n\n{(__doc__ or '').replace('``', '')}")
        sys.exit(0 if arguments else 2)
    program = arguments[0]
    beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
    is_path = program.endswith(".py") or any(separator in program for separator in ("/", os.sep))
    found = None if is_path or program == "-m" else shutil.which(program, path=beside)
    is_script = is_path and Path(program).is_file()
    if found is None and not is_script and program != "-m":
        kind = "file" if is_path else "command"
        # A file called torchrun is not taken for the command where that is not installed.
        hint = f"write ./{program} for the file of this name" if Path(program).is_file() else "-m runs a module"
        print(f"{program}: no such {kind}; {hint}", file=sys.stderr)
        sys.exit(2)
    for folder in _looks_first(arguments, is_script):
        if _found_in([str(folder)]) is not None:
            print(
                f"{program}: Python would use the apollo_torch in {folder}, and not apollo_triton, because it looks "
                "there first: rename it or move it away",
                file=sys.stderr,
            )
            sys.exit(2)
    as_apollo_torch()
    command = [sys.executable, *arguments] if found is None else [found, *arguments[1:]]
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name == "posix":
        os.execv(command[0], command)
    sys.exit(subprocess.call(command))


if __name__ == "__main__":
    main(sys.argv[1:])
