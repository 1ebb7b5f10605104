"""``flexmask show`` of a result whose strategy came straight from a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from flexmask.errors import StrategyError
from flexmask.generation import Generation
from flexmask.plugins.strategy_file import recorded_location, recorded_name, reference_of_record
from flexmask.request import Request
from flexmask.results.result_writer import ResultWriter
from flexmask.results.run_config import RunConfig
from flexmask_cli.app import main

SOURCE = """
from flexmask import mask_strategy, parameter
from flexmask.mask_mods import and_masks, causal, within_window

@mask_strategy
def near(batch, *, window: int = parameter(2, help="Tokens back.", minimum=1)):
    "Sees what is near."
    return and_masks(causal, within_window(batch, window))
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a run under ``near``, with its result."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    Path("masks.py").write_text(SOURCE)
    request = Request(("Q: one?", "Q: first?"), suffix="\nA:", uuid="a")
    config = RunConfig(
        run={
            "strategy": recorded_name("masks.py:near"),
            "parameters": {"window": 3},
            "model": "demo",
            "chat_template": False,
        },
        environment={"strategy_file": recorded_location("masks.py:near")},
    )
    with ResultWriter.open("out.feather", config=config, requests=[request]) as writer:
        writer.write([Generation(request, " in London", (7, 8), "eos", 9)])
    return folder


@pytest.fixture
def show(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., str]:
    def run(*arguments: str) -> str:
        monkeypatch.setattr("sys.argv", ["flexmask", "show", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        return str(end.value.code) if end.value.code else capsys.readouterr().out

    return run


def test_a_result_is_shown_under_the_strategy_of_its_file(
    folder: Path, show: Callable[..., str]
) -> None:
    assert "near (window=3)" in show("out.feather")


def test_the_file_is_found_from_another_folder(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, show: Callable[..., str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert "near (window=3)" in show("work/out.feather")


def test_a_file_that_was_renamed_is_found_by_what_it_holds(
    folder: Path, show: Callable[..., str]
) -> None:
    Path("masks.py").rename("old_masks.py")
    Path("masks.py").write_text("raise ValueError('another file')")
    assert "near (window=3)" in show("out.feather")


def test_a_file_that_has_changed_is_not_run(folder: Path, show: Callable[..., str]) -> None:
    Path("masks.py").write_text("raise ValueError('changed')")
    assert show("out.feather").startswith(
        "error: the run's strategy is of the file masks.py, which has changed since (sha256 "
    )
    Path("masks.py").unlink()
    message = show("out.feather")
    assert "masks.py, which is not there (sha256 " in message
    assert message.endswith("name it with --strategy, or restore it")


def test_a_strategy_that_is_named_needs_no_file(folder: Path, show: Callable[..., str]) -> None:
    Path("masks.py").unlink()
    assert "causal" in show("out.feather", "--strategy", "causal")


@pytest.mark.parametrize("recorded", ["causal", "causal (sha256 0123456789ab)", "my.py (x)"])
def test_a_record_that_is_of_no_file_is_a_name(recorded: str) -> None:
    assert reference_of_record(recorded) == recorded


def test_a_record_without_location_is_looked_up_by_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    recorded = "deep/masks.py:near (sha256 0123456789ab)"
    with pytest.raises(StrategyError, match=r"deep/masks.py, which is not there"):
        reference_of_record(recorded)
