"""The registry of mask strategies: loads plugins one by one, and keeps the outcome of each."""

from __future__ import annotations

import hashlib
import inspect
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cache, cached_property
from importlib.metadata import Distribution, distributions
from pathlib import Path

from flexmask.error_text import did_you_mean
from flexmask.errors import FlexMaskError, StrategyError
from flexmask.plugins.distribution_loading import PluginRecord, load_distribution, name_and_version
from flexmask.plugins.hookspecs import ENTRY_POINT_GROUP
from flexmask.plugins.strategy_file import is_strategy_file, strategy_of_file
from flexmask.strategy import ParameterValue, Strategy

LOAD_PLUGINS = "FLEXMASK_LOAD_PLUGINS"
"""Environment variable: names of the distributions whose plugins load, separated by commas.

Unset means all. flexmask's own strategies always load.
"""

BUILT_IN = "flexmask"
"""The distribution that holds the built-in strategies."""


@dataclass(frozen=True)
class RegisteredStrategy:
    """A strategy and the plugin that registered it."""

    cls: type[Strategy]
    owner: PluginRecord


@dataclass(frozen=True)
class Registry:
    """All selected plugins, including those that failed."""

    plugins: tuple[PluginRecord, ...]

    def strategies(self) -> tuple[RegisteredStrategy, ...]:
        """Return the strategies that can be looked up, sorted by name."""
        return tuple(group[0] for group in self._by_name.values() if len(group) == 1)

    def strategy(self, name: str) -> type[Strategy]:
        """Look up a strategy.

        Raises:
            StrategyError: If no plugin registered ``name``, or more than one did.
        """
        return self.registered(name).cls

    def registered(self, name: str) -> RegisteredStrategy:
        """Look up a strategy together with the plugin that registered it.

        Raises:
            StrategyError: As `strategy`.
        """
        group = self._by_name.get(name, ())
        if not group:
            raise StrategyError(self._unknown(name))
        if len(group) > 1:
            raise StrategyError(self.conflicts()[name])
        return group[0]

    def conflicts(self) -> dict[str, str]:
        """Return a message for each name that several plugins registered; it names them."""
        return {
            name: _conflict(name, [item.owner for item in group])
            for name, group in self._by_name.items()
            if len(group) > 1
        }

    def error_of(self, plugin: PluginRecord) -> str | None:
        """Return why a plugin failed, or which of its strategies other plugins registered too."""
        conflicts = self.conflicts()
        names = [cls.name for cls in plugin.strategies if cls.name in conflicts]
        return plugin.error or "; ".join(conflicts[name] for name in names) or None

    def problems(self) -> tuple[str, ...]:
        """Return warnings: a line for each note, each failed plugin and each conflict."""
        lines = []
        for item in self.plugins:
            lines += [f"plugin '{item}' {note}" for note in item.notes]
            if item.error:
                lines.append(f"plugin '{item}' failed: {item.error_with_place}")
        return (*lines, *self.conflicts().values())

    @cached_property
    def _by_name(self) -> dict[str, tuple[RegisteredStrategy, ...]]:
        groups: dict[str, tuple[RegisteredStrategy, ...]] = {}
        for plugin in self.plugins:
            for cls in plugin.strategies:
                groups[cls.name] = (*groups.get(cls.name, ()), RegisteredStrategy(cls, plugin))
        return dict(sorted(groups.items()))

    def _unknown(self, name: str) -> str:
        known = [item.cls.name for item in self.strategies()]
        message = f"unknown strategy {name!r}; known: {', '.join(known)}"
        if failed := [f"'{item}'" for item in self.plugins if item.error]:
            message += f"; plugins that failed (see 'flexmask plugins'): {', '.join(failed)}"
        return message + did_you_mean(name, known)


def _conflict(name: str, owners: Iterable[PluginRecord]) -> str:
    listed = " and ".join(f"'{owner}'" for owner in owners)
    return f"strategy {name!r} is registered by {listed}; uninstall one or set {LOAD_PLUGINS}"


