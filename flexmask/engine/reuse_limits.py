"""Finds out on the mask of a strategy whether documents are the same in every prompt."""

from __future__ import annotations

from contextlib import suppress

from flexmask.engine.prompt_spans import Span, SpanFinder
from flexmask.errors import RequestError, StrategyError
from flexmask.layout import PREFIX, Layout, TokenizedRequest
from flexmask.strategy import Strategy

TOKENS = 64
"""Tokens of each document, and of the prefix."""

MOST_DOCUMENTS = 16
"""Documents of the prompt, or as many as the strategy takes."""


def limit_of_reuse(strategy: Strategy) -> str | None:
    """Return what limits the reuse of documents under a strategy, as a sentence.

    Documents behind a prefix are laid out, and their spans are found.

    Returns:
        None if a document's keys and values do not depend on the documents before it.

    Raises:
        StrategyError: If nothing at all can be reused.
        RequestError: If the strategy takes neither one document nor a few.
    """
    layout, num_documents = _prompt(strategy)
    (spans,) = SpanFinder(strategy).spans_of([layout])
    segments = [layout.segment_ids[span.start] for span in spans]
    of_documents = [
        span for span, segment in zip(spans, segments, strict=True) if segment > PREFIX
    ]
    is_each_apart = layout.num_segments >= num_documents
    if is_each_apart and any(_is_independent(span, spans, layout) for span in of_documents):
        return None
    if of_documents:
        return (
            f"under strategy {strategy.name!r} keys and values of a document depend on the "
            "documents before it; only prompts with the same ones before it find them"
        )
    if PREFIX in segments:
        return (
            f"under strategy {strategy.name!r} keys and values of documents cannot be reused, "
            "only those of prefixes"
        )
    raise StrategyError(
        f"under strategy {strategy.name!r} no keys and values can be reused: no run of tokens is "
        "proved to see only itself and whole runs before it"
    )


def _prompt(strategy: Strategy) -> tuple[Layout, int]:
    """Lay out a prompt of several documents; also returns their number."""
    document = tuple(range(TOKENS))
    for count in range(MOST_DOCUMENTS, 1, -1):
        with suppress(RequestError):  # too many
            return strategy.layout(TokenizedRequest(document, (document,) * count, (0,))), count
    return strategy.layout(TokenizedRequest(document, (document,), (0,))), 1


def _is_independent(span: Span, spans: tuple[Span, ...], layout: Layout) -> bool:
    """Return True if a span of a document that is not the first sees no other document."""
    own = layout.segment_ids[span.start]
    seen = {layout.segment_ids[spans[index].start] for index in span.ancestors}
    return own > 1 and seen <= {PREFIX, own}
