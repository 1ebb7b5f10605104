"""Impossible values are told in one line, before anything loads."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from flexmask.errors import OptionError, StrategyError
from flexmask.limits import LARGEST_SIZE, check_size, read_size
from flexmask.plugins.registry import make_strategy
from flexmask.sampling import Sampling

LONG = "9" * 1000


@pytest.mark.parametrize("temperature", [float("nan"), float("inf"), -float("inf"), 1e-9, 1e7])
def test_a_temperature_that_logits_do_not_survive_is_refused(temperature: float) -> None:
    with pytest.raises(OptionError, match="temperature must"):
        Sampling(temperature=temperature)


@pytest.mark.parametrize("temperature", [0.0, 1e-6, 0.7, 1, 1e6])
def test_other_temperatures_are_taken(temperature: float) -> None:
    assert Sampling(temperature=temperature).is_greedy == (temperature == 0)


@pytest.mark.parametrize("top_p", [float("nan"), float("inf"), 0.0])
def test_a_probability_that_is_none_is_refused(top_p: float) -> None:
    with pytest.raises(OptionError, match="top_p must be above 0 and at most 1"):
        Sampling(top_p=top_p)


def test_sizes_fit_into_32_bits() -> None:
    assert check_size("n", LARGEST_SIZE) == LARGEST_SIZE
    with pytest.raises(OptionError, match="n must be at most 2,147,483,647, got 2147483648"):
        check_size("n", LARGEST_SIZE + 1)
    with pytest.raises(OptionError, match="got a number of 33,220 bits"):
        check_size("n", 10**10_000)
    with pytest.raises(OptionError, match="must not be negative, got a number of 33,220 bits"):
        check_size("n", -(10**10_000))


@pytest.mark.parametrize("text", ["", "0", "-1", "1.5", "x", "²", "1e3", "x" * 5000])
def test_a_size_that_is_no_number_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="--n must be a number, got '"):
        read_size("--n", text, "a number")


def test_a_size_of_any_number_of_digits_is_refused_in_one_line() -> None:
    with pytest.raises(OptionError, match="at most 2,147,483,647, got a number of 9,000 digits"):
        read_size("--n", "9" * 9000, "a number")
    assert read_size("--n", " 0012 ", "a number") == 12


def test_zero_is_a_size_where_it_is_allowed() -> None:
    assert read_size("--n", "0", "a number", least=0) == read_size("--n", "00", "a", least=0) == 0
    with pytest.raises(OptionError, match="--n must be a number, 0 or more, got '-1'"):
        read_size("--n", "-1", "a number, 0 or more", least=0)


@pytest.mark.parametrize("value", [LONG, "nan", "inf", "-inf", "1e999"])
def test_a_parameter_that_no_mask_can_compute_with_is_refused(value: str) -> None:
    for name, parameter in (("sliding_window", "window"), ("adaptive_parallel", "temperature")):
        with pytest.raises(StrategyError) as raised:
            make_strategy(name, {parameter: value})
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--temperature", "nan"], "temperature must be 0, or 1e-06 to 1e+06, got nan"),
        (["--temperature", "inf"], "temperature must be 0, or 1e-06 to 1e+06, got inf"),
        (["--max-new-tokens", "0"], "--max-new-tokens must be a positive number, got '0'"),
        (["--max-new-tokens", LONG], "--max-new-tokens must be at most 2,147,483,647, got a numb"),
        (["--stop", ""], "--stop must not be empty; leave it out to generate to the end"),
        (["--stop", "x", "--stop", ""], "--stop must not be empty"),
        (["--stop", os.fsdecode(b"\xff")], "--stop must be UTF-8, got '\\udcff'"),
        (["--model", os.fsdecode(b"m\xff")], "--model must be UTF-8, got 'm\\udcff'"),
        (["--batch-size", LONG], "--batch-size must be at most 2,147,483,647, got a number of 1,"),
        (["--top-k", LONG], "--top-k must be at most 2,147,483,647, got a number of 1,000 digits"),
        (["--output", os.fsdecode(b"o\xff.feather")], "name is not UTF-8; choose another"),
        (["--param", f"positions={LONG}"], "positions must be restart|sequential, got '99"),
    ],
)
def test_generate_says_it_in_one_line_before_a_model_loads(
    monkeypatch: pytest.MonkeyPatch, tmp_path, arguments: list[str], message: str
) -> None:
    from flexmask_cli.app import main

    def load(*arguments: object, **options: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("flexmask_cli.planned_run.load_engine", load)
    monkeypatch.setattr(sys, "argv", ["flexmask", "generate", "--device", "cpu", *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    assert str(end.value.code).startswith("error: ")
    assert message in str(end.value.code)
    assert "\n" not in str(end.value.code)
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


@pytest.mark.parametrize(
    ("command", "arguments"),
    [
        ("compare", ["--num-segments", LONG]),
        ("compare", ["--max-new-tokens", "0"]),
        ("compare", ["--temperature", "nan"]),
        ("warmup", ["--max-new-tokens", "0"]),
        ("warmup", ["--prompt-tokens", LONG]),
        ("show", ["--segments", LONG]),
        ("show", ["--segments", "2000000000"]),
        ("show", ["--prefix", LONG]),
        ("show", ["--tile", LONG]),
        ("bench", ["--heads", LONG]),
        ("bench", ["--segments", f"3,{LONG}"]),
        ("generate", ["--limit", LONG]),
        ("generate", ["--num-segments", LONG]),
        ("generate", ["--task", "webqa", "--paraphrases", f"first {LONG}"]),
    ],
)
def test_no_size_of_any_command_ends_in_a_traceback(
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    tmp_path,
    command: str,
    arguments: list[str],
) -> None:
    from flexmask_cli.app import main

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["flexmask", command, *arguments])
    with pytest.raises(SystemExit) as end:
        main()
    said = capsys.readouterr().err if end.value.code == 2 else str(end.value.code)
    assert end.value.code == 2 or isinstance(end.value.code, str)
    assert "rror" in said
    assert "Traceback" not in said


def test_these_need_no_torch() -> None:
    program = "import sys, flexmask.limits, flexmask.sampling, flexmask.printable\n"
    program += "import flexmask.checkpoint.identity\nassert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", program], check=True)
