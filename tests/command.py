"""Runs ``flexmask`` in this process, and holds what it says against how mistakes must be told."""

from __future__ import annotations

import io
import sys
import traceback
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from unittest import mock

from flexmask.printable import LINES, printable
from flexmask_cli.app import main

LONGEST_LINE = 2_200


@dataclass(frozen=True)
class Outcome:
    """What came of a command.

    Attributes:
        status: As a shell has it.
        out: Its standard output.
        err: Its standard error.
    """

    status: int
    out: str
    err: str

    @property
    def error(self) -> str:
        """The one line of a mistake; all else about it is checked."""
        assert self.status in (1, 2), self.err[-LONGEST_LINE:]
        assert "Traceback" not in self.err, self.err
        assert printable(self.out + self.err, LINES) == self.out + self.err
        *before, last = self.err.splitlines()
        assert last.startswith("error: " if self.status == 1 else "Error: "), self.err
        assert len(last) <= LONGEST_LINE
        if self.status == 1:
            assert all(line.startswith("warning: ") for line in before), self.err
        else:
            assert not before or before[0].startswith("Usage: "), self.err
        return last


def run_command(*arguments: object) -> Outcome:
    """Run ``flexmask`` with these arguments."""
    out, err = io.StringIO(), io.StringIO()
    status: object = 0
    with (
        mock.patch.object(sys, "argv", ["flexmask", *map(str, arguments)]),
        redirect_stdout(out),
        redirect_stderr(err),
    ):
        try:
            main()
        except SystemExit as end:
            status = end.code
        except BaseException:
            status = 1
            traceback.print_exc()
    if isinstance(status, str):  # Python prints it
        return Outcome(1, out.getvalue(), f"{err.getvalue()}{status}\n")
    return Outcome(int(status or 0), out.getvalue(), err.getvalue())  # type: ignore[call-overload]
