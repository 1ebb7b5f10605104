"""What the documents say is true."""

import importlib.util
import json
import re
import shlex
import sys
from itertools import islice
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pytest
from matplotlib import pyplot

import flexmask
from flexmask.check import RULES, run_rules
from flexmask.fusion import FUSIONS
from flexmask.plugins.registry import load_registry, make_strategy
from flexmask.plugins.strategy_file import classes_in_file
from flexmask_cli.app import COMMANDS, build_app, main
from svg_cells import expected_colours, svg_cells

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()
BUILT_IN = [
    registered.cls.name
    for registered in load_registry().strategies()
    if registered.owner.distribution == "flexmask"
]


def test_the_python_of_the_readme_runs_and_answers(capsys):
    for code in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
        exec(code, globals())
    answers = capsys.readouterr().out.split()
    assert answers == ["Fumholm", "Fumholm"]


def test_the_readme_lists_every_strategy_and_command():
    for name in BUILT_IN:
        assert f"| `{name}` |" in README
    for command in build_app().registered_commands:
        assert command.callback is not None
        assert f"flexmask {command.name or command.callback.__name__}" in README


def test_the_tree_of_the_page_on_architecture_is_current():
    tree = program("architecture_tree")
    text = tree.TARGET.read_text()
    assert text == tree.page(text), "run: make docs"


def test_every_module_says_in_its_first_line_what_it_holds():
    tree = program("architecture_tree")
    for package in tree.PACKAGES:
        for path in (ROOT / package).rglob("*.py"):
            assert tree.summary(path), path


def test_the_readme_is_no_longer_than_200_lines():
    assert len(README.splitlines()) <= 200


def test_every_public_name_exists():
    assert all(hasattr(flexmask, name) for name in flexmask.__all__)


def test_the_commands_of_the_page_on_data_sets_do_what_it_says(tmp_path, monkeypatch, capsys):
    pytest.importorskip("simplemma")
    page = (ROOT / "docs" / "datasets.md").read_text()
    monkeypatch.chdir(tmp_path)
    for name, kind in (("questions.csv", "csv"), ("trivia.toml", "toml")):
        content, *_ = re.findall(rf"```{kind}\n(.*?)```", page, flags=re.DOTALL)
        Path(name).write_text(content)
    commands = 0
    for block in re.findall(r"```console\n(.*?)```", page, flags=re.DOTALL):
        for command, shown in re.findall(r"\$ flexmask (.*)\n((?:[^$].*\n|\n)*)", block):
            monkeypatch.setattr(sys, "argv", ["flexmask", *shlex.split(command)])
            with pytest.raises(SystemExit) as exit_:
                main()
            assert exit_.value.code == 0, command
            assert shown in capsys.readouterr().out
            commands += 1
    assert commands == 11
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        *("answers.parquet", "concatenated.jsonl", "concatenated.run.json"),
        *("questions.csv", "trivia.toml"),
    ]


def test_the_page_on_fusion_explains_each_and_its_python_runs(capsys):
    page = (ROOT / "docs" / "fusion.md").read_text()
    for name in FUSIONS:
        assert f"| `{name}` | " in page
    (code,) = re.findall(r"```python\n(.*?)```", page, flags=re.DOTALL)
    exec(code, {})
    assert capsys.readouterr().out.split() == ["Fumholm", "Fumholm"]


GUIDE = (ROOT / "docs" / "writing-a-strategy.md").read_text()


@pytest.fixture
def guide_file(tmp_path, monkeypatch):
    """The code of the guide as ``masks.py`` in the working folder."""
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", GUIDE, flags=re.DOTALL)
    Path("masks.py").write_text("\n\n".join(blocks))
    return "masks.py"


def test_the_guide_to_strategies_has_at_most_150_lines():
    assert len(GUIDE.splitlines()) <= 150


def test_each_strategy_of_the_guide_keeps_the_rules_that_need_no_compiler(guide_file):
    classes = classes_in_file(guide_file)
    assert [cls.name for cls in classes] == ["sliding", "recent", "thread", "branches"]
    before_compiling = [rule.name for rule in RULES].index("attention")
    for cls in classes:
        outcomes = islice(run_rules(cls()), before_compiling)
        assert [item.finding for item in outcomes] == [None] * before_compiling


def test_the_commands_of_the_guide_run(guide_file, monkeypatch, capsys):
    lines = [
        line
        for block in re.findall(r"```sh\n(.*?)```", GUIDE, flags=re.DOTALL)
        for line in block.splitlines()
        if line.startswith("flexmask ") and "check my_strategy" not in line
    ]
    assert len(lines) == 4
    for line in lines:
        monkeypatch.setattr("sys.argv", shlex.split(line))
        with pytest.raises(SystemExit) as end:
            main()
        assert end.value.code == 0, capsys.readouterr()
    assert re.search("8 rows in outputs/demo/demo/sliding.*feather", capsys.readouterr().out)
    assert Path("my-strategy/my_strategy.py").exists()


