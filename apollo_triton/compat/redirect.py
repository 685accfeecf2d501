"""Lets programs that import ``apollo_torch`` use apollo_triton: by one call, or without editing them:

    python -m apollo_triton.compat train.py --optim apollo_adamw ...
    python -m apollo_triton.compat -m some.module ...
    python -m apollo_triton.compat torchrun --nproc-per-node 2 train.py ...

This puts a folder with a package ``apollo_torch`` first on the path. ``import``, ``find_spec`` and
``importlib.metadata`` then find it like any package, in this process and in those that it starts.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import warnings
from collections.abc import Sequence
from pathlib import Path

_FOLDER = str(Path(__file__).parent / "stand_in")


def as_apollo_torch() -> None:
    """Make ``import apollo_torch`` give this package's ``APOLLOAdamW`` and ``QAPOLLOAdamW`` from here on.

    Call it before anything imports ``apollo_torch`` or looks for it, because transformers remembers whether it is
    there. The stand-in has the names and arguments of version 1.0.3, and is found as version 1.0.3+apollo.triton.
    Processes that this one starts find it too. A rank above a weight's width, which is an error in ``APOLLOAdamW``, is
    only a warning there, so that programs which ran with apollo-torch still run.

    Warns if apollo-torch is installed; it is then not used. Raises RuntimeError if it has been imported already.

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
    if _FOLDER in sys.path:
        return
    installed = next(iter(importlib.metadata.distributions(name="apollo-torch")), None)
    if installed is not None:
        warnings.warn(
            f"apollo-torch {installed.version} is installed and stays unused: import apollo_torch gives apollo_triton",
            stacklevel=2,
        )
    sys.path.insert(0, _FOLDER)
    inherited = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = _FOLDER + (os.pathsep + inherited if inherited else "")
    importlib.invalidate_caches()


def main(arguments: Sequence[str]) -> None:
    """Run a program in this process's place, with ``apollo_torch`` as the stand-in. ``arguments`` are a script, ``-m``
    and a module, or a command, each with its own arguments. Exits with 2 and says what is missing if there is no such
    program."""
    if not arguments or arguments[0] in ("-h", "--help"):
        print(__doc__)
        sys.exit(0 if arguments else 2)
    as_apollo_torch()
    if arguments[0] == "-m" or Path(arguments[0]).is_file():
        command = [sys.executable, *arguments]
    else:
        beside = os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", os.defpath)])
        found = shutil.which(arguments[0], path=beside)
        if found is None:
            print(f"{arguments[0]}: no such file, and no command of this name; -m runs a module", file=sys.stderr)
            sys.exit(2)
        command = [found, *arguments[1:]]
    sys.stdout.flush()
    sys.stderr.flush()
    if os.name == "posix":
        os.execv(command[0], command)
    sys.exit(subprocess.call(command))


if __name__ == "__main__":
    main(sys.argv[1:])
