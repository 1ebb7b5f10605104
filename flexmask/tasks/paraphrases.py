"""Selects the paraphrases of a row that become the segments of its request."""

from __future__ import annotations

import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from flexmask.errors import OptionError, RequestError

SYNTAX = "'all', 'first N', 'indices I J …' or 'sample N GROUP + M GROUP'"

_SHOWN = 80

Paraphrase = TypeVar("Paraphrase")
Groups = Mapping[str, Sequence[Paraphrase]]
"""Paraphrases by group name, such as ``manual`` and ``auto``."""


@dataclass(frozen=True)
class ParaphraseSelection:
    """A selection of paraphrases, such as ``sample 3 manual + 2 auto``.

    ``all``, ``first N`` and ``indices I J …`` (from 0) number the paraphrases through all groups,
    in order. ``sample`` draws without replacement, group by group, with a generator seeded by the
    row's uuid: the paraphrases of a row do not depend on its position or on other rows.

    Attributes:
        first: Number of paraphrases to take from the beginning.
        indices: Indices of the paraphrases to take. Without ``first``, ``indices`` and
            ``samples``, all are taken.
        samples: Pairs of a number to draw and the group to draw from.
    """

    first: int | None = None
    indices: tuple[int, ...] | None = None
    samples: tuple[tuple[int, str], ...] = ()

    @classmethod
    def parse(cls, text: str) -> ParaphraseSelection:
        """Parse a selection, as formatted by ``str``.

        Raises:
            OptionError: If the syntax is wrong.
        """
        word, _, rest = text.strip().partition(" ")
        if text.strip() == "all":
            return cls()
        if word == "first" and re.fullmatch(r"[1-9]\d{,5}", rest):
            return cls(first=int(rest))
        if word == "indices" and re.fullmatch(r"\d{1,6}([\s,]+\d{1,6})*", rest):
            return cls(indices=tuple(map(int, re.findall(r"\d+", rest))))
        parts = [re.fullmatch(r"\s*([1-9]\d{,5})\s+(\w+)\s*", part) for part in rest.split("+")]
        if word == "sample" and all(parts):
            return cls(samples=tuple((int(part[1]), part[2]) for part in parts if part))
        shown = text if len(text) <= _SHOWN else f"{text[:_SHOWN]}…"
        raise OptionError(
            f"paraphrases are selected by {SYNTAX}, with numbers below 1,000,000, got {shown!r}"
        )

    def __str__(self) -> str:
        """Format the selection as `parse` reads it."""
        if self.samples:
            return "sample " + " + ".join(f"{number} {group}" for number, group in self.samples)
        if self.first is not None:
            return f"first {self.first}"
        if self.indices is None:
            return "all"
        return "indices " + " ".join(map(str, self.indices))

    def choose(self, groups: Groups[Paraphrase], uuid: str) -> list[Paraphrase]:
        """Select paraphrases of the row ``uuid``.

        Raises:
            RequestError: If there are too few, or there is no such group.
        """
        if self.samples:
            return self._sample(groups, random.Random(uuid))
        every = [text for texts in groups.values() for text in texts]
        if self.first is None and self.indices is None:
            return every
        needed = self.first if self.indices is None else max(self.indices) + 1
        if needed is not None and needed > len(every):
            raise RequestError(f"paraphrases: {self} selected, but the row has {len(every)}")
        return every[: self.first] if self.indices is None else [every[i] for i in self.indices]

    def _sample(self, groups: Groups[Paraphrase], generator: random.Random) -> list[Paraphrase]:
        chosen: list[Paraphrase] = []
        for number, group in self.samples:
            texts = groups.get(group)
            if texts is None:
                raise RequestError(
                    f"{self}: no group {group!r} of paraphrases; groups: {', '.join(groups)}"
                )
            if number > len(texts):
                raise RequestError(f"{self}: the row has {len(texts)} {group} paraphrases")
            chosen += generator.sample(list(texts), number)
        return chosen
