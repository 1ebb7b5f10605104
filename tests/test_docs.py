"""What the documents say is true."""

import re
from pathlib import Path

import flexmask
from flexmask.registry import load_registry
from flexmask_cli.app import build_app

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text()


def test_the_python_of_the_readme_runs_and_answers(capsys):
    for code in re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL):
        exec(code, globals())
    answers = capsys.readouterr().out.split()
    assert answers == ["Fumholm", "Fumholm"]


def test_the_readme_lists_every_strategy_and_command():
    for registered in load_registry().strategies():
        if registered.owner.distribution == "flexmask":
            assert f"| `{registered.cls.name}` |" in README
    for command in build_app().registered_commands:
        assert f"flexmask {command.name or command.callback.__name__}" in README


def test_the_tree_of_the_readme_names_every_module_of_the_core():
    tree = README.partition("## Where things are")[2]
    for path in (ROOT / "flexmask").rglob("*.py"):
        named = path.name in tree or path.name == "__init__.py" or path.parent.name == "demo"
        assert named, path


def test_every_public_name_exists():
    assert all(hasattr(flexmask, name) for name in flexmask.__all__)
