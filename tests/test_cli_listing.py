import json
import os
import re
import subprocess
import sys

import pytest

from flexmask.errors import FlexMaskError
from flexmask.plugins.registry import load_registry
from flexmask_cli import app
from flexmask_cli.render.table import print_table
from plugin_site import BUILT_IN

COMMAND = [sys.executable, "-m", "flexmask_cli"]

SUMMARY = "Each segment sees the shared prefix and itself; the tail sees everything."


def environment(**variables):
    """The environment without what changes colours, widths and plugins, plus ``variables``."""
    unwanted = {"COLUMNS", "FORCE_COLOR", "NO_COLOR", "FLEXMASK_LOAD_PLUGINS"}
    inherited = {name: value for name, value in os.environ.items() if name not in unwanted}
    if "PYTHONPATH" in variables and "PYTHONPATH" in inherited:
        variables["PYTHONPATH"] = os.pathsep.join(
            [str(variables["PYTHONPATH"]), inherited["PYTHONPATH"]]
        )
    return inherited | {name: str(value) for name, value in variables.items()}


def run(*arguments, **variables):
    return subprocess.run(
        [*COMMAND, *arguments], env=environment(**variables), capture_output=True, text=True
    )


@pytest.fixture
def install(tmp_path):
    """Makes a distribution with one plugin module; its folder is to go on ``PYTHONPATH``."""

    def install(source):
        (tmp_path / "flexmask_mine.py").write_text(source)
        info = tmp_path / "flexmask_mine-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            "Metadata-Version: 2.1\nName: flexmask-mine\nVersion: 1.0\n"
        )
        (info / "entry_points.txt").write_text("[flexmask]\nmine = flexmask_mine\n")
        return tmp_path

    return install


def test_strategies_are_listed_as_json():
    result = run("strategies", "--json", FLEXMASK_LOAD_PLUGINS="")
    listed = {strategy["name"]: strategy for strategy in json.loads(result.stdout)}
    assert list(listed) == BUILT_IN
    assert listed["causal"]["parameters"] == []
    prefix_segment = listed["prefix_segment"]
    (positions,) = prefix_segment.pop("parameters")
    assert positions.pop("help")
    assert positions == {
        "name": "positions",
        "type": "restart|sequential",
        "default": "restart",
        "choices": ["restart", "sequential"],
        "minimum": None,
    }
    assert prefix_segment.pop("version")
    assert prefix_segment == {
        "name": "prefix_segment",
        "summary": SUMMARY,
        "distribution": "flexmask",
        "entry_point": "prefix_segment",
    }


def test_plugins_are_listed_as_json():
    result = run("plugins", "--json", FLEXMASK_LOAD_PLUGINS="")
    listed = json.loads(result.stdout)
    (causal,) = [plugin for plugin in listed if plugin["entry_point"] == "causal"]
    assert causal.pop("version")
    assert causal == {
        "distribution": "flexmask",
        "entry_point": "causal",
        "value": "flexmask_strategies.causal",
        "strategies": ["causal"],
        "error": None,
        "place": None,
        "notes": [],
    }


def test_a_piped_table_is_plain_and_has_one_whole_line_for_each_strategy():
    result = run("strategies", FLEXMASK_LOAD_PLUGINS="", COLUMNS=20, FORCE_COLOR=1)
    header, *lines = result.stdout.splitlines()
    assert header.split() == ["strategy", "from", "parameters", "rule"]
    assert [line.split()[0] for line in lines] == BUILT_IN
    (line,) = [line for line in lines if line.startswith("prefix_segment ")]
    assert re.search(r"flexmask 0.1.0  positions: restart\|sequential = restart +" + SUMMARY, line)
    assert "\x1b" not in result.stdout


@pytest.fixture
def printed(monkeypatch, capsys):
    """Prints a table to a terminal so many columns wide; gives its lines."""

    def get(columns, rows, wrapped=("text",), term="xterm"):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: columns is not None)
        monkeypatch.setenv("COLUMNS", str(columns))
        monkeypatch.setenv("TERM", term)
        print_table(rows, wrapped)
        return re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out).splitlines()

    return get


ROWS = [{"a name": "one_word", "text": "words and `[brackets]`"}]


@pytest.mark.parametrize("term", ["xterm", "dumb"])
def test_a_table_on_a_narrow_terminal_is_folded_and_loses_nothing(printed, term):
    lines = printed(22, ROWS, term=term)
    assert [line.rstrip() for line in lines] == [
        "a name    text",
        "one_word  words and",
        "          `[brackets]`",
    ]
    long = [{"a name": "one_word", "text": "word " * 100}]
    lines = printed(200, long, term=term)
    assert max(map(len, lines)) > 100
    assert " ".join(lines).split().count("word") == 100


def test_where_columns_do_not_fit_a_row_is_a_block_of_lines(printed):
    assert printed(12, [*ROWS, *ROWS]) == [
        "a name  one_word",
        "text    words and `[brackets]`",
        "",
        "a name  one_word",
        "text    words and `[brackets]`",
    ]


def test_headings_are_broken_before_cells_are(printed):
    lines = printed(16, [{"first token ms": "1.5", "tokens/s": "20"}], wrapped=())
    assert [line.split() for line in lines] == [
        ["first"], ["token"], ["ms", "tokens/s"], ["1.5", "20"]
    ]  # fmt: skip


