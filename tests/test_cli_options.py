"""How options are declared: once, in groups that several commands take."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import pytest
import typer

from flexmask.errors import OptionError
from flexmask_cli.app import COMMANDS, build_app, main
from flexmask_cli.dataset_options import InputOptions, RequestOptions
from flexmask_cli.option_groups import changed_options, takes_options
from flexmask_cli.option_kinds import Pair, pairs, size
from flexmask_cli.options import DeviceOptions


@dataclass(frozen=True)
class Numbers:
    heading: ClassVar[str] = "Numbers"

    count: Annotated[int, size("--count", "-c", help="How many.")] = 3
    least: Annotated[int | None, size("--least", least=0, help="At least.")] = None


@dataclass(frozen=True)
class Nested:
    numbers: Numbers
    values: Annotated[list[Pair], pairs("--value", metavar="K=V", help="Values.")] = (
        dataclasses.field(default_factory=list)
    )


@pytest.fixture
def called(monkeypatch, capsys):
    """Runs a command of the groups above; gives the object that it got, or the error."""

    def call(*arguments, default=None):
        got = []

        def command(*, nested):
            got.append(nested)

        command.__annotations__ = {"nested": Nested, "return": None}
        if default is not None:
            command.__kwdefaults__ = {"nested": default}
        app = typer.Typer(rich_markup_mode=None, pretty_exceptions_enable=False)
        app.command()(takes_options(command))
        try:
            app(list(arguments), standalone_mode=False)
        except OptionError as error:
            return str(error)
        return got[0]

    return call


def test_a_command_gets_one_object_for_each_group_with_parsed_values(called):
    assert called() == Nested(Numbers(3, None), [])
    given = called("-c", "5", "--least", "0", "--value", "a=b=c", "--value", "d=")
    assert given == Nested(Numbers(5, 0), [Pair("a", "b=c"), Pair("d", "")])


def test_a_command_may_give_a_group_other_defaults(called):
    default = Nested(Numbers(7, 2), [Pair("x", "y")])
    assert called(default=default).numbers == Numbers(7, 2)
    assert called("--count", "1", default=default).numbers == Numbers(1, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--count", "0"], "--count must be a positive number, got '0'"),
        (["--least", "-1"], "--least must be a number, 0 or more, got '-1'"),
        (["--value", "a"], "--value takes K=V, got 'a'"),
        (["--value", "a=1", "--value", "a=2"], "--value a is given twice"),
    ],
)
def test_a_wrong_value_is_named_with_its_option(called, arguments, message):
    assert called(*arguments) == message


def test_two_options_of_one_name_are_refused():
    def command(*, first: Numbers, second: Numbers) -> None: ...

    command.__annotations__ = {"first": Numbers, "second": Numbers}
    with pytest.raises(TypeError, match="two options are called 'count'"):
        takes_options(command)


def test_options_that_were_changed_are_named_as_the_user_gives_them():
    assert changed_options(InputOptions()) == []
    options = RequestOptions(task="webqa", column=[Pair("a", "b")], num_segments=2)
    assert changed_options(options) == ["--task", "--column", "--num-segments"]
    assert changed_options(DeviceOptions(dtype="float32")) == ["--dtype"]


def test_show_and_bench_take_what_says_which_prompts_generate_runs():
    wanted = {
        *(field.name for field in dataclasses.fields(RequestOptions)),
        *("model", "trust_remote_code", "chat_template", "allow_special_tokens"),
    }
    app: Any = typer.main.get_command(build_app())
    for name in ("generate", "show", "bench"):
        assert wanted <= {parameter.name for parameter in app.commands[name].params}, name


def test_no_command_has_more_than_ten_parameters():
    commands: list[Any] = [*COMMANDS.values()]
    for command in commands:
        assert len(command.__wrapped__.__kwdefaults__ or ()) <= 10
        assert command.__wrapped__.__code__.co_kwonlyargcount <= 10
        assert command.__wrapped__.__code__.co_argcount == 0


def test_help_shows_whole_sentences_and_the_heading_of_each_group(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "80")
    for arguments in (["-h"], ["generate", "--help"]):
        monkeypatch.setattr(sys, "argv", ["flexmask", *arguments])
        with pytest.raises(SystemExit):
            main()
    printed = capsys.readouterr().out
    assert "..." not in printed.replace("[ARGS]...", "")
    for command in COMMANDS.values():
        assert command.__doc__ is not None
        sentence = command.__doc__.partition("\n")[0]
        assert " ".join(sentence.split()) in " ".join(printed.split())
    headings = [line for line in printed.splitlines() if line.endswith(":") and line[0] != " "]
    assert headings == [
        *("Options:", "Commands:"),
        *("Strategy:", "Input:", "Output:", "Model:"),
        *("Generation:", "Judging:", "Device:", "Scaling:", "Options:"),
    ]


def test_the_version_has_a_short_option():
    command = [sys.executable, "-m", "flexmask_cli", "-V"]
    result = subprocess.run(command, capture_output=True, text=True, check=True)
    assert result.stdout.startswith("flexmask ")
