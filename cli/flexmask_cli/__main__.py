"""The command line as a process: ``flexmask``, or ``python -m flexmask_cli``."""

from __future__ import annotations

import atexit
import os
import sys

from flexmask_cli.app import main


def run() -> None:
    """Run the command line, and end at once where Python would first take torch apart.

    It would look several times through the million objects that torch and transformers are made
    of, and free each: more than a second, in which nothing happens that a user waits for.
    """
    try:
        main()
    except SystemExit as ending:
        if isinstance(ending.code, int) and "torch" in sys.modules:
            _end(ending.code)
        raise


def _end(status: int) -> None:
    """End the process; return, and leave it to Python, if what it printed cannot be written."""
    atexit._run_exitfuncs()  # noqa: SLF001 (there is no other way to run them)
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # None: it is closed
                stream.flush()
    except OSError:
        return
    os._exit(status)


if __name__ == "__main__":
    run()
