"""Turns errors of tokenizers into errors of the request that they were given."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from flexmask.error_text import described, is_panic
from flexmask.errors import FlexMaskError, RequestError


@contextmanager
def tokenizer_errors(what: str) -> Iterator[None]:
    """Turn any error of a tokenizer into a `RequestError`.

    A tokenizer's files come from others: a pattern may take too long for a text, and a template
    may name a token that does not exist. The library then raises plain `Exception`, or panics.

    Args:
        what: Start of the message, such as ``it cannot be tokenized``.
    """
    try:
        yield
    except FlexMaskError:
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and not is_panic(error):
            raise
        raise RequestError(f"{what}: {described(error)}") from error
