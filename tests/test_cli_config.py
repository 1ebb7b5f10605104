"""``--config``: options from a file."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from flexmask_cli.app import main


@pytest.fixture
def flexmask(monkeypatch, capsys, tmp_path):
    """Runs a command with a file of options; gives what it prints, or its error."""
    monkeypatch.chdir(tmp_path)

    def get(config, *arguments):
        Path("run.toml").write_text(config)
        command = [*arguments[:1], "--config", "run.toml", *arguments[1:]]
        monkeypatch.setattr(sys, "argv", ["flexmask", *command])
        with pytest.raises(SystemExit) as end:
            main()
        streams = capsys.readouterr()
        return str(end.value.code) if end.value.code else streams.out

    return get


ROWS = '{"segments": ["Q: one?", "Q: two?"], "s": " A:"}\n{"segments": ["Q: three?"]}\n'


def test_a_file_holds_options_of_every_kind(flexmask):
    Path("rows.jsonl").write_text(ROWS)
    config = (
        'input = "rows.jsonl"\nlimit = 1\ncolumn = ["suffix=s"]\nfusion = "each"\n'
        'dry-run = true\non_error = "skip"\ntemperature = 0.5\nstop = ["x", "y"]\nbatch-size = 4\n'
    )
    printed = flexmask(config, "generate")
    assert printed.count("<suffix> A:</suffix>") == 2
    assert "three" not in printed


def test_the_command_line_wins_over_the_file(flexmask):
    Path("rows.jsonl").write_text(ROWS)
    config = 'input = "nowhere.jsonl"\nlimit = 1\nnum-segments = 2\ndry-run = true\n'
    printed = flexmask(config, "generate", "-i", "rows.jsonl", "-n", "2", "--num-segments", "1")
    assert "three" in printed
    assert "two" not in printed


def test_every_command_takes_a_file(flexmask):
    assert flexmask("json = true", "tasks").startswith("[")
    assert "allowed_pairs" in flexmask('json = true\nstrategy = ["causal"]\nprefix = 0', "show")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (
            "max-new-token = 3",
            "run.toml: 'max-new-token' is not an option of this command; did you mean "
            "'max-new-tokens'?",
        ),
        ("weather = 1", "run.toml: 'weather' is not an option of this command"),
        ('config = "other.toml"', "run.toml: 'config' is not an option of this command"),
        ("[strategy]\nname = 1", "run.toml: strategy must be a text or a number, got {'name': 1}"),
        ("quiet = 1", "run.toml: quiet must be true or false, got 1"),
        ("limit = true", "run.toml: limit must be a text or a number, got True"),
        ('stop = "x"', "run.toml: stop must be a list of texts, got 'x'"),
        ("limit = 2.5", "--limit must be a positive number, got '2.5'"),
        ("limit = 0", "--limit must be a positive number, got '0'"),
        ('device = "gpu"', "device must be auto, cpu, cuda or cuda:N, got 'gpu'"),
        ('output = ""', "--output is empty; name something or leave it out"),
        ("limit = ", "--config run.toml: not TOML (Invalid value"),
    ],
)
def test_what_cannot_be_used_is_named_with_file_and_key(flexmask, config, message):
    assert flexmask(config, "generate").startswith(f"error: {message}")


def test_a_file_that_is_not_there_is_one_line(flexmask, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["flexmask", "tasks", "--config", "nowhere.toml"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == "error: --config nowhere.toml: No such file or directory"
