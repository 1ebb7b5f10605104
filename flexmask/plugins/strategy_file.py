"""Strategies from a Python file, without a plugin."""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

from flexmask.errors import StrategyError
from flexmask.plugins.python_file import digest_of_file, run_file
from flexmask.strategy import Strategy, check_strategy_class

_REFERENCE = re.compile(r"(?P<path>.+\.py)(:(?P<name>\w*))?")
_RECORDED = re.compile(r"(?P<reference>.+) \(sha256 (?P<digest>[0-9a-f]{12})\)")

FILE_MODULES = "flexmask_file_"
"""What the names of modules begin with that are strategy files."""


def is_strategy_file(reference: str) -> bool:
    """Return True for ``path/to/file.py`` and ``path/to/file.py:name``."""
    return _REFERENCE.fullmatch(reference) is not None


def strategy_of_file(reference: str) -> type[Strategy]:
    """Return the strategy ``path/to/file.py:name``; the name is optional if there is only one.

    Raises:
        StrategyError: If the file cannot be run or has no such strategy.
    """
    path, name = _parts(reference)
    found = {cls.name: cls for cls in strategies_of_file(path)}
    if not name and len(found) == 1:
        return next(iter(found.values()))
    if name not in found:
        asked = f"has no strategy {name!r}" if name else "has several strategies"
        listed = " or ".join(f"{path}:{known}" for known in found)
        raise StrategyError(f"{path} {asked}; ask for one as {listed}")
    return found[name]


def classes_in_file(reference: str) -> tuple[type[Strategy], ...]:
    """Return the strategy that a reference names, or all of the file if it names none.

    Raises:
        StrategyError: If the file cannot be run or has no such strategy.
    """
    path, name = _parts(reference)
    return (strategy_of_file(reference),) if name else strategies_of_file(path)


def strategies_of_file(path: Path) -> tuple[type[Strategy], ...]:
    """Run a file, once for each content, and return the strategies that it defines.

    Raises:
        StrategyError: If it fails, defines no strategy, or one that is not usable.
    """
    return _strategies(path.absolute(), path, _digest(path))


@cache
def _strategies(location: Path, path: Path, digest: str) -> tuple[type[Strategy], ...]:
    name = f"{FILE_MODULES}{path.stem}_{digest}"  # two folders may each have a masks.py
    module = run_file(location, path, name, StrategyError)
    values = vars(module).values()
    own = [cls for cls in values if isinstance(cls, type) and cls.__module__ == name]
    found = tuple(check_strategy_class(cls) for cls in own if issubclass(cls, Strategy))
    if not found:
        raise StrategyError(
            f"{path} defines no strategy; decorate a function of the batch with "
            "@flexmask.mask_strategy"
        )
    return found


def strategy_in_module(path: Path, module: str, name: str) -> type[Strategy]:
    """Return a strategy of a file that another process has run.

    Args:
        path: The file.
        module: Name of the module that it was there.
        name: Name of the class.

    Raises:
        StrategyError: If the file has changed since, or fails.
    """
    for cls in strategies_of_file(path):
        if (cls.__module__, cls.__qualname__) == (module, name):
            return cls
    raise StrategyError(f"{path} has changed since it was loaded; start again")


def recorded_name(reference: str) -> str:
    """Return a strategy as a run's configuration records it; a file with a digest."""
    if not is_strategy_file(reference):
        return reference
    return f"{reference} (sha256 {_digest(_parts(reference)[0])})"


def reference_of_record(recorded: str, location: str | None = None) -> str:
    """Return the reference of the strategy that a run's configuration records.

    A file must have the recorded content. It may have been renamed: besides the recorded path, all
    files in its folder and in the working directory are tried.

    Args:
        recorded: A name as `recorded_name` returns it.
        location: The recorded absolute path of the file, if there is one.

    Raises:
        StrategyError: If it was a file, and no file of the same content is found.
    """
    match = _RECORDED.fullmatch(recorded)
    if match is None or not is_strategy_file(match["reference"]):
        return recorded
    path, name = _parts(match["reference"])
    first = [path, *([] if location is None else [Path(location)])]
    folders = dict.fromkeys([Path(), *(file.parent for file in first)])
    others = (file for folder in folders for file in sorted(folder.glob("*.py")))
    for file in (*first, *others):
        if file.is_file() and _digest(file) == match["digest"]:
            return f"{file}:{name}" if name else str(file)
    state = "has changed since" if any(file.is_file() for file in first) else "is not there"
    raise StrategyError(
        f"the run's strategy is of the file {path}, which {state} (sha256 {match['digest']}); "
        "name it with `strategy`, or restore it"
    )


def recorded_location(reference: str) -> str | None:
    """Return the absolute path of a strategy's file, for a run's configuration; else None."""
    return str(_parts(reference)[0].absolute()) if is_strategy_file(reference) else None


def _digest(path: Path) -> str:
    """Return a digest of a file's content."""
    try:
        return digest_of_file(path)
    except OSError as error:
        raise StrategyError(
            f"{path}: {error.strerror}; a strategy is a name or path/to/file.py:name"
        ) from None


def _parts(reference: str) -> tuple[Path, str]:
    match = _REFERENCE.fullmatch(reference)
    assert match is not None
    return Path(match["path"]), match["name"] or ""
