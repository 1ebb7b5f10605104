"""The command line as a process: ``flexmask``, or ``python -m flexmask_cli``."""

from __future__ import annotations

import sys

from flexmask_cli.app import main
from flexmask_cli.render.lines import print_fault
from flexmask_cli.start_up import end_process


def run() -> None:
    """Run the command line and end the process with its exit status."""
    try:
        main()
    except SystemExit as ending:
        if isinstance(ending.code, int):
            end_process(ending.code)
        raise
    except Exception:
        # As Python would print it, but without what a message in it would do to a terminal.
        print_fault()
        sys.exit(1)


if __name__ == "__main__":
    run()
