"""Made-up plugins, installed in a folder of their own, and those in plugins/."""

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import Any

OWN_STRATEGIES = Path(__file__).parents[1] / "plugins" / "flexmask_strategies"
BUILT_IN = sorted(path.stem for path in OWN_STRATEGIES.glob("[!_]*.py"))
"""Names of the strategies that come with flexmask, one a file."""

STRATEGY = """
@dataclass(frozen=True)
class {cls}(Strategy):
    name = "{name}"

    def mask_mod(self, batch):
        raise NotImplementedError
"""


def plugin(*names, hook="def register_strategies(): return [{classes}]"):
    """Source of a plugin with a strategy for each name, and a hook that gets their classes."""
    classes = [f"Strategy{number}" for number in range(len(names))]
    return "\n".join(
        [
            "from dataclasses import dataclass",
            "from flexmask import Strategy, hookimpl",
            *(STRATEGY.format(cls=c, name=n) for c, n in zip(classes, names, strict=True)),
            f"@hookimpl\n{hook.format(classes=', '.join(classes))}",
        ]
    )


def load_distribution(path: Path) -> Any:
    """Import the module of a distribution in plugins/ that is not installed."""
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Site:
    """A folder to install made-up distributions in, each a module and its metadata."""

    def __init__(self, folder):
        self.folder = folder
        self.modules = set()
        folder.mkdir()

    def install(self, name, source, *, version="1.0", entry_points=None, requires="flexmask"):
        module = name.replace("-", "_")
        self.modules.add(module)
        (self.folder / f"{module}.py").write_text(source)
        info = self.folder / f"{module}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nRequires-Dist: {requires}\n"
        )
        entry_points = entry_points or f"{name.removeprefix('flexmask-')} = {module}"
        (info / "entry_points.txt").write_text(f"[flexmask]\n{entry_points}\n")
        importlib.invalidate_caches()
