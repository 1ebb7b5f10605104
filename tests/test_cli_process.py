"""The command line as a process: its status, what it prints, and how it ends."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import IO

import pytest

from flexmask import __version__

PROGRAM = """
import atexit, sys
from flexmask_cli.__main__ import run

class Object:
    def __del__(self):
        print("taken apart")

kept = Object()
atexit.register(print, "asked for at the end")
sys.argv = ["flexmask", *sys.argv[1:]]
run()
"""


def run(
    *arguments: str,
    with_torch: bool,
    stdout: int | IO[str] = subprocess.PIPE,
    **variables: str,
):
    program = "import torch\n" * with_torch + PROGRAM
    command = [sys.executable, "-c", program, *arguments]
    environment = os.environ | {"PYTHONUNBUFFERED": ""} | variables
    return subprocess.run(
        command, env=environment, stdout=stdout, stderr=subprocess.PIPE, text=True, check=False
    )


@pytest.mark.parametrize(("with_torch", "last"), [(False, ["taken apart"]), (True, [])])
def test_with_torch_a_process_ends_before_python_takes_it_apart(with_torch, last):
    result = run("--version", with_torch=with_torch)
    assert result.stdout.splitlines() == [f"flexmask {__version__}", "asked for at the end", *last]
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(("value", "is_plain"), [("1", True), ("0", False), ("", False)])
def test_a_variable_switches_off_what_makes_commands_start_and_end_faster(value, is_plain):
    program = (
        "import gc, os, sys\n"
        "os._exit = lambda status: print('ended at once', status)\n"
        "before = gc.get_threshold(), sys.getswitchinterval(), os.environ.get('OMP_WAIT_POLICY')\n"
        "from flexmask_cli.start_up import end_process, prepare_process, quick_loading\n"
        "prepare_process()\n"
        "with quick_loading():\n"
        "    loading = gc.isenabled(), sys.getswitchinterval() == before[1]\n"
        "after = gc.get_threshold(), sys.getswitchinterval(), os.environ.get('OMP_WAIT_POLICY')\n"
        "print(before == after, loading, gc.isenabled(), before[1] == after[1])\n"
        "sys.modules['torch'] = None\n"
        "end_process(3)"
    )
    environment = os.environ | {"FLEXMASK_PLAIN_START": value}
    environment.pop("OMP_WAIT_POLICY", None)
    command = [sys.executable, "-c", program]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    settings, *ending = result.stdout.splitlines()
    assert settings == f"{is_plain} ({is_plain}, {is_plain}) True True"
    assert ending == ([] if is_plain else ["ended at once 3"])


@pytest.mark.parametrize(
    ("arguments", "status", "message"),
    [
        (["--nonsense"], 2, "No such option: --nonsense"),
        (["strategies", "nope"], 1, "error: "),
    ],
)
@pytest.mark.parametrize("with_torch", [False, True])
def test_an_error_keeps_its_status_and_message(arguments, status, message, with_torch):
    result = run(*arguments, with_torch=with_torch)
    assert result.returncode == status
    assert message in result.stderr
    assert "asked for at the end" in result.stdout


def test_an_exception_keeps_its_traceback():
    program = "import torch, flexmask_cli.__main__ as process\nprocess.main = lambda: 1 / 0\n"
    command = [sys.executable, "-c", program + "process.run()"]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 1
    assert result.stderr.rstrip().endswith("ZeroDivisionError: division by zero")


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_output_that_cannot_be_written_is_an_error():
    with open("/dev/full", "w") as full:
        result = run("--help", with_torch=True, stdout=full)
    assert result.returncode != 0
    assert "No space left on device" in result.stderr


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs /dev/full")
def test_what_cannot_be_printed_at_the_end_is_said_as_python_says_it():
    with open("/dev/full", "w") as full:
        results = [run("--nonsense", with_torch=it, stdout=full) for it in (False, True)]
    assert [result.returncode for result in results] == [120, 120]
    assert all("No space left on device" in result.stderr for result in results)
