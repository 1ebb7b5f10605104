"""Plugins that are broken in odd ways: each is named in a line, and the others work."""

from __future__ import annotations

import json

import pytest

from command import run_command
from flexmask.plugins.registry import load_registry
from flexmask.printable import LINES, printable
from flexmask_cli.__main__ import run
from plugin_site import BUILT_IN, Site, plugin
from sampling_of_cases import sampled

HEAD = """
from dataclasses import dataclass
from flexmask import Strategy, hookimpl, mask_strategy, parameter
from flexmask.mask_mods import causal
"""
HOOK = "\n@hookimpl\ndef register_strategies(): return [Mine]\n"
NAME = "    name = 'mine'\n"
MASK = "    def mask_mod(self, batch): return causal\n"
BAD_NAME = "Mine.name must be lower-case letters, digits and underscores, at most 80, got "
NO_LIST = "register_strategies must return a list of strategy classes, got "
NO_STRATEGY = "expected a subclass of flexmask.Strategy, got "
NOT_MADE = "strategy 'mine' cannot be made with its defaults, or listed: "
NOT_FROZEN = "strategy 'mine' must be decorated with @dataclass(frozen=True)"
BAD_TYPE = "a parameter's type must be bool, int, float, str or Literal, got "
ERROR = "class Odd(Exception):\n    def __str__(self): raise KeyError\nraise Odd"


def strategy(
    body: str, decorator: str = "@dataclass(frozen=True)", bases: str = "Strategy"
) -> str:
    return f"{HEAD}{decorator}\nclass Mine({bases}):\n{body}{HOOK}"


def hook(definition: str) -> str:
    return f"{HEAD}@hookimpl\n{definition}"


def function(definition: str) -> str:
    return f"{HEAD}@mask_strategy\n{definition}"


def parameters(line: str) -> str:
    return strategy(f"{NAME}    {line}\n{MASK}")


