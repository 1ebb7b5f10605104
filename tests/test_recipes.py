"""The recipes of docs/recipes.md run."""

from __future__ import annotations

import re
import runpy
import shlex
from pathlib import Path
from typing import Any

import pytest

from command import run_command
from flexmask.engine import Engine
from flexmask_cli import planned_run
from quick_cli import QuickEngine

PAGE = (Path(__file__).parents[1] / "docs" / "recipes.md").read_text()
FILES = {
    name: text for name, text in re.findall(r'```\w+ title="(.*?)"\n(.*?)```', PAGE, re.DOTALL)
}
COMMANDS = [
    (shlex.split(command), shown)
    for block in re.findall(r"```console\n(.*?)```", PAGE, re.DOTALL)
    for command, shown in re.findall(r"\$ flexmask (.*)\n((?:[^$].*\n|\n)*)", block)
]

PROGRAMS = dict(re.findall(r"```console\n\$ python (\S+)\n(.*?)```", PAGE, re.DOTALL))
"""The output of each program of the page."""


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of the page in the working folder, and a model file that is not read."""
    monkeypatch.chdir(tmp_path)
    for name, text in FILES.items():
        Path(name).write_text(text)
    Path("smollm2.gguf").touch()


def load(engine: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let commands and programs use this engine."""
    monkeypatch.setattr(planned_run, "load_engine", lambda *_: engine)
    monkeypatch.setattr(Engine, "from_pretrained", lambda *_, **__: engine)


def test_the_files_and_commands_of_each_recipe_fit_together(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    load(QuickEngine(), monkeypatch)
    for command, _ in COMMANDS:
        outcome = run_command(*command)
        assert outcome.status == 0, outcome.err
        if command[0] == "generate":  # every answer is the accepted one
            assert "accuracy: 100.0%" in outcome.out
    assert len(COMMANDS) == 6


def test_the_programs_of_the_recipes_run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    load(QuickEngine(), monkeypatch)
    for name, shown in PROGRAMS.items():
        runpy.run_path(name)
        printed = capsys.readouterr().out
        assert len(printed.splitlines()) == len(shown.splitlines())
        assert "What do bees make? none\n   Fact: none\n     Fact: none\n" in printed
    assert [*PROGRAMS] == ["candidates.py"]


@pytest.mark.real
@pytest.mark.long
def test_what_the_page_shows_comes_out_of_the_real_model(
    real_engine: Engine,
    smollm2: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    Path("smollm2.gguf").unlink()
    Path("smollm2.gguf").symlink_to(smollm2)
    load(real_engine, monkeypatch)
    for command, shown in COMMANDS:
        printed = run_command(*command).out.splitlines()
        assert {line.rstrip() for line in shown.splitlines()} <= {
            line.rstrip() for line in printed
        }
    for name, shown in PROGRAMS.items():
        capsys.readouterr()
        runpy.run_path(name)
        assert capsys.readouterr().out == shown
