"""The pictures to draw: the engine's mask for a request, or the difference of two masks."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flexmask.errors import OptionError
from flexmask.layout_batch import LayoutBatch
from flexmask.mask_mods import and_masks, or_masks, strategy_mask
from flexmask.mod_types import MaskMod
from flexmask.show.tile_mask import TILE, TileMask
from flexmask.show.tokens import DrawnTokens, ShownRequest
from flexmask.strategy import Strategy

FIGURES = (
    "tiles_empty",
    "tiles_partial",
    "tiles_full",
    "allowed_pairs",
    "density",
    "block_mask_bytes",
    "decided_by_intervals",
    "decided_by_evaluation",
    "build_ms",
)
"""Attributes of a `MaskReport` that are numbers."""


@dataclass(frozen=True)
class MaskPicture:
    """The mask of one request under one strategy.

    Attributes:
        title: The strategy and its parameters.
        tokens: The tokens along both axes.
        mask: The mask.
    """

    title: str
    tokens: DrawnTokens
    mask: TileMask

    @property
    def size(self) -> int:
        """Number of tokens."""
        return len(self.tokens)

    @property
    def summary(self) -> str:
        """Density and number of tiles, in one line."""
        report = self.mask.report
        return (
            f"{report.density:.1%} of {self.size**2:,} pairs allowed; tiles: "
            f"{report.tiles_full:,} full, {report.tiles_partial:,} partial, "
            f"{report.tiles_empty:,} skipped"
        )

    def figures(self) -> dict[str, str | int | float]:
        """Return figures of the BlockMask, by name."""
        report = {name: getattr(self.mask.report, name) for name in FIGURES}
        return {"strategy": self.title, "tokens": self.size, **report}


@dataclass(frozen=True)
class MaskDifference:
    """The difference between the masks of two strategies, by the tokens of one request.

    A strategy may store a token more than once. Then a token sees another if any copy of it sees
    any copy of the other.

    Attributes:
        first_title: The first strategy and its parameters.
        second_title: The second strategy and its parameters.
        tokens: The request's tokens, each once.
        both: The pairs that both masks allow.
        only_first: The pairs that only the first mask allows.
        only_second: The pairs that only the second mask allows.
        moved_tokens: Number of tokens with other positions under the second strategy.
    """

    first_title: str
    second_title: str
    tokens: DrawnTokens
    both: TileMask
    only_first: TileMask
    only_second: TileMask
    moved_tokens: int

    @property
    def title(self) -> str:
        """Titles of both strategies."""
        return f"{self.first_title} against {self.second_title}"

    @property
    def size(self) -> int:
        """Number of tokens."""
        return len(self.tokens)

    @property
    def pairs_that_differ(self) -> int:
        """Number of pairs that only one of the masks allows."""
        return self.only_first.report.allowed_pairs + self.only_second.report.allowed_pairs

    @property
    def summary(self) -> str:
        """Number of pairs and positions that differ, in one line."""
        return (
            f"{self.pairs_that_differ:,} of {self.size**2:,} pairs differ; "
            f"{self.moved_tokens:,} of {self.size:,} tokens at other positions"
        )


Picture = MaskPicture | MaskDifference


def strategy_title(strategy: Strategy) -> str:
    """Format a strategy with its parameters, such as ``prefix_segment (positions=restart)``."""
    values = strategy.parameter_values()
    listed = ", ".join(f"{name}={value}" for name, value in values.items())
    return f"{strategy.name} ({listed})" if listed else strategy.name


def draw_mask(strategy: Strategy, shown: ShownRequest, tile: int = TILE) -> MaskPicture:
    """Build the mask of a request, including the queries of generated tokens.

    Layout, buffers and mask are made as in the engine: prompt tokens are loaded into a
    `LayoutBatch`, and the slots after them opened as fusion tail.

    Args:
        strategy: The mask strategy.
        shown: The request.
        tile: Tokens along a side of a tile.

    Raises:
        MaskError: If the strategy's mask_mod breaks a rule of FlexAttention.
    """
    tokens, mask_mod = _masked_tokens(strategy, shown)
    return MaskPicture(
        strategy_title(strategy), tokens, TileMask.build(mask_mod, len(tokens), tile)
    )


def draw_difference(
    first: Strategy, second: Strategy, shown: ShownRequest, tile: int = TILE
) -> MaskDifference:
    """Build the difference of two strategies on a request; arguments as for `draw_mask`.

    Raises:
        OptionError: If a strategy arranges tokens by their ids, so that its tokens cannot be
            matched with those of the other.
        MaskError: If a mask_mod breaks a rule of FlexAttention.
    """
    masks = []
    for strategy in (first, second):
        tokens, mask_mod = _masked_tokens(strategy, shown)
        if not tokens.origins:
            raise OptionError(
                f"{strategy.name} arranges tokens by their ids, so its mask cannot be compared "
                "token by token; draw both side by side"
            )
        masks.append((tokens, _over_request(mask_mod, tokens)))
    (first_tokens, one), (second_tokens, other) = masks
    tokens = _each_once(first_tokens, shown)
    positions = zip(_positions(first_tokens), _positions(second_tokens), strict=True)

    def build(mask_mod: MaskMod) -> TileMask:
        return TileMask.build(mask_mod, len(tokens), tile)

    return MaskDifference(
        first_title=strategy_title(first),
        second_title=strategy_title(second),
        tokens=tokens,
        both=build(and_masks(one, other)),
        only_first=build(and_masks(one, _negated(other))),
        only_second=build(and_masks(other, _negated(one))),
        moved_tokens=sum(before != after for before, after in positions),
    )


def cell_side(size: int, tile: int, max_tokens: int, max_cells: int) -> int:
    """Choose the side of a cell in tokens.

    It is 1 for few tokens; otherwise one tile, or as many tiles as keep the number of cells along
    an axis within ``max_cells``.

    Args:
        size: Number of tokens to draw.
        tile: Tokens along a side of a tile.
        max_tokens: Most tokens that are drawn one by one.
        max_cells: Most cells along an axis otherwise.
    """
    if size <= max_tokens:
        return 1
    return tile * math.ceil(math.ceil(size / tile) / max_cells)


def _masked_tokens(strategy: Strategy, shown: ShownRequest) -> tuple[DrawnTokens, MaskMod]:
    layout = strategy.layout(shown.tokens)
    batch = LayoutBatch(1, len(layout) + shown.new_tokens, torch.device("cpu"))
    batch.load([layout], [len(layout)], [0])
    batch.open_tail([len(layout)])
    tokens = DrawnTokens.of_request(strategy, layout, shown)
    return tokens, strategy_mask(strategy, batch)


def _over_request(mask_mod: MaskMod, tokens: DrawnTokens) -> MaskMod:
    """Turn a mask over slots into one over the request's tokens."""
    copies = _copies(tokens.origins)

    def seen_by_copy(q_copy: Tensor, kv_copy: Tensor) -> MaskMod:
        def seen(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
            return mask_mod(b, h, q_copy[q_idx], kv_copy[kv_idx])

        return seen

    return or_masks(*(seen_by_copy(q, kv) for q in copies for kv in copies))


def _copies(origins: Sequence[int]) -> list[Tensor]:
    """Return the slots of all first copies, of all second ones, …; a missing copy is the last."""
    slots: list[list[int]] = [[] for _ in range(max(origins) + 1)]
    for slot, origin in enumerate(origins):
        slots[origin].append(slot)
    most = max(map(len, slots))
    return [torch.tensor([each[min(n, len(each) - 1)] for each in slots]) for n in range(most)]


def _positions(tokens: DrawnTokens) -> list[set[int]]:
    """Return the positions of the copies of each token of the request."""
    positions: list[set[int]] = [set() for _ in range(max(tokens.origins) + 1)]
    for origin, position in zip(tokens.origins, tokens.position_ids, strict=True):
        positions[origin].add(position)
    return positions


def _negated(mask_mod: MaskMod) -> MaskMod:
    def negated(b: Tensor, h: Tensor, q_idx: Tensor, kv_idx: Tensor) -> Tensor:
        return ~mask_mod(b, h, q_idx, kv_idx)

    return negated


def _each_once(tokens: DrawnTokens, shown: ShownRequest) -> DrawnTokens:
    """Return the request's tokens in its order, with the texts and positions of first copies."""
    first_slot: dict[int, int] = {}
    for slot, origin in enumerate(tokens.origins):
        first_slot.setdefault(origin, slot)
    slots = [first_slot[origin] for origin in range(len(first_slot))]
    parts = (shown.tokens.prefix, *shown.tokens.segments)
    segment_ids = [number for number, part in enumerate(parts) for _ in part]
    tail = len(shown.tokens.tail) + shown.new_tokens
    return DrawnTokens(
        segment_ids=(*segment_ids, *(tokens.segment_ids[-1],) * tail),
        position_ids=tuple(tokens.position_ids[slot] for slot in slots),
        prompt_tokens=len(slots) - shown.new_tokens,
        texts=tuple(tokens.texts[slot] for slot in slots) if tokens.texts else (),
        origins=tuple(range(len(slots))),
    )