@cache
def load_registry() -> Registry:
    """Load the plugins of the entry-point group ``flexmask``, once per process.

    A plugin that fails is recorded, and does not stop the others.

    Raises:
        FlexMaskError: If flexmask itself is not installed, or ``FLEXMASK_LOAD_PLUGINS`` names a
            distribution without plugins.
    """
    found = _find_distributions()
    if BUILT_IN not in found:
        raise FlexMaskError(
            "flexmask is not installed, so its strategies cannot be found; "
            "in a checkout run: pip install -e ."
        )
    selected = _select(found, os.environ.get(LOAD_PLUGINS))
    built_in = load_distribution(found[BUILT_IN])
    reserved = {cls.name for plugin in built_in for cls in plugin.strategies}
    others = [plugin for item in selected for plugin in load_distribution(item, reserved)]
    return Registry((*built_in, *others))


def make_strategy(name: str, parameters: Mapping[str, ParameterValue]) -> Strategy:
    """Look up a strategy and set its parameters; strings are parsed to the declared type.

    Args:
        name: Name of a registered strategy, or ``path/to/file.py:name``.
        parameters: Values by name; others have their defaults.

    Raises:
        StrategyError: If the strategy or a parameter is unknown, or a value is not allowed.
    """
    is_file = is_strategy_file(name)
    cls = strategy_of_file(name) if is_file else load_registry().strategy(name)
    return cls.from_parameters(parameters)


def recorded_plugin(name: str) -> Mapping[str, str] | None:
    """Return what the configuration of a run records about a strategy's plugin.

    The version alone does not suffice: in an editable installation the code changes under the same
    version.

    Returns:
        Distribution, version, and a digest of the file that defines the strategy; None for a
        built-in strategy and for a strategy file, which `recorded_name` records.
    """
    if is_strategy_file(name):
        return None
    found = load_registry().registered(name)
    owner = found.owner
    if owner.distribution == BUILT_IN:
        return None
    source = inspect.getsourcefile(found.cls)
    code = b"" if source is None else Path(source).read_bytes()
    return {
        "distribution": owner.distribution,
        "version": owner.version,
        "sha256": hashlib.sha256(code).hexdigest()[:12],
    }


def _find_distributions() -> dict[str, Distribution]:
    """Return the distributions that declare plugins, sorted by normalised name.

    If one is on ``sys.path`` twice the first counts, as for imports.
    """
    found: dict[str, Distribution] = {}
    for distribution in distributions():
        if _may_declare_plugins(distribution):
            found.setdefault(_normalized(name_and_version(distribution)[0]), distribution)
    return dict(sorted(found.items()))


def _may_declare_plugins(distribution: Distribution) -> bool:
    """Return True if a distribution names the group, or cannot be read; loading reports that."""
    try:
        text = distribution.read_text("entry_points.txt") or ""
    except UnicodeDecodeError as error:
        text = error.object.decode("latin-1")
    except OSError:
        return True
    return f"[{ENTRY_POINT_GROUP}]" in text


def _select(found: Mapping[str, Distribution], wanted: str | None) -> list[Distribution]:
    """Return the third-party distributions that ``FLEXMASK_LOAD_PLUGINS`` selects."""
    others = {name: item for name, item in found.items() if name != BUILT_IN}
    if wanted is None:
        return list(others.values())
    names = {_normalized(name) for name in wanted.split(",") if name.strip()} - {BUILT_IN}
    if unknown := sorted(names - others.keys()):
        raise FlexMaskError(
            f"{LOAD_PLUGINS} names {unknown[0]!r}, which is not an installed plugin; "
            f"installed: {', '.join(others) or 'none'}"
        )
    return [item for name, item in others.items() if name in names]


def _normalized(name: str) -> str:
    """Return the normalised name of a distribution (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name.strip()).lower()
