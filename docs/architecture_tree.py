"""Writes what docs/architecture.md says of layers and modules: ``make docs``.

Layers are those of import-linter in pyproject.toml; a module has its docstring's first line.
"""

from __future__ import annotations

import ast
import re
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
TARGET = Path(__file__).with_name("architecture.md")
PACKAGES = ("flexmask", "plugins/flexmask_strategies", "cli/flexmask_cli")
NAME_WIDTH = 32


def page(text: str) -> str:
    """Return ``text`` with the layers and the tree between their markers replaced."""
    tree = (line for package in PACKAGES for line in lines(ROOT / package, package))
    return _filled(_filled(text, "layers", layers()), "tree", tree)


def _filled(text: str, marker: str, content: Iterable[str]) -> str:
    written = f"<!-- {marker} -->\n```text\n" + "\n".join(content) + "\n```\n<!-- end -->"
    pattern = rf"<!-- {marker} -->.*?<!-- end -->"
    return re.sub(pattern, lambda _: written, text, flags=re.DOTALL)


def layers() -> list[str]:
    """Return a line for each layer of the core, the highest first."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    contracts = project["tool"]["importlinter"]["contracts"]
    (contract,) = (it for it in contracts if it.get("containers") == ["flexmask"])
    return [layer.replace(" | ", "  ") for layer in contract["layers"]]


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
