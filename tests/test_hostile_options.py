"""Options with values that they cannot have: one line, before anything is loaded or written."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from command import run_command
from sampling_of_cases import sampled

LONG = "9" * 1000
NAME = "x" * 5000
ESCAPE = "\x1b[2J\u202e"
ROWS = ("generate", "-i", "rows.jsonl")
COMPARE = ("compare", "-i", "rows.jsonl")
TASK = (*ROWS, "--task", "webqa")

NUMBER = "Input should be a valid number"
INTEGER = "Input should be a valid integer"
POSITIVE, AT_LEAST_0 = "must be a positive number, got", "must be a number, 0 or more, got"
AT_MOST = "must be at most 2,147,483,647"
TEMPERATURE = "temperature must be 0, or 1e-06 to 1e+06"
PROBABILITY = "top_p must be above 0 and at most 1"
ROWS_OR_AUTO = "--batch-size must be a positive number or auto"
DEVICE = "device must be auto, cpu, cuda or cuda:N"
DTYPE = "dtype must be auto, float32"
UNKNOWN = "unknown strategy"
NO_FILE = "No such file or directory"
PIPE = "not a file but a pipe or device"
IS_EMPTY = "is empty; name something or leave it out"
TOO_LONG = "File name too long"
PAIR = "takes KEY=VALUE"
EXTENSION = "unknown extension"
COUNTS = "must be numbers as in 1,3,5 or all"
LENGTHS = "--segments must be positive numbers as in 40,35,38"
HEADS = "--heads must be two numbers as in 24:8, or one"
PLUGIN_NAME = "a plugin's name starts with a letter"
MODEL = "needs a --model"


Case = tuple[tuple[str, ...], str]


def each(command: tuple[str, ...], option: str, *pairs: tuple[str, str]) -> list[Case]:
    """A case for each value of an option, with what is said of it."""
    return [((*command, option, value), message) for value, message in pairs]


CASES: list[Case] = [
    *each(ROWS, "--temperature", ("-inf", "temperature must"), ("1e999", TEMPERATURE),
          ("0x1", NUMBER), ("", NUMBER), ("-1", "must not be negative")),
    *each(ROWS, "--top-p", ("0", PROBABILITY), ("1.1", PROBABILITY), ("nan", PROBABILITY)),
    *each(ROWS, "--top-k", ("-1", AT_LEAST_0), ("1.5", AT_LEAST_0)),
    *each(ROWS, "--seed", ("x", INTEGER), ("1e3", INTEGER)),
    *each(ROWS, "--max-new-tokens", ("-5", POSITIVE), ("1e3", POSITIVE), ("٣", POSITIVE)),
    *each(ROWS, "--batch-size", ("0", ROWS_OR_AUTO), ("-1", ROWS_OR_AUTO), ("", IS_EMPTY),
          ("²", ROWS_OR_AUTO), ("1.5", ROWS_OR_AUTO), (ESCAPE, "got '\\x1b[2J\\u202e'")),
    *each(ROWS, "--limit", ("0", POSITIVE), (LONG, AT_MOST)),
    *each(ROWS, "--num-segments", ("0", POSITIVE), ("9", "9 segments asked for, got 2")),
    *each(ROWS, "--device", ("tpu", DEVICE), ("cuda:-1", DEVICE), ("", IS_EMPTY), ("meta", DEVICE),
          (NAME, DEVICE), (ESCAPE, DEVICE)),
    *each(ROWS, "--dtype", ("float8", DTYPE), ("torch.float32", DTYPE)),
    *each(ROWS, "--prefill-kernel", ("x", "must be auto, triton or flash")),
    *each(ROWS, "--strategy", ("", IS_EMPTY), ("__class__", UNKNOWN), ("../causal", UNKNOWN),
          (NAME, UNKNOWN), ("no.py", NO_FILE), (f"{NAME}.py", TOO_LONG),
          ("empty.py", "defines no strategy"), ("broken.py:x", "SyntaxError"),
          ("raises.py", "ValueError: xxx")),
    *each(ROWS, "--param", ("x", PAIR), ("=x", PAIR), ("positions=", "must be restart|sequential"),
          ("__class__=x", "has no parameter '__class__'")),
    *each((*ROWS, "-s", "sliding_window"), "-p", ("window=nan", "must be int"),
          ("window=0", "must be positive"), ("window=1.5", "must be int")),
    *each(ROWS, "--fusion", ("median", "fusion must be one of"), ("weighted_max", "needs weights"),
          ("", IS_EMPTY)),
    *each((*ROWS, "--fusion", "mean"), "--fusion-weights", ("x", "must be one of column")),
    *each(ROWS, "--stop", ("", "--stop must not be empty")),
    *each(ROWS, "--model", ("", IS_EMPTY)),
    *each(("generate",), "-i", ("", IS_EMPTY), ("no.jsonl", NO_FILE), ("folder", "not a folder"),
          ("fifo", PIPE), ("/dev/zero", PIPE), (NAME, TOO_LONG), ("/dev/fd/999", NO_FILE),
          ("/dev/fd/99999999999999999999", NO_FILE), ("a:b:c:d", NO_FILE),
          (f"{ESCAPE}.jsonl", NO_FILE)),
    *each(ROWS, "-o", ("", IS_EMPTY), ("folder", "a folder"), ("x.txt", EXTENSION),
          ("/dev/null", EXTENSION), (".feather", EXTENSION), (f"{NAME}.feather", TOO_LONG),
          ("/proc/x.feather", "nothing can be written there"), ("rows.jsonl", "exists; pass --"),
          ("rows.jsonl/x.feather", "nothing can be written there")),
    *each(ROWS, "--delimiter", ("", "must be one character"), (";;", "must be one character")),
    *each(ROWS, "--encoding", ("rot13", "one that Python knows"), ("../x", "that Python knows"),
          ("undefined", "one that Python knows"), ("utf-16", "not utf-16 text"),
          ("punycode", "not punycode text")),
    *each(ROWS, "--column", ("x", "takes NAME=COLUMN"), ("segments=no", "no column 'no'"),
          ("segments=", "no column ''"), ("nope=segments", "no column 'nope' to be read"),
          ("weights=x", "is read with --fusion-weights column only")),
    *each(ROWS, "--task", ("", IS_EMPTY), ("no", "unknown task"), ("../webqa", "unknown task"),
          (f"{NAME}.toml", TOO_LONG), (ESCAPE, "unknown task"), ("fifo.toml", "not a regular")),
    *each(TASK, "--paraphrases", ("first 0", "are selected by"), ("x" * 10**5, "are selected by")),
    *each(ROWS, "--num-examples", ("-1", AT_LEAST_0), ("3", "needs a --task")),
    *each(ROWS, "--prefix-file", ("", IS_EMPTY), ("folder", "Is a directory"),
          ("/dev/zero", "not a regular file"), ("fifo", "not a regular file"), (NAME, TOO_LONG)),
    *each(ROWS, "--on-error", ("x", "is not one of 'stop', 'skip'"), ("", "is not one of")),
    *each(("show",), "--tile", ("0", POSITIVE), ("x", POSITIVE)),
    *each(("show",), "--segments", ("", IS_EMPTY), ("1,,2", LENGTHS), ("-1", LENGTHS),
          ("9" * 8, "at most 16,777,216 can be drawn")),
    *each(("show",), "--new-tokens", ("-1", AT_LEAST_0), ("2000000000", "at most 16,777,216 can")),
    *each(("show",), "-s", (",", UNKNOWN), ("causal:x=1", "has no parameter"),
          ("causal:x", "takes NAME:KEY=VALUE")),
    *each(("show",), "-o", ("x.txt", EXTENSION), ("folder", EXTENSION), (f"{NAME}.png", TOO_LONG)),
    *each(("show",), "-i", ("fifo", PIPE), (f"{NAME}.feather", TOO_LONG), ("", IS_EMPTY)),
    *each(("show", "rows.jsonl"), "--row", ("0", POSITIVE), ("2", "--row must be 1 to 1, got 2")),
    *each(("show", "rows.jsonl"), "--prefix", ("3", "is for a request without an input")),
    *each(COMPARE, "--num-segments", ("", IS_EMPTY), ("1,,2", COUNTS), ("1,1", "is given twice"),
          ("9", "9 segments asked for")),
    *each(COMPARE, "-s", ("", IS_EMPTY), (",,", UNKNOWN)),
    *each(COMPARE, "--fusions", ("x", "fusion must be one of"), ("mean,mean", "is given twice")),
    *each(COMPARE, "-o", ("", IS_EMPTY), ("rows.jsonl", "nothing can be written there")),
    *each(("bench",), "--heads", ("", IS_EMPTY), ("1:2:3", HEADS), ("3:2", "must be a multiple"),
          ("1000000000", "GB are free; make them fewer")),
    *each(("bench",), "--head-dim", ("0", POSITIVE), ("2000000000", "GB are free")),
    *each(("bench",), "--segments", ("", IS_EMPTY), ("20000000", "at most 16,777,216")),
    *each(("eval",), "--language", ("x", "Missing argument")),
    *each(("new", "mine"), "--directory", ("", IS_EMPTY), (NAME, TOO_LONG),
          ("rows.jsonl", "already; choose another")),
    *each(("doctor",), "--device", ("cpu", "need a --model")),
    *each(("doctor",), "--model", ("", IS_EMPTY), ("folder", "has no config.json"),
          (f"/{NAME}", "does not exist"), ("rows.jsonl", "is a file")),
    (("new", ""), PLUGIN_NAME),
    (("new", "../x"), PLUGIN_NAME),
    (("new", ESCAPE), PLUGIN_NAME),
    (("new", "class"), PLUGIN_NAME),
    (("new", NAME), TOO_LONG),
    (("new", "os"), "is installed already"),
    (("eval", NAME), TOO_LONG),
    (("eval", "fifo"), PIPE),
    (("eval", "rows.jsonl"), "not a result file"),
    (("check", "no.py"), NO_FILE),
    (("", ), "No such command"),
    ((*ROWS, "--resume", "--overwrite"), "exclude each other"),
    ((*ROWS, "--quiet=1"), "does not take a value"),
    ((*ROWS, "--limit"), "requires an argument"),
]  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to run in, where nothing may be loaded."""

    def load(*arguments: object, **options: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr("flexmask_cli.planned_run.load_engine", load)
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"segments": ["x", "y"]}\n')
    Path("folder").mkdir()
    Path("empty.py").touch()
    Path("broken.py").write_text("def (")
    Path("raises.py").write_text("raise ValueError('x' * 10**6)")
    os.mkfifo("fifo")
    os.mkfifo("fifo.toml")
    return tmp_path


@pytest.mark.parametrize(("arguments", "message"), sampled(CASES))
def test_a_value_that_cannot_be_is_told_in_one_line_before_anything_is_done(
    folder: Path, arguments: tuple[str, ...], message: str
) -> None:
    before = sorted(folder.iterdir())
    error = run_command(*arguments).error
    assert message in error
    assert sorted(path for path in folder.iterdir() if path.name != "outputs") == before
