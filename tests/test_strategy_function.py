"""Strategies made from a function, and from a file."""

from __future__ import annotations

from typing import Any, Literal

import pytest

from flexmask import Strategy, make_strategy, mask_strategy, parameter
from flexmask.errors import FlexMaskWarning, StrategyError
from flexmask.mask_mods import causal
from flexmask.plugins.strategy_file import (
    classes_in_file,
    is_strategy_file,
    recorded_name,
)


@mask_strategy
def sliding(
    batch,
    *,
    window: int = parameter(8, help="Tokens back.", minimum=1),
    edge: Literal["hard", "soft"] = "hard",
):
    """Each token sees a window.

    More of it.
    """
    return batch, window, edge


def test_the_function_becomes_a_strategy_class_with_its_name_and_docstring():
    assert issubclass(sliding, Strategy)
    assert (sliding.name, sliding.__module__) == ("sliding", __name__)
    assert sliding.summary() == "Each token sees a window."
    assert sliding.is_causal
    assert sliding.source().startswith(f"{__file__}:")


def test_keyword_only_arguments_become_its_parameters():
    window, edge = sliding.parameters()
    assert (window.type, window.default, window.help, window.minimum) == (
        "int", 8, "Tokens back.", 1,
    )  # fmt: skip
    assert (edge.type, edge.default, edge.choices) == ("hard|soft", "hard", ("hard", "soft"))
    strategy = sliding.from_parameters({"window": "3"})
    assert strategy == sliding(window=3)
    assert strategy.mask_mod("batch") == ("batch", 3, "hard")  # type: ignore[arg-type,comparison-overlap]


@pytest.mark.parametrize(
    ("minimum", "message"),
    [(1, "be positive"), (0, "not be negative"), (4, "be at least 4")],
)
def test_a_parameter_below_its_minimum_is_refused(minimum, message):
    @mask_strategy
    def bounded(batch, *, size: int = parameter(9, help="", minimum=minimum)):
        return causal

    strategy: Any = bounded(size=minimum)
    assert strategy.size == minimum
    with pytest.raises(StrategyError, match=f"size must {message}, got -3"):
        bounded.from_parameters({"size": "-3"})


def without_batch(*, window: int = 3): ...
def by_position(batch, window: int = 3): ...
def mask_mod_itself(b, h, q_idx, kv_idx): ...
def without_type(batch, *, window=3): ...
def without_default(batch, *, window: int): ...


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (without_batch, "strategy 'without_batch' does not take the batch as its first argument"),
        (by_position, "write its parameters after a star: def by_position(batch, *, window: …)"),
        (mask_mod_itself, "strategy 'mask_mod_itself' is a mask_mod itself; write a function of"),
        (without_type, "parameter 'window' of strategy 'without_type' has no type"),
        (without_default, "parameter 'window' of strategy 'without_default' has no default"),
    ],
)
def test_a_function_that_cannot_be_a_strategy_is_told_why(function, message):
    with pytest.raises(StrategyError) as error:
        mask_strategy(function)
    assert message in str(error.value)


SOURCE = """
from flexmask import mask_strategy
from flexmask.mask_mods import causal

@mask_strategy
def one(batch, *, size: int = 3):
    return causal
"""
SECOND = "\n@mask_strategy\ndef two(batch):\n    return causal\n"


@pytest.fixture
def write(tmp_path):
    """Writes a file of strategies."""

    def write(source):
        path = tmp_path / "masks.py"
        path.write_text(source)
        return str(path)

    return write


def test_only_paths_of_python_files_are_files():
    assert is_strategy_file("masks.py")
    assert is_strategy_file("../my masks/m.py:one")
    assert not is_strategy_file("causal")
    assert not is_strategy_file("masks.py.txt")


def test_a_strategy_is_made_straight_from_its_file(write):
    path = write(SOURCE)
    assert make_strategy(path, {"size": "7"}).parameter_values() == {"size": 7}
    assert make_strategy(f"{path}:one", {}).name == "one"
    assert type(make_strategy(path, {})) is type(make_strategy(path, {}))


def test_a_file_that_has_changed_is_run_again(write):
    path = write(SOURCE)
    before: Any = make_strategy(path, {})
    write(SOURCE.replace("= 3", "= 4"))
    after: Any = make_strategy(path, {})
    assert (before.size, after.size) == (3, 4)


def test_of_several_strategies_in_a_file_one_is_named(write):
    path = write(SOURCE + SECOND)
    assert make_strategy(f"{path}:two", {}).name == "two"
    assert [cls.name for cls in classes_in_file(path)] == ["one", "two"]
    for asked, message in [("", "has several strategies"), (":three", "has no strategy 'three'")]:
        with pytest.raises(StrategyError) as error:
            make_strategy(path + asked, {})
        assert str(error.value) == f"{path} {message}; ask for one as {path}:one or {path}:two"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("1\nx = a\n", "failed: NameError: name 'a' is not defined at masks.py:2: `x = a`"),
        ("def", "failed: SyntaxError: invalid syntax (masks.py, line 1) at masks.py:1: `def`"),
        ("import os", "defines no strategy; decorate a function of the batch with"),
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_told_why_and_where(write, source, message):
    path = write(source)
    with pytest.raises(StrategyError) as error:
        make_strategy(path, {})
    assert str(error.value).startswith(f"{path} {message}")


def test_a_file_that_is_not_there_is_named():
    with pytest.raises(
        StrategyError, match=r"nowhere.py: No such file or directory; a strategy is a name"
    ):
        make_strategy("nowhere.py:one", {})


def test_what_a_file_prints_is_a_warning(write, capsys):
    path = write("print('hello')\n" + SOURCE)
    with pytest.warns(FlexMaskWarning, match="masks.py printed to stdout, .*: 'hello'"):
        make_strategy(path, {})
    assert capsys.readouterr().out == ""


def test_a_run_records_what_the_file_held(write):
    path = write(SOURCE)
    before = recorded_name(f"{path}:one")
    write(SOURCE + SECOND)
    assert recorded_name(f"{path}:one") != before
    assert before.startswith(f"{path}:one (sha256 ")
    assert recorded_name("causal") == "causal"
