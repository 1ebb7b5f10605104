"""Writes the file tree of docs/architecture.md from the modules' docstrings: ``make docs``."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
TARGET = Path(__file__).with_name("architecture.md")
PACKAGES = ("flexmask", "plugins/flexmask_strategies", "cli/flexmask_cli")
NAME_WIDTH = 32


def page(text: str) -> str:
    """Return ``text`` with the tree between its markers replaced."""
    tree = "\n".join(line for package in PACKAGES for line in lines(ROOT / package, package))
    written = f"<!-- tree -->\n```text\n{tree}\n```\n<!-- end -->"
    return re.sub(r"<!-- tree -->.*<!-- end -->", lambda _: written, text, flags=re.DOTALL)


def lines(folder: Path, shown: str, depth: int = 0) -> Iterator[str]:
    """Yield a line for a package and for each module and package in it."""
    yield line(f"{shown}/", summary(folder / "__init__.py"), depth)
    for path in sorted(folder.iterdir(), key=lambda path: (path.is_dir(), path.name)):
        if (path / "__init__.py").exists():
            yield from lines(path, path.name, depth + 1)
        elif path.suffix == ".py" and path.name != "__init__.py":
            yield line(path.name, summary(path), depth + 1)


def line(name: str, text: str, depth: int) -> str:
    """Format a line of the tree."""
    return f"{'  ' * depth + name:<{NAME_WIDTH}} {text}".rstrip()


def summary(module: Path) -> str:
    """Return the first line of a module's docstring, without its full stop."""
    docstring = ast.get_docstring(ast.parse(module.read_text(encoding="utf-8")))
    return (docstring or "").partition("\n")[0].removesuffix(".")


if __name__ == "__main__":
    TARGET.write_text(page(TARGET.read_text(encoding="utf-8")), encoding="utf-8")
