"""Runs a Python file that the user names, for the strategies or functions in it."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import warnings
from pathlib import Path
from types import ModuleType

from flexmask.error_text import described, place_of_fault
from flexmask.errors import FlexMaskError, FlexMaskWarning
from flexmask.plugins.guarded_call import call_guarded


def digest_of_file(path: Path) -> str:
    """Return the beginning of the SHA-256 of a file's content.

    Raises:
        OSError: If it cannot be read.
    """
    return hashlib.sha256(path.read_bytes()).hexdigest()[:12]


def run_file(location: Path, path: Path, name: str, error_type: type[FlexMaskError]) -> ModuleType:
    """Run a file as a module; what it does to the process is undone, with a warning.

    Args:
        location: Absolute path of the file.
        path: Its path in messages.
        name: Name of the module.
        error_type: Type of the error that is raised if the file fails.

    Raises:
        FlexMaskError: If it fails; the message names the line at fault.
    """
    result = call_guarded(lambda: _run(location, name))
    for note in result.notes:
        warnings.warn(f"{path} {note}", FlexMaskWarning, stacklevel=3)
    if result.error is not None:
        line = place_of_fault(result.error, str(location))
        where = f" at {line}" if line else ""
        raise error_type(f"{path} failed: {described(result.error)}{where}") from result.error
    assert result.value is not None
    return result.value


def _run(path: Path, name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look up annotations there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