def test_a_pipe_gets_whole_cells_of_any_length_and_script(printed):
    rows = [{"text": "東京 " * 400 + "end", "n": "1"}, {"text": "short", "n": "2"}]
    head, first, second = printed(None, rows)
    assert first == "東京 " * 400 + "end  1"
    assert head.index("n") == second.index("2") == 400 * 5 + 3 + 2
    assert not head.endswith(" ")


def test_a_parameter_that_is_true_or_false_is_shown_as_it_is_given(install):
    folder = install(
        "from dataclasses import dataclass\n"
        "from flexmask import Strategy, hookimpl, parameter\n"
        "@dataclass(frozen=True)\n"
        "class Mine(Strategy):\n"
        "    name = 'mine'\n"
        "    flag: bool = parameter(False, help='')\n"
        "    size: int = parameter(3, help='')\n"
        "    def mask_mod(self, batch): ...\n"
        "@hookimpl\n"
        "def register_strategies(): return [Mine]\n"
    )
    result = run("strategies", PYTHONPATH=folder)
    assert "flexmask-mine 1.0  flag: bool = false, size: int = 3" in result.stdout


def test_a_broken_plugin_is_one_line_on_stderr_and_leaves_stdout_to_the_listing(install):
    folder = install("raise RuntimeError('one\\ntwo')")
    result = run("strategies", "--json", PYTHONPATH=folder)
    assert result.returncode == 0
    assert result.stderr == (
        "warning: plugin 'flexmask-mine 1.0 (mine)' failed: RuntimeError: one two "
        "at flexmask_mine.py:1: `raise RuntimeError('one\\ntwo')`\n"
    )
    assert json.loads(result.stdout)


def test_plugins_shows_ok_or_the_error_and_names_a_failure_once(install):
    result = run("plugins", PYTHONPATH=install("import nowhere_to_be_found"))
    assert result.stderr == ""
    _, *lines = result.stdout.splitlines()
    status = {line.split()[2]: line.split(maxsplit=3)[3].strip() for line in lines}
    assert status["causal"] == "ok"
    assert status["mine"] == (
        "ModuleNotFoundError: No module named 'nowhere_to_be_found' "
        "at flexmask_mine.py:1: `import nowhere_to_be_found`"
    )


def test_an_error_for_the_user_is_one_line_and_exit_status_1():
    result = run("strategies", FLEXMASK_LOAD_PLUGINS="nope")
    assert result.returncode == 1
    assert result.stdout == ""
    assert result.stderr.startswith("error: FLEXMASK_LOAD_PLUGINS names 'nope', which is no")
    assert result.stderr.count("\n") == 1


@pytest.fixture
def failing_command(monkeypatch):
    """Makes ``flexmask strategies`` raise inside this process."""

    def fail_with(error):
        def fail():
            raise error

        monkeypatch.setattr("flexmask_cli.commands.strategies.load_plugins", fail)
        monkeypatch.setattr(sys, "argv", ["flexmask", "strategies"])
        monkeypatch.setattr(sys, "excepthook", sys.excepthook)  # typer sets its own

    return fail_with


def test_an_error_of_several_lines_is_joined_into_one(failing_command):
    failing_command(FlexMaskError("one\ntwo"))
    with pytest.raises(SystemExit) as exit:
        app.main()
    assert exit.value.code == "error: one two"


def test_any_other_error_keeps_its_traceback(failing_command):
    failing_command(RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match="a bug"):
        app.main()


def test_ctrl_c_exits_quietly_with_status_130(install):
    result = run("strategies", PYTHONPATH=install("raise KeyboardInterrupt"))
    assert result.returncode == 130
    assert result.stdout == result.stderr == ""


@pytest.mark.parametrize(
    "arguments", [["strategies"], ["strategies", "--json"], ["plugins"], ["--help"]], ids=" ".join
)
def test_a_closed_pipe_is_quiet(arguments):
    reader, writer = os.pipe()
    os.close(reader)
    result = subprocess.run(
        [*COMMAND, *arguments], env=environment(), stdout=writer, stderr=subprocess.PIPE
    )
    os.close(writer)
    assert result.stderr == b""


def test_the_version_is_that_of_the_package():
    assert run("--version").stdout == "flexmask 0.1.0\n"


def test_an_unknown_command_is_a_usage_error():
    result = run("nope")
    assert result.returncode == 2
    assert "No such command 'nope'" in result.stderr


@pytest.mark.parametrize(
    "arguments", [["--help"], ["strategies", "--json"], ["plugins"]], ids=" ".join
)
def test_heavy_libraries_stay_out_of(arguments):
    program = (
        "import sys\n"
        "from flexmask_cli.app import main\n"
        "try:\n"
        "    main()\n"
        "finally:\n"
        "    print({'torch', 'transformers', 'pyarrow'} & sys.modules.keys(), file=sys.stderr)\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program, *arguments],
        env=environment(FLEXMASK_LOAD_PLUGINS=""),
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0
    assert result.stderr == "set()\n"


def test_building_the_app_loads_no_plugin():
    load_registry.cache_clear()
    app.build_app()
    assert load_registry.cache_info().currsize == 0
