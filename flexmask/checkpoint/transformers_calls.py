"""Calls transformers to load something, without its output and with errors of one line."""

from __future__ import annotations

import logging
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

from huggingface_hub.utils import logging as hub_logging
from transformers.utils import logging as transformers_logging

from flexmask.error_text import is_panic
from flexmask.errors import FlexMaskError, ModelError

LONGEST_MESSAGE = 250
_SPEAKING = (OSError, ValueError, ImportError, NotImplementedError)


@contextmanager
def errors_in_one_line(what: str, library: str = "transformers") -> Iterator[None]:
    """Silence transformers for the duration, and turn its exceptions into a `ModelError`.

    transformers prints errors before it raises them, and much besides. Files of a model, and code
    that comes with it, can raise any exception, so all are caught.

    Args:
        what: The beginning of the message, such as ``cannot load model 'x'``.
        library: The library that is called.

    Raises:
        ModelError: For every exception except those of flexmask.
    """
    with _quiet_transformers():
        try:
            yield
        except FlexMaskError:
            raise
        except Exception as error:
            raise ModelError(one_line(f"{what}: {_reason(error, library)}")) from error
        except BaseException as error:
            if not is_panic(error):
                raise
            raise ModelError(one_line(f"{what}: {_reason(error, library)}")) from error


def one_line(message: str) -> str:
    """Return a message in one line of bounded length, cut after a sentence or with an ellipsis."""
    message = " ".join(message.split()).rstrip(".")
    if len(message) <= LONGEST_MESSAGE:
        return message
    # The name of the model comes first and may contain dots; a sentence ends before a capital.
    ends = [match.start() for match in re.finditer(r"\.? (?<=\. )(?=[A-Z])", message)]
    fitting = [end for end in ends if LONGEST_MESSAGE // 3 < end <= LONGEST_MESSAGE]
    return message[: fitting[-1]] if fitting else message[: LONGEST_MESSAGE - 1] + "…"


def _reason(error: BaseException, library: str) -> str:
    """Return the text of an error, after its type unless the text alone is clear."""
    name, text = type(error).__name__, str(error).strip()
    if text and (isinstance(error, _SPEAKING) or name.startswith("StrictDataclass")):
        return text
    return f"{library} raises {name}: {text}" if text else f"{library} raises {name}"


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Suppress logs, progress bars and warnings of transformers, but not the hub's bars."""
    verbosity, of_hub = transformers_logging.get_verbosity(), hub_logging.get_verbosity()
    had_bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.CRITICAL)
    hub_logging.set_verbosity(logging.CRITICAL)
    transformers_logging.disable_progress_bar()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(of_hub)
        if had_bars:
            transformers_logging.enable_progress_bar()