MODULES: dict[str, tuple[str | bytes, str]] = {
    "an error whose message is an error": (ERROR, "Odd: its message cannot be had, since that "),
    "an error of ten megabytes": ("raise ValueError('x' * 10**7)", "ValueError: xxx"),
    "an error that commands a terminal": (
        "raise ValueError('\\x1b[2J\\u202e\\n\\n')",
        "ValueError: \\x1b[2J\\u202e at flexmask_mine.py:1",
    ),
    "endless recursion": ("def f(): f()\nf()", "RecursionError: maximum recursion depth"),
    "no memory": ("raise MemoryError", "MemoryError at"),
    "an error that is no exception": ("raise BaseException('x')", "BaseException: x at"),
    "the end of a generator": ("raise GeneratorExit", "GeneratorExit at"),
    "a group of errors": ("raise ExceptionGroup('g', [ValueError()])", "ExceptionGroup: g (1 "),
    "an error that causes itself": (
        "try:\n    1 / 0\nexcept Exception as error:\n    raise error from error",
        "ZeroDivisionError: division by zero",
    ),
    "a zero": (b"x = 1\0", "source code string cannot contain null bytes"),
    "an unknown encoding": ("# -*- coding: nope -*-", "SyntaxError: unknown encoding: nope"),
    "bytes that are no text": (b"x = '\xff'", "SyntaxError"),
    "300 brackets": ("x = " + "(" * 300 + ")" * 300, "too many nested parentheses"),
    "an integer of 5,000 digits": ("x = " + "9" * 5000, "Exceeds the limit (4300 digits)"),
    "tabs and spaces": ("if 1:\n\tx = 1\n        y = 2\n", "TabError"),
    "no hook": ("", "no hook in it"),
    "a module of itself": ("import flexmask_mine", "no hook in it"),
    "what it breaks in flexmask": ("import flexmask\ndel flexmask.nothing", "AttributeError"),
    "a hook that gives a number": (hook("def register_strategies(): return 3"), f"{NO_LIST}3"),
    "a hook that gives a text": (
        hook("def register_strategies(): return 'causal'"),
        f"{NO_STRATEGY}'c'",
    ),
    "a hook that gives a strategy": (
        strategy(NAME + MASK).replace("[Mine]", "[Mine()]"),
        f"{NO_STRATEGY}Mine()",
    ),
    "a hook of another name": (
        hook("def register_strategys(): return []"),
        "no hook 'register_strategys'; did you mean 'register_strategies'?",
    ),
    "a hook around hooks": (
        f"{HEAD}@hookimpl(wrapper=True)\ndef register_strategies(): return (yield)",
        NO_LIST,
    ),
    "a hook that ends the process": (
        hook("def register_strategies(): raise SystemExit"),
        "SystemExit at",
    ),
    "one strategy twice": (
        strategy(NAME + MASK).replace("[Mine]", "[Mine, Mine]"),
        "strategy 'mine' is registered twice",
    ),
    "a property for a name": (
        strategy(f"    @property\n    def name(self): return 'mine'\n{MASK}"),
        f"{BAD_NAME}<property",
    ),
    "a number for a name": (strategy(f"    name = 3\n{MASK}"), f"{BAD_NAME}3"),
    "no name": (strategy(MASK), f"{BAD_NAME}None"),
    "an empty name": (strategy(f"    name = ''\n{MASK}"), f"{BAD_NAME}''"),
    "a path for a name": (strategy(f"    name = '../x'\n{MASK}"), f"{BAD_NAME}'../x'"),
    "a name that commands a terminal": (
        strategy(f"    name = '\\x1b[2J'\n{MASK}"),
        f"{BAD_NAME}'\\x1b[2J'",
    ),
    "a name of a megabyte": (strategy(f"    name = 'x' * 10**6\n{MASK}"), f"{BAD_NAME}'xxx"),
    "no mask": (strategy(NAME), "strategy 'mine' does not define mask_mod(self, batch)"),
    "a mask that is none": (strategy(f"{NAME}    mask_mod = None\n"), "has no method mask_mod"),
    "no dataclass": (strategy(NAME + MASK, decorator=""), NOT_FROZEN),
    "a dataclass that changes": (strategy(NAME + MASK, decorator="@dataclass"), NOT_FROZEN),
    "a parameter without default": (
        parameters("w: int"),
        "parameter 'w' of strategy 'mine' has",
    ),
    "a list for a parameter": (parameters("w: list = ()"), f"{BAD_TYPE}<class 'list'>"),
    "a parameter that may be None": (parameters("w: int | None = None"), f"{BAD_TYPE}int | None"),
    "a type that is not there": (parameters("w: 'Nope' = 3"), "NameError: name 'Nope' is not"),
    "a default of another type": (parameters("w: int = 'x'"), "w must be int, got 'x'"),
    "a text of digits for a number": (parameters("w: int = '3'"), "w must be int, got '3'"),
    "None for a number": (parameters("w: float = None"), "w must be float, got None"),
    "NaN for a default": (parameters("w: float = float('nan')"), "w must be finite, got nan"),
    "a default below its minimum": (
        parameters("w: int = parameter(0, help='', minimum=1)"),
        "w must be positive, got 0",
    ),
    "defaults that make none": (
        strategy(f"{NAME}{MASK}    def __post_init__(self): 1 / 0\n"),
        f"{NOT_MADE}ZeroDivisionError",
    ),
    "parameters that cannot be listed": (
        strategy(f"{NAME}{MASK}    @classmethod\n    def parameters(cls): 1 / 0\n"),
        f"{NOT_MADE}ZeroDivisionError",
    ),
    "a summary that cannot be had": (
        strategy(f"{NAME}{MASK}    @classmethod\n    def summary(cls): raise KeyError('x')\n"),
        f"{NOT_MADE}KeyError",
    ),
    "a number for a summary": (
        strategy(f"{NAME}{MASK}    @classmethod\n    def summary(cls): return 3\n"),
        "its summary must be a text, got 3",
    ),
    "a number for a docstring": (strategy(f"    __doc__ = 3\n{NAME}{MASK}"), NOT_MADE),
    "a class that hides its name": (
        f"{HEAD}class Meta(type(Strategy)):\n    def __getattribute__(cls, name):\n"
        "        if name == 'name': raise ValueError\n"
        "        return super().__getattribute__(name)\n"
        f"@dataclass(frozen=True)\nclass Mine(Strategy, metaclass=Meta):\n{MASK}{HOOK}",
        "ValueError at flexmask_mine.py",
    ),
    "a class that cannot be shown": (
        f"{HEAD}class Meta(type):\n    def __repr__(cls): raise ValueError\n"
        f"class Mine(metaclass=Meta): pass\n{HOOK}",
        "ValueError at flexmask_mine.py",
    ),
    "a function of nothing": (function("def mine(): ..."), "does not take the batch as its first"),
    "a function of anything": (function("def mine(batch, *a, **b): ..."), "takes 'a' by position"),
    "a parameter without a type": (function("def mine(batch, *, w=3): ..."), "has no type"),
    "a class for a function": (function("class mine: ..."), "does not take the batch"),
    "a number for a function": (f"{HEAD}mask_strategy(3)", "AttributeError: 'int' object"),
    "a function without a name": (
        f"{HEAD}Mine = mask_strategy(lambda batch: causal)\n{HOOK}",
        "<lambda>",
    ),
}

