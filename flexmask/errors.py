"""The errors and the warning of flexmask.

The command line turns a `FlexMaskError` into one ``error: …`` line and exit status 1; every
other exception keeps its traceback.

A message names an option as code in backticks, by its name in Python: `` `output` ``, or with a
value `` `num_segments=2` ``. The command line shows such names as options of its own, here
``--output`` and ``--num-segments 2``; it does the same with warnings.
"""

from __future__ import annotations

_BEGINNING, _END = 1500, 400


def shortened(message: str) -> str:
    """Return a long message without its middle, since names in it may be megabytes."""
    if len(message) <= _BEGINNING + _END:
        return message
    return f"{message[:_BEGINNING]} … {message[-_END:]}"


class FlexMaskError(Exception):
    """Base of all errors whose message is meant for the user."""

    def __init__(self, message: str = "") -> None:
        """Keep the message, or the beginning and end of a long one."""
        super().__init__(shortened(message))


class RequestError(FlexMaskError):
    """A request, or the file it came from, cannot be used."""


class TaskError(FlexMaskError):
    """A task file cannot be found, read or used."""


class JudgeError(FlexMaskError):
    """A judge does not apply to the accepted answers of a row, or fails on it."""


class LayoutError(FlexMaskError):
    """A layout is inconsistent, or does not match its request."""


class StrategyError(FlexMaskError):
    """A strategy is unknown, is registered twice, or was given wrong parameters."""


class MaskError(FlexMaskError):
    """A mask_mod breaks one of FlexAttention's rules."""


class AttentionError(FlexMaskError):
    """A model needs attention that flexmask does not compute, or cannot be masked."""


class ModelError(FlexMaskError):
    """A model or tokenizer cannot be loaded, or cannot hold the prompt."""


class RankError(FlexMaskError):
    """A process of a tensor-parallel model has failed, and the others cannot go on."""


class CompilerError(FlexMaskError):
    """torch.compile finds no compiler for the device, or cannot trace a model."""


class OutputError(FlexMaskError):
    """A result file cannot be written, resumed or read."""


class KVStoreError(FlexMaskError):
    """A folder of keys and values is of another model, or cannot be read or written."""


class OptionError(FlexMaskError):
    """An option has a value that it cannot have."""


class FlexMaskWarning(UserWarning):
    """A warning for the user; the program continues."""
