"""Creates a plugin from the files of plugins/flexmask-example, under another name."""

from __future__ import annotations

import importlib.util
import keyword
import os
import re
from dataclasses import dataclass
from importlib.resources import files
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import Self

from flexmask.errors import OptionError

EXAMPLE = "flexmask-example"


@dataclass(frozen=True)
class PluginNames:
    """The three names of a plugin.

    Attributes:
        distribution: The name for ``pip install``.
        module: The name for ``import``.
        strategy: The name for `make_strategy` and ``--strategy``.
    """

    distribution: str
    module: str
    strategy: str

    @classmethod
    def of(cls, name: str) -> Self:
        """Derive them from a distribution's name: ``flexmask-sliding`` has ``sliding``.

        Raises:
            OptionError: If no distribution can have the name, or its module exists already.
        """
        module = re.sub(r"[-.]+", "_", name.lower())
        if not module.isascii() or not module.isidentifier() or keyword.iskeyword(module):
            raise OptionError(
                f"a plugin's name starts with a letter and holds letters, digits and hyphens, "
                f"as in my-strategy, got {name!r}"
            )
        if importlib.util.find_spec(module) is not None:
            raise OptionError(f"module {module!r} is installed already; choose another name")
        return cls(name.lower(), module, module.removeprefix("flexmask_"))


EXAMPLE_NAMES = PluginNames(EXAMPLE, "flexmask_example", "recent_segments")


def write_plugin(names: PluginNames, folder: Path) -> None:
    """Write the example's files into a new folder, with its names replaced.

    Raises:
        OptionError: If the folder exists and is not empty, or cannot be written.
    """
    try:
        if os.path.lexists(folder) and (not folder.is_dir() or any(folder.iterdir())):
            raise OptionError(f"{folder} exists already; choose another `directory`")
        folder.mkdir(parents=True, exist_ok=True)
        for path in _example_files():
            text = path.read_text(encoding="utf-8")
            (folder / _renamed(path.name, names)).write_text(_renamed(text, names), "utf-8")
    except OSError as error:
        raise OptionError(f"{folder} cannot be written: {error.strerror}") from None


def _example_files() -> list[Traversable]:
    """Return the example's files: from flexmask/plugin_template, in a checkout from plugins/."""
    home = files("flexmask").joinpath("plugin_template")
    if not home.is_dir():
        home = Path(__file__).parents[2] / "plugins" / EXAMPLE
    return [path for path in home.iterdir() if path.is_file() and not path.name.startswith(".")]


def _renamed(text: str, names: PluginNames) -> str:
    for name in ("distribution", "module", "strategy"):
        text = text.replace(getattr(EXAMPLE_NAMES, name), getattr(names, name))
    return text
