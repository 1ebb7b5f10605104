"""Options in messages: named as in Python by the core, and as its own by the command line."""

import ast
import re
from pathlib import Path

import pytest

import flexmask
from flexmask_cli.app import build_app
from flexmask_cli.option_names import OptionNames

NAMES = OptionNames()
NAMES.app = build_app()

OTHER_PROGRAMS = r"`flexmask \w+ [^`]*`|^--version$"
"""Whole commands that a message advises, and what a compiler is asked for."""

PYTHON = {"and", "flexmask", "if", "in", "index", "not", "or", "q_idx", "x"}
"""What messages about masks quote."""


@pytest.mark.parametrize(
    ("message", "shown"),
    [
        ("pass `resume`, or another `output`", "pass --resume, or another --output"),
        ("lower `num_segments`", "lower --num-segments"),
        ("pass `num_examples=3`", "pass --num-examples 3"),
        ("`allow_special_tokens=True` makes it one", "--allow-special-tokens makes it one"),
        ("`column=suffix=COLUMN` says where", "--column suffix=COLUMN says where"),
        ("`hidden_size` is no multiple of 8", "`hidden_size` is no multiple of 8"),
        ("use `~` or `q_idx >= 0`", "use `~` or `q_idx >= 0`"),
        ("it fails at mine.py:12: `seed`", "it fails at mine.py:12: `seed`"),
    ],
)  # fmt: skip
def test_a_name_in_backticks_becomes_the_option_of_that_name(message, shown):
    assert NAMES.shown(message) == shown
    assert OptionNames().shown(message) == message  # where no command line runs


def texts_of(module):
    """The texts in a module that are no docstrings."""
    tree = ast.parse(module.read_text(encoding="utf-8"))
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    for node in ast.walk(tree):
        if id(node) in docstrings:
            continue
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def test_the_core_names_no_option_of_the_command_line():
    NAMES.shown("`output`")
    assert NAMES._flags is not None
    flags = "|".join(sorted(NAMES._flags.values(), key=len, reverse=True))
    found = [
        f"{module.name}: {text}"
        for module in sorted(Path(flexmask.__file__).parent.rglob("*.py"))
        for text in texts_of(module)
        if re.search(rf"(?<![\w-])({flags})(?![\w-])", re.sub(OTHER_PROGRAMS, "", text))
    ]
    assert found == []


def test_every_option_that_the_core_names_is_one_of_the_command_line():
    NAMES.shown("`output`")
    modules = Path(flexmask.__file__).parent.rglob("*.py")
    named = {
        name
        for module in modules
        for text in texts_of(module)
        for name in re.findall(r"`(\w+)(?:=[^`]*)?`?", text)
    }
    assert {"allow_special_tokens", "num_examples", "resume"} <= named
    assert NAMES._flags is not None
    assert named - PYTHON <= NAMES._flags.keys()
