"""Predicts how often documents are found in a cache, from how popular they are."""

from __future__ import annotations

import random
from collections import OrderedDict
from collections.abc import Sequence
from itertools import accumulate


def predicted_hit_rate(
    sizes: Sequence[int],
    capacity: int,
    *,
    exponent: float,
    questions: int,
    per_question: int,
    together: int,
    sorted_together: int = 1,
    seed: int = 1,
) -> float:
    """Draw questions anew, and look their documents up in a cache that forgets the oldest use.

    Questions that start together ask for each of their documents once, and keep those that were
    missing afterwards.

    Args:
        sizes: Bytes of each document, the most popular first.
        capacity: Bytes of the cache, which is empty at first.
        exponent: The document of rank ``n`` is drawn as often as ``n ** -exponent``.
        questions: Number of questions.
        per_question: Different documents of a question.
        together: Questions that start together.
        sorted_together: Questions that are sorted by length before they start, longest first.
        seed: Seed of the draws.

    Returns:
        The share of the documents asked for that the cache had.
    """
    cache, held = OrderedDict[int, None](), 0
    hits = lookups = 0
    drawn = _drawn(len(sizes), exponent, questions, per_question, random.Random(seed))
    order = [
        ranks
        for first in range(0, questions, sorted_together)
        for ranks in sorted(
            drawn[first : first + sorted_together],
            key=lambda ranks: -sum(sizes[rank] for rank in ranks),
        )
    ]
    for first in range(0, questions, together):
        asked = dict.fromkeys(rank for ranks in order[first : first + together] for rank in ranks)
        missing = [rank for rank in asked if rank not in cache]
        hits, lookups = hits + len(asked) - len(missing), lookups + len(asked)
        for rank in asked:
            if rank in cache:
                cache.move_to_end(rank)
        for rank in missing:
            while cache and held + sizes[rank] > capacity:
                oldest, _ = cache.popitem(last=False)
                held -= sizes[oldest]
            if sizes[rank] <= capacity:
                cache[rank] = None
                held += sizes[rank]
    return hits / lookups


def _drawn(
    count: int, exponent: float, questions: int, per_question: int, draw: random.Random
) -> list[list[int]]:
    """Draw the ranks of the documents of each question."""
    weights = list(accumulate((rank + 1) ** -exponent for rank in range(count)))
    drawn = []
    for _ in range(questions):
        ranks: dict[int, None] = {}
        while len(ranks) < per_question:
            ranks.setdefault(draw.choices(range(count), cum_weights=weights)[0])
        drawn.append(list(ranks))
    return drawn
