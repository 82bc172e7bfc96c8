"""What every launch script shares: help that is instant, and errors of the user's in one line."""

import os
import sys
from collections.abc import Callable


def run(main: Callable[[list[str]], None]) -> None:
    """Call ``main`` with the command line; ``--help`` prints the script's docstring and imports nothing heavy.

    A ValueError, RuntimeError, OSError or ArithmeticError becomes one line and exit code 1, its traceback shown only
    with ``--debug``; so does a library that is not installed. The launcher's ``--local_rank=N`` is dropped.
    """
    arguments = [a for a in sys.argv[1:] if not a.startswith("--local_rank")]
    if {"-h", "--help"} & set(arguments):
        print((sys.modules["__main__"].__doc__ or "").strip())
        return
    debug = "--debug" in arguments
    try:
        main([a for a in arguments if a != "--debug"])
    except KeyboardInterrupt:
        print("interrupted; the same command continues where it stopped", file=sys.stderr)
        sys.exit(130)
    except ModuleNotFoundError as error:
        if debug:
            raise
        print(f"error: {error.name}: is not installed, and this needs it. Install it with pip.", file=sys.stderr)
        sys.exit(1)
    except (ValueError, RuntimeError, OSError, ArithmeticError) as error:
        if debug:
            raise
        # rank 0 says what a user can mend; that a peer has gone is no news
        if os.environ.get("RANK", "0") == "0" or not (isinstance(error, ValueError) or "peer" in str(error)):
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(1)


def split_arguments(arguments: list[str], usage: str) -> tuple[str, list[str]]:
    """The config path and the ``key=value`` overrides after it; raises ValueError with ``usage`` when there is none."""
    if not arguments or "=" in arguments[0]:
        raise ValueError(f"no config given. Usage: {usage}")
    return arguments[0], arguments[1:]
