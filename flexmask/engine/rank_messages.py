"""The messages of rank 0 to the other ranks, as bytes: calls, with prompts and strategies."""

from __future__ import annotations

import functools
import io
import pickle
import sys
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from flexmask.engine.prefill_plan import PrefillPlan
from flexmask.errors import OptionError
from flexmask.layout import Layout
from flexmask.plugins.strategy_file import FILE_MODULES, strategy_in_module

END = b"end"
"""The message that ends a rank; it is not pickled."""


def to_bytes(message: object) -> bytes:
    """Pickle a message for another process.

    Raises:
        OptionError: If that process cannot import something in it, such as a strategy that is
            defined in a notebook.
    """
    buffer = io.BytesIO()
    try:
        _Pickler(buffer, protocol=pickle.HIGHEST_PROTOCOL).dump(message)
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        reason = " ".join(str(error).split())
        raise OptionError(
            f"`tensor_parallel`: other processes cannot import what this run uses ({reason}); "
            "define strategies in a module or a file"
        ) from error
    return buffer.getvalue()


def from_bytes(content: bytes, own: Mapping[str, Any]) -> object:
    """Read a message.

    Args:
        content: What `to_bytes` has made.
        own: This rank's objects in place of those of rank 0: its ``model`` and latest ``plan``.
    """
    message: object = _Unpickler(content, own).load()
    return message


class _Pickler(pickle.Pickler):
    """Pickles calls. Each rank has its own model and plans, and runs strategy files itself."""

    def persistent_id(self, obj: Any) -> tuple[str, ...] | None:
        if isinstance(obj, PreTrainedModel):
            return ("model",)
        if isinstance(obj, PrefillPlan):
            return ("plan",)
        if isinstance(obj, type) and obj.__module__.startswith(FILE_MODULES):
            file = str(sys.modules[obj.__module__].__file__)
            return ("file", file, obj.__module__, obj.__qualname__)
        if isinstance(obj, type) and obj.__module__ == "__main__":
            raise pickle.PicklingError(f"{obj.__name__} is defined in __main__")
        return None

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is not Layout:
            return NotImplemented
        return _known_layout, tuple(getattr(obj, one.name) for one in fields(Layout))


@functools.lru_cache(maxsize=2048)
def _known_layout(*values: Any) -> Layout:
    """Return a layout: the same object for equal ones, so that it is looked at once."""
    return Layout(*values)


class _Unpickler(pickle.Unpickler):
    """Reads calls on another rank."""

    def __init__(self, content: bytes, own: Mapping[str, Any]) -> None:
        super().__init__(io.BytesIO(content))
        self._own = own

    def persistent_load(self, pid: tuple[str, ...]) -> Any:
        kind, *place = pid
        if kind != "file":
            return self._own[kind]
        path, module, name = place
        return strategy_in_module(Path(path), module, name)
