"""The console script ``apollo-triton``: one module for each subcommand, which is imported when it runs."""

from __future__ import annotations

import argparse
import importlib
import os
import sys

from .tools import options as options_of
from .version import __version__

MODULES = {
    "convert": "convert",
    "demo": "demo.command",
    "env": "environment",
    "memory": "memory.command",
    "validate": "validate.command",
}


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand and return the exit status.

    0 for success; 1 if ``validate`` found an error above its limit; 2, with one line on standard error, for a wrong
    input; 130 after Ctrl-C; 141, silently, if the reader of standard output has gone.
    """
    options = _parsed(arguments)
    try:
        # Here, because it imports torch: a wrong argument and --help need not wait for that.
        command = importlib.import_module(f"{__package__}.tools.{MODULES[options.command]}")
        status = command.run(options)
        sys.stdout.flush()  # here, so that a closed pipe is noticed
        return status
    except BrokenPipeError:  # e.g. head has read enough
        # Discard what is left in the buffer. Python would complain about it when it exits.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # the status of a program that SIGPIPE ends
    except (OSError, ValueError, ModuleNotFoundError) as error:
        print(f"apollo-triton {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"apollo-triton {options.command}: interrupted", file=sys.stderr)
        return 130


def _parsed(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="apollo-triton", description="APOLLO for PyTorch: it replaces AdamW where AdamW's memory does not fit."
    )
    parser.add_argument("--version", action="version", version=f"apollo-triton {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar=f"{{{','.join(MODULES)}}}")
    parsers = {}
    for name in MODULES:
        add_options = getattr(options_of, name)
        parsers[name] = commands.add_parser(name, help=add_options.__doc__, description=add_options.__doc__)
        add_options(parsers[name])
    options, rest = parser.parse_known_args(arguments)
    if options.command == "memory" and not any(word.startswith("-") for word in rest):
        # ``memory 7B``. A positional argument of argparse would not be found behind an option before Python 3.13.
        options.model = [*(options.model or []), *rest] or None
    elif rest:
        unknown = [word for word in rest if options.command != "memory" or word.startswith("-")]
        parsers[options.command].error(f"unrecognized arguments: {' '.join(unknown)}")
    return options
