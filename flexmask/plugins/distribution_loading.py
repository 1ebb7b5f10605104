"""Loads the plugins of one distribution, and records the outcome of each."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator, Set
from contextlib import suppress
from dataclasses import dataclass, replace
from importlib.metadata import Distribution, EntryPoint

import pluggy

from flexmask.error_text import described, did_you_mean, place_of_code, place_of_fault
from flexmask.errors import FlexMaskError, StrategyError
from flexmask.plugins import hookspecs
from flexmask.plugins.guarded_call import call_guarded
from flexmask.plugins.hookspecs import ENTRY_POINT_GROUP
from flexmask.strategy import Strategy, check_strategy_class
from flexmask.version import __version__

_VALUE = re.compile(r"\w+(\.\w+)*(\s*:\s*\w+(\.\w+)*)?\s*(\[.*\])?")

UNKNOWN = "?"
"""Version of a distribution whose metadata is missing."""


@dataclass(frozen=True)
class PluginRecord:
    """An entry point and the outcome of loading it.

    Attributes:
        distribution: Name of the distribution that declares it.
        version: Version of that distribution.
        entry_point: Name of the entry point.
        value: The module or object it points to.
        strategies: The strategies that it registered; empty if it failed.
        error: The error in one line; None if it loaded.
        place: The line of its own code at fault, as ``file.py:3: `text```; None if there is none.
        notes: Side effects that were undone, such as printing; each the predicate of a sentence.
    """

    distribution: str
    version: str
    entry_point: str
    value: str
    strategies: tuple[type[Strategy], ...] = ()
    error: str | None = None
    place: str | None = None
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        """Return its name in messages, such as ``flexmask 0.1.0 (causal)``."""
        return f"{self.distribution} {self.version} ({self.entry_point})"

    @property
    def error_with_place(self) -> str | None:
        """The error with the line of code at fault."""
        return f"{self.error} at {self.place}" if self.error and self.place else self.error


def name_and_version(distribution: Distribution) -> tuple[str, str]:
    """Return name and version; without metadata the name of the folder and ``?``."""
    with suppress(Exception):  # unreadable metadata is treated as missing
        metadata = distribution.metadata
        if "Name" in metadata and "Version" in metadata:
            return metadata["Name"], metadata["Version"]
    return getattr(getattr(distribution, "_path", None), "name", "unnamed"), UNKNOWN


def load_distribution(
    distribution: Distribution, reserved: Set[str] = frozenset()
) -> tuple[PluginRecord, ...]:
    """Load each plugin of a distribution; a plugin that fails does not stop the others.

    Args:
        distribution: A distribution with entry points in the group ``flexmask``.
        reserved: Names that its strategies must not have.
    """
    whole = PluginRecord(*name_and_version(distribution), "entry_points.txt", "")
    try:
        _check_requirement(distribution)
        entry_points = sorted(declared_entry_points(distribution))
    except FlexMaskError as error:
        return (replace(whole, error=str(error)),)
    except Exception as error:
        return (replace(whole, error=f"it cannot be read: {described(error)}"),)
    return tuple(_load_all(whole, entry_points, reserved))


def declared_entry_points(distribution: Distribution) -> Iterator[EntryPoint]:
    """Yield the entry points of the group ``flexmask``, including malformed ones.

    `Distribution.entry_points` fails at the first line of any group that it cannot parse.
    """
    group = ""
    for line in (distribution.read_text("entry_points.txt") or "").splitlines():
        line = line.strip()
        if line.startswith("[") and line.endswith("]"):
            group = line[1:-1].strip()
        elif group == ENTRY_POINT_GROUP and line and not line.startswith(("#", ";")):
            name, _, value = line.partition("=")
            yield EntryPoint(name.strip(), value.strip(), group)


def _load_all(
    whole: PluginRecord, entry_points: list[EntryPoint], reserved: Set[str]
) -> Iterator[PluginRecord]:
    seen: set[str] = set()
    for entry_point in entry_points:
        record = replace(whole, entry_point=entry_point.name, value=entry_point.value)
        if entry_point.name in seen:
            error = f"entry point {entry_point.name!r} is declared twice; rename one"
            yield replace(record, error=error)
        elif not _VALUE.fullmatch(entry_point.value):
            error = (
                f"its entry point {entry_point.name!r} names no module but "
                f"{entry_point.value!r}; write package.module or package.module:object"
            )
            yield replace(record, error=error)
        else:
            yield _load_plugin(record, entry_point, reserved)
        seen.add(entry_point.name)


def _check_requirement(distribution: Distribution) -> None:
    """Check that a distribution has metadata that allows the installed flexmask.

    Raises:
        StrategyError: If the metadata is missing or requires another version.
    """
    name, version = name_and_version(distribution)
    if version == UNKNOWN:
        raise StrategyError(
            "its installation is incomplete: its metadata names no version; reinstall"
        )
    texts = [text for text in distribution.requires or () if text.lower().startswith("flexmask")]
    if not texts:
        return
    from packaging.requirements import (
        Requirement,
    )  # importing it takes as long as all other code here
    from packaging.utils import canonicalize_name

    for requirement in map(Requirement, texts):
        applies = requirement.marker is None or requirement.marker.evaluate({"extra": ""})
        if canonicalize_name(requirement.name) != "flexmask" or not applies:
            continue
        if not requirement.specifier.contains(__version__, prereleases=True):
            raise StrategyError(
                f"it needs flexmask{requirement.specifier}, and {__version__} is installed; run: "
                f"pip install --upgrade flexmask {name}"
            )


def _load_plugin(
    record: PluginRecord, entry_point: EntryPoint, reserved: Set[str]
) -> PluginRecord:
    loaded: list[object] = []

    def load() -> tuple[type[Strategy], ...]:
        loaded.append(entry_point.load())
        strategies = _call_hook(loaded[0], entry_point.value)
        _check_names(strategies, reserved)
        return strategies

    result = call_guarded(load)
    record = replace(record, strategies=result.value or (), notes=result.notes)
    if result.error is None:
        return record
    if isinstance(result.error, ModuleNotFoundError) and result.error.name == entry_point.module:
        missing = (
            f"its module {entry_point.module!r} is not there; install it again: "
            f"pip install --force-reinstall {record.distribution}"
        )
        return replace(record, error=missing)
    place = place_of_fault(result.error, entry_point.module)
    if place is None and loaded:
        place = _place_of_hook(loaded[0])
    return replace(record, error=described(result.error), place=place)


def _call_hook(plugin: object, name: str) -> tuple[type[Strategy], ...]:
    """Call the hook of one plugin alone, so that the owner of each strategy is known."""
    manager = pluggy.PluginManager(hookspecs.hookspec.project_name)
    manager.add_hookspecs(hookspecs)
    manager.register(plugin, name)
    _check_hook_names(manager, plugin)
    manager.check_pending()
    if not manager.get_hookcallers(plugin):
        raise StrategyError("no hook in it; decorate register_strategies with @flexmask.hookimpl")
    results = manager.hook.register_strategies()
    returned = results[0] if results else None  # pluggy drops None
    if not isinstance(returned, Iterable):
        raise StrategyError(
            f"register_strategies must return a list of strategy classes, got {returned!r}"
        )
    return tuple(check_strategy_class(cls) for cls in returned)


def _check_hook_names(manager: pluggy.PluginManager, plugin: object) -> None:
    """Refuse hooks that flexmask does not have, as `PluginManager.check_pending` does.

    Raises:
        StrategyError: If there is one; the message suggests a hook of similar name.
    """
    for caller in manager.get_hookcallers(plugin) or ():
        if not caller.has_spec():
            known = [name for name, hook in vars(manager.hook).items() if hook.has_spec()]
            close = did_you_mean(caller.name, known)
            raise StrategyError(f"flexmask has no hook {caller.name!r}{close}")


def _check_names(strategies: tuple[type[Strategy], ...], reserved: Set[str]) -> None:
    names = [cls.name for cls in strategies]
    for name in names:
        if name in reserved:
            raise StrategyError(f"strategy {name!r} is built in; give yours another name")
        if names.count(name) > 1:
            raise StrategyError(f"strategy {name!r} is registered twice")


def _place_of_hook(plugin: object) -> str | None:
    """Return the place where a plugin's hook, or a function marked as one, is defined."""
    marker = f"{hookspecs.hookspec.project_name}_impl"
    values = getattr(plugin, "__dict__", {}).values()
    hooks = (value for value in values if inspect.isroutine(value) and hasattr(value, marker))
    return next(map(place_of_code, hooks), None)
