"""The command line: ``fxhess COMMAND`` and ``python -m fxhess COMMAND``."""

import argparse
import sys
from collections.abc import Callable, Sequence
from typing import NamedTuple

import fxhess
from fxhess import demo

__all__ = ["main"]


class Command(NamedTuple):
    """One subcommand: its summary in a line, its arguments, and how it runs (to an exit status)."""

    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]


COMMANDS = {
    "demo": Command(demo.SUMMARY, demo.add_arguments, demo.run),
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; ``argv`` without the program's name, by default the process's own.

    Returns the exit status: 0 if all went well, 1 if a check failed (argparse itself exits with 2).
    """
    parser = argparse.ArgumentParser(
        prog="fxhess", description="Exact per-sample Hessians of PyTorch models."
    )
    parser.add_argument("--version", action="version", version=f"fxhess {fxhess.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name, command in COMMANDS.items():
        command.add_arguments(
            subparsers.add_parser(name, help=command.summary, description=command.summary)
        )
    arguments = parser.parse_args(argv)
    return COMMANDS[arguments.command].run(arguments)


if __name__ == "__main__":
    sys.exit(main())