METADATA: dict[str, tuple[str, str | bytes, str]] = {
    "a requirement that is none": (
        "METADATA",
        "Metadata-Version: 2.1\nName: x\nVersion: 1\nRequires-Dist: flexmask>>1\n",
        "it cannot be read: InvalidRequirement",
    ),
    "no version": ("METADATA", "Metadata-Version: 2.1\nName: x\n", "names no version"),
    "a name that commands a terminal": (
        "METADATA",
        "Metadata-Version: 2.1\nName: \x1b[2J\nVersion: 1\nRequires-Dist: flexmask>9\n",
        "it needs flexmask>9",
    ),
    "metadata of zeros": ("METADATA", b"\0" * 99, "names no version"),
    "entry points of bytes": ("entry_points.txt", b"[flexmask]\n\xff", "it cannot be read"),
    "an entry point that is code": (
        "entry_points.txt",
        "[flexmask]\nmine = __import__('os')\n",
        "names no module but",
    ),
    "an entry point of a file": (
        "entry_points.txt",
        "[flexmask]\nmine = ../x.py\n",
        "names no mod",
    ),
    "an attribute that is not there": (
        "entry_points.txt",
        "[flexmask]\nmine = flexmask_mine:no.where\n",
        "AttributeError",
    ),
}


def check_the_others(message: str) -> None:
    """The broken plugin is named in one line; listings show the strategies of all others."""
    load_registry.cache_clear()
    listed = run_command("strategies", "--json")
    assert listed.status == 0, listed.err
    names = {item["name"] for item in json.loads(listed.out)}
    assert names == {*BUILT_IN, "first", "last"}
    (line,) = listed.err.splitlines()
    assert line.startswith("warning: plugin '")
    assert message in line
    assert len(line) < 2_200
    assert printable(line, LINES) == line


@pytest.fixture
def working(site: Site) -> Site:
    site.install("flexmask-aaa", plugin("first"))
    site.install("flexmask-zzz", plugin("last"))
    return site


@pytest.mark.parametrize(("source", "message"), sampled(MODULES))
def test_a_broken_module_is_named_and_the_others_work(
    working: Site, source: str | bytes, message: str
) -> None:
    working.install("flexmask-mine", "")
    made = source if isinstance(source, bytes) else source.encode()
    (working.folder / "flexmask_mine.py").write_bytes(made)
    check_the_others(message)


@pytest.mark.parametrize(("file", "content", "message"), sampled(METADATA))
def test_broken_metadata_is_named_and_the_others_work(
    working: Site, file: str, content: str | bytes, message: str
) -> None:
    working.install("flexmask-mine", plugin("mine"))
    made = content if isinstance(content, bytes) else content.encode()
    (working.folder / "flexmask_mine-1.0.dist-info" / file).write_bytes(made)
    check_the_others(message)


def test_a_strategy_whose_own_code_fails_keeps_its_traceback_harmless(
    working: Site, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    body = f"{NAME}    def mask_mod(self, batch): raise ValueError('\\x1b[2J\\u202e')\n"
    working.install("flexmask-mine", strategy(body))
    monkeypatch.setattr("sys.argv", ["flexmask", "show", "-s", "mine"])
    with pytest.raises(SystemExit) as end:
        run()
    assert end.value.code == 1
    said = capsys.readouterr().err
    assert said.startswith("Traceback (most recent call last):")
    assert said.rstrip().endswith("ValueError: \\x1b[2J\\u202e")
    assert printable(said, LINES) == said
