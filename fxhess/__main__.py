"""The command line: ``fxhess COMMAND`` and ``python -m fxhess COMMAND``.

Exit status: 0, all went well; 1, a check failed (a wrong value, too slow); 2, what was asked for
does not exist or does not fit; 3, fxhess refused, or the model raised an error; 130, interrupted.
"""

import argparse
import io
import os
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import NamedTuple

import fxhess
from fxhess import cli, demo
from fxhess.named import UsageError

__all__ = ["main"]

_STATUS = """
exit status: 0 all went well; 1 a check failed (a wrong value, too slow); 2 what was asked for does
not exist or does not fit; 3 fxhess refused, or the model raised an error; 130 interrupted.
"""


class Command(NamedTuple):
    """One subcommand: its summary in a line, its arguments, how it runs (to an exit status), and
    the end of its help."""

    summary: str
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], int]
    epilog: str = ""


COMMANDS = {
    "demo": Command(demo.SUMMARY, demo.add_arguments, demo.run, "\nexample:\n  fxhess demo\n"),
    **{name: Command(*command) for name, command in cli.COMMANDS.items()},
}


def parsers() -> tuple[argparse.ArgumentParser, dict[str, argparse.ArgumentParser]]:
    """The parser of the whole command line, and those of the commands by name."""
    plain = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(
        prog="fxhess",
        description="Exact per-sample Hessians of PyTorch models.",
        epilog=_STATUS,
        formatter_class=plain,
    )
    parser.add_argument("--version", action="version", version=f"fxhess {fxhess.__version__}")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    own = {}
    for name, command in COMMANDS.items():
        own[name] = subparsers.add_parser(
            name,
            help=command.summary,
            description=command.summary,
            epilog=command.epilog + _STATUS,
            formatter_class=plain,
        )
        command.add_arguments(own[name])
    return parser, own


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; ``argv`` without the program's name, by default the process's own.

    Returns the exit status; see the module's docstring (argparse itself exits with 2).
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # what a terminal cannot show is no error
            stream.reconfigure(errors="replace")
    parser, own = parsers()
    arguments = parser.parse_args(argv)
    try:
        return COMMANDS[arguments.command].run(arguments)
    except UsageError as error:
        own[arguments.command].print_usage(sys.stderr)
        return _tell(arguments.command, str(error), cli.USAGE)
    except fxhess.FxhessError as error:
        return _tell(arguments.command, f"{type(error).__name__}: {error}", cli.REFUSED)
    except KeyboardInterrupt:
        return _tell(arguments.command, "interrupted", 130)
    except BrokenPipeError:  # whoever reads has read enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except Exception as error:  # of the model's own code: where, and no status of a failed check
        traceback.print_exc()
        return _tell(arguments.command, f"{type(error).__name__}: {error}", cli.REFUSED)


def _tell(command: str, message: str, status: int) -> int:
    print(f"fxhess {command}: {message}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