def test_the_figures_of_fast_masks_are_those_of_the_benchmark():
    on_cpu, on_gpu = (ROOT / "docs" / "fast-masks.md").read_text().split("## On a GPU")
    for name, figures, result in mask_speeds(on_gpu, "h100"):
        times = (result["attention_ms"], result["build_ms"], result["recompiled_s"])
        assert figures == [f"{times[0]:.2f}", *(f"{time:.1f}" for time in times[1:])], name
    for name, figures, result in mask_speeds(on_cpu, "cpu"):
        shares = [result[key] for key in ("density", "tiles_computed", "tiles_partial")]
        tiles = [*(f"{share:.0%}" for share in shares), f"{result['attention_ms']:.0f}"]
        compiled = [f"{result['attention_ms']:.0f}", f"{result['recompiled_s']:.1f}"]
        assert figures in (tiles, [*tiles, f"{result['build_ms']:.1f}"], compiled), name


def mask_speeds(page, machine):
    """Rows of a page's tables, each with what the benchmark found of its mask there."""
    record = ROOT / "benchmarks" / "results" / f"mask-speed-{machine}.json"
    by_mask = {result["mask"]: result for result in json.loads(record.read_text())["masks"]}
    rows = [row.split(" | ") for row in re.findall(r"^\| (.+) \|$", page, re.MULTILINE)]
    found = [(name, figures, by_mask[name]) for name, *figures in rows if name in by_mask]
    assert {name for name, *_ in found} == set(by_mask)
    return found


def test_the_page_of_strategies_has_each_with_its_parameters_and_a_command_to_try_it():
    page = (ROOT / "docs" / "strategies.md").read_text()
    heads = re.findall(r"^### `(.*)`$", page, flags=re.MULTILINE)
    bodies = re.split(r"^### .*$", page, flags=re.MULTILINE)
    assert sorted(heads) == sorted(BUILT_IN)
    for name, body in zip(heads, bodies[1:], strict=True):
        (command,) = re.findall(r"^    flexmask generate (.*)$", body, re.MULTILINE)
        flag, named, *options, limit, rows = shlex.split(command)
        assert (flag, named, limit, rows) == ("-s", name, "--limit", "8")
        values = dict(option.split("=", 1) for option in options[1::2])
        strategy = make_strategy(name, values)
        for parameter in strategy.parameters():
            assert re.search(rf"`{parameter.name}\b", body), (name, parameter.name)


def program(name):
    """A program of docs/ as a module."""
    spec = importlib.util.spec_from_file_location(name, ROOT / "docs" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_page_of_the_plugin_api_is_current():
    plugin_api = program("plugin_api")
    assert plugin_api.TARGET.read_text() == plugin_api.page(), "run: make docs"


def test_the_page_of_the_command_line_is_current():
    reference = program("cli_reference")
    page = reference.TARGET.read_text()
    assert page == reference.page(), "run: make docs"
    for name in COMMANDS:
        assert f"\n## flexmask {name}\n" in page


def test_the_file_of_options_on_the_page_of_the_command_line_works(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "cli.md").read_text()
    (config,) = re.findall(r"```toml\n(.*?)```", page, flags=re.DOTALL)
    (command,) = re.findall(r"\$ flexmask (.*--config .*)", page)
    monkeypatch.chdir(tmp_path)
    Path("run.toml").write_text(config)
    monkeypatch.setattr(sys, "argv", ["flexmask", *shlex.split(command)])
    with pytest.raises(SystemExit) as end:
        main()
    printed = capsys.readouterr().out
    assert end.value.code == 0
    assert "<segment 3>" in printed
    assert "<segment 4>" not in printed


def test_the_tables_of_the_page_on_performance_are_those_of_the_results():
    tables = program("performance_tables")
    for target, of_target in tables.targets().items():
        assert target.read_text() == tables.page(target, of_target), "run: make docs"


def test_the_tables_of_strategies_and_fusions_are_those_of_the_results():
    tables = program("compare_table")
    for target in tables.TARGETS:
        text = target.read_text()
        assert "<!-- compare-real -->\n| " in text
        assert tables.page(target) == text, "run: make docs"


@pytest.mark.parametrize("name", BUILT_IN)
def test_the_picture_of_each_strategy_is_current(name):
    path = ROOT / "docs" / "strategies" / f"{name}.svg"
    assert f'<img src="strategies/{name}.svg"' in (ROOT / "docs" / "strategies.md").read_text()
    pictures = program("strategy_pictures")
    strategy, shown = pictures.pictured(name), pictures.SHOWN
    size = len(strategy.layout(shown.tokens)) + shown.new_tokens
    drawn = svg_cells(path, size)
    assert np.array_equal(drawn, expected_colours(strategy, shown, tile=128)), "run make docs"


def test_the_python_of_the_page_on_pictures_runs():
    matplotlib.use("agg")
    text = (ROOT / "docs" / "show.md").read_text()
    (code,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    names: dict[str, Any] = {}
    exec(code, names)
    assert names["strategy"].name == "prefix_segment"
    pyplot.close("all")
