"""The command line as a process: ``flexmask``, or ``python -m flexmask_cli``."""

from __future__ import annotations

from flexmask_cli.app import main
from flexmask_cli.start_up import end_process


def run() -> None:
    """Run the command line and end the process with its exit status."""
    try:
        main()
    except SystemExit as ending:
        if isinstance(ending.code, int):
            end_process(ending.code)
        raise


if __name__ == "__main__":
    run()
