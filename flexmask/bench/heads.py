"""The shape of attention: number and size of heads."""

from __future__ import annotations

from dataclasses import dataclass

from flexmask.errors import OptionError


@dataclass(frozen=True)
class Heads:
    """The shape of attention.

    Attributes:
        query: Query heads.
        key: Key heads, of which the query heads are a multiple.
        dim: Size of a head.
    """

    query: int
    key: int
    dim: int

    def __post_init__(self) -> None:
        if min(self.query, self.key, self.dim) < 1 or self.query % self.key:
            raise OptionError(
                f"query heads must be a multiple of key heads, got {self.query}:{self.key} "
                f"of {self.dim}"
            )

    @property
    def are_grouped(self) -> bool:
        """True if several query heads share a key head."""
        return self.query != self.key
