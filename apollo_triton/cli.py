"""The console script ``apollo-triton``: one module for each subcommand. Importing them needs only torch."""

from __future__ import annotations

import argparse
import os
import sys

from .tools import environment
from .tools.demo import command as demo
from .tools.memory import command as memory
from .tools.validate import command as validate
from .version import __version__


def main(arguments: list[str] | None = None) -> int:
    """Run a subcommand and return the exit status.

    0 for success; 1 if ``validate`` found an error above its limit; 2, with one line on standard error, for a wrong
    input; 130 after Ctrl-C; 141, silently, if the reader of standard output has gone.
    """
    parser = argparse.ArgumentParser(
        prog="apollo-triton", description="APOLLO for PyTorch: it replaces AdamW where AdamW's memory does not fit."
    )
    parser.add_argument("--version", action="version", version=f"apollo-triton {__version__}")
    modules = {"demo": demo, "env": environment, "memory": memory, "validate": validate}
    commands = parser.add_subparsers(dest="command", required=True, metavar=f"{{{','.join(modules)}}}")
    for name, module in modules.items():
        summary = (module.__doc__ or "").partition("\n")[0]
        command = commands.add_parser(name, help=summary, description=summary)
        module.add_arguments(command)
        command.set_defaults(run=module.run)
    options = parser.parse_args(arguments)
    try:
        status = options.run(options)
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
