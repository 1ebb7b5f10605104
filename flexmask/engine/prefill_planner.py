"""Plans prefills on the host: what to compute, what to copy, and what to keep."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from flexmask.block_mask.equality import rows_are_causal
from flexmask.engine.prefill_kernel import BLOCK_SIZE, whole_tiles
from flexmask.engine.prefill_plan import DecodeKernel, KeptSpan, PrefillPlan, SpanCopy
from flexmask.engine.prefix_cache import CachedPrefix
from flexmask.engine.prompt_spans import SpanFinder
from flexmask.engine.proof_cache import ProofCache
from flexmask.engine.span_sharing import PromptSpans, divide, known_spans
from flexmask.engine.stream_planner import StreamPlanner
from flexmask.errors import LayoutError
from flexmask.kernels.decode_attention import KeyTable
from flexmask.kv_store.span_values import SpanValues
from flexmask.layout import Layout
from flexmask.layout_batch import LayoutBatch, LayoutTables, layout_tables
from flexmask.mask_mods import layer_masks
from flexmask.strategy import Strategy

if TYPE_CHECKING:
    from flexmask.kv_store.store import KVStore

CPU = torch.device("cpu")

MOST_FORESEEN = 4096
"""Foreseen prompts that are remembered until they are planned."""

Found = dict[tuple[int, int], SpanValues]
"""Keys and values from a store, by the index of a prompt and of a span of it."""


class PrefillPlanner:
    """Plans prefills for one strategy and one size of batches; the model runner makes it.

    It works on the host, without the device, which computes other prompts meanwhile. What it finds
    out about a prompt's mask is remembered by the content of the layout.
    """

    def __init__(
        self,
        strategy: Strategy,
        batch_size: int,
        capacity: int,
        windows: Mapping[str, int | None],
        streams: StreamPlanner,
        *,
        with_key_table: bool,
        turns_keys: bool,
    ) -> None:
        """Store what plans depend on.

        Args:
            strategy: The mask strategy.
            batch_size: Batch rows.
            capacity: Slots per row, a multiple of `BLOCK_SIZE`.
            windows: Sliding window of each kind of layer, in tokens; None for no window.
            streams: Lays out the tokens to compute, for the same strategy and size.
            with_key_table: Let decoding read keys through a table.
            turns_keys: True if keys can be turned to other positions; else spans are reused at
                their own position only.
        """
        self._strategy = strategy
        self._batch_size = batch_size
        self._capacity = capacity
        self._windows = windows
        self._with_key_table = with_key_table
        self._turns_keys = turns_keys
        self._changes_scores = strategy.changes_scores(LayoutBatch(1, 1, CPU))
        self._streams = streams
        self._spans = SpanFinder(strategy)
        self._row_proofs = ProofCache()
        self._foreseen: dict[int, PromptSpans] = {}

    def plan(
        self,
        prompts: Mapping[int, Layout],
        prefix: CachedPrefix | None = None,
        store: KVStore | None = None,
        max_new_tokens: int | None = None,
    ) -> PrefillPlan:
        """Plan to compute all tokens of prompts but the last.

        Args:
            prompts: The layout of each prompt, by batch row.
            prefix: A prefix that is copied where prompts hold it.
            store: Keys and values of spans, which are copied where prompts hold them; spans that
                it does not have are kept in it.
            max_new_tokens: Most tokens to be decoded; None for all that fit.

        Raises:
            LayoutError: If a prompt is a single token, or leaves no room in the cache.
        """
        for layout in prompts.values():
            if len(layout) < 2:
                raise LayoutError("a prompt needs at least two tokens")
            if len(layout) >= self._capacity:
                raise LayoutError(
                    f"a prompt of {len(layout)} tokens needs a larger capacity, got "
                    f"{self._capacity}"
                )
        return self._plan(self._known(prompts), prefix, store, max_new_tokens or self._capacity)

    def plan_whole(
        self,
        prompts: Mapping[int, Layout],
        prefix: CachedPrefix | None = None,
        store: KVStore | None = None,
    ) -> PrefillPlan:
        """Plan to compute all tokens of prompts, after which nothing is decoded.

        Tokens of the fusion tail have a place in the stream that is computed: their own, or that
        of an equal token that sees the same. Only a prefix may hold some of it, and is copied.

        Args:
            prompts: The layout of each prompt, by batch row, shorter than the capacity.
            prefix: A prefix that is copied where prompts hold it.
            store: As for `plan`.
        """
        whole = [replace(prompt, count=len(prompt.layout)) for prompt in self._known(prompts)]
        return self._plan(whole, prefix, store, 0)

    def plan_spans(self, prompts: Sequence[PromptSpans], store: KVStore) -> PrefillPlan:
        """Plan to compute the spans that prompts want, and to keep them in a store.

        Of what these spans see, the store's keys and values are copied. Nothing else of the
        prompts is computed, and nothing is decoded.

        Args:
            prompts: The prompts with their batch rows, shorter than the capacity.
            store: Keys and values of spans.
        """
        return self._plan(prompts, None, store, 0)

    def plan_prefix(
        self, layout: Layout, length: int, store: KVStore | None = None
    ) -> PrefillPlan | None:
        """Plan to compute the first ``length`` tokens of a prompt in row 0.

        Args:
            layout: The prompt.
            length: Number of tokens.
            store: Keys and values of spans, which are copied; those that it does not have are
                kept in it.

        Returns:
            None if they are not proved to see only themselves.
        """
        (prompt,) = self._known({0: layout})
        if not prompt.is_closed(0, length):
            return None
        whole = sum(span.stop <= length for span in prompt.spans)
        beginning = replace(
            prompt,
            count=length,
            spans=prompt.spans[:whole],
            identities=prompt.identities[:whole],
        )
        return self._plan([beginning], None, store, 1)

    def foresee(self, layouts: Sequence[Layout], max_new_tokens: int) -> None:
        """Find out about prompts what their plan will need, and remember it."""
        if len(self._foreseen) > MOST_FORESEEN:
            self._foreseen.clear()
        prompts = self._known(dict(enumerate(layouts)))
        self._foreseen.update((id(prompt.layout), prompt) for prompt in prompts)
        self._decode_kernels(prompts, max_new_tokens)

    def _known(self, prompts: Mapping[int, Layout]) -> list[PromptSpans]:
        """Find the spans of prompts in batch rows; those of foreseen prompts are there already."""
        known = {
            row: replace(self._foreseen[id(layout)], row=row)
            for row, layout in prompts.items()
            if id(layout) in self._foreseen
        }
        for prompt in known.values():
            self._foreseen.pop(id(prompt.layout), None)
        new = {row: layout for row, layout in prompts.items() if row not in known}
        found = known_spans(self._spans, new, at_own_position=not self._turns_keys)
        known.update((prompt.row, prompt) for prompt in found)
        return [known[row] for row in prompts]

    def _plan(
        self,
        prompts: Sequence[PromptSpans],
        prefix: CachedPrefix | None,
        store: KVStore | None,
        max_new_tokens: int,
    ) -> PrefillPlan:
        starts = [_starts_of(prefix, prompt) for prompt in prompts]
        length = 0 if prefix is None else len(prefix.token_ids)
        found = {} if store is None else _found_in(store, prompts)
        copied = [
            [(start, start + length) for start in own]
            + [(s.start, s.stop) for i, s in enumerate(prompt.spans) if (number, i) in found]
            + prompt.left_out
            for number, (prompt, own) in enumerate(zip(prompts, starts, strict=True))
        ]
        parts = divide(prompts, copied)
        computed = sum(len(part.slots) for part in parts)
        counts = [prompt.count for prompt in prompts]
        left_out = sum(stop - start for prompt in prompts for start, stop in prompt.left_out)
        return PrefillPlan(
            rows=tuple(prompt.row for prompt in prompts),
            counts=tuple(counts),
            tables=self._tables(prompts),
            inputs=self._streams.inputs(prompts, parts) if computed else None,
            copies=self._copies(prompts, prefix, starts, found),
            kept=() if store is None else self._kept(prompts, found),
            stale_slots=self._stale_slots(prompts, max_new_tokens),
            decode_kernels=self._decode_kernels(prompts, max_new_tokens),
            key_table=self._key_table(starts, length),
            computed_tokens=computed,
            copied_tokens=sum(counts) - computed - left_out,
            cached_spans=len(found),
        )

    def _tables(self, prompts: Sequence[PromptSpans]) -> LayoutTables:
        layouts = [prompt.layout for prompt in prompts]
        counts = [prompt.count for prompt in prompts]
        size = len(prompts)
        return layout_tables(layouts, counts, [0] * size, size, self._capacity)

    def _stale_slots(self, prompts: Sequence[PromptSpans], max_new_tokens: int) -> Tensor:
        stale = []
        for prompt in prompts:
            end = min(self._capacity, whole_tiles(prompt.count + max_new_tokens, BLOCK_SIZE))
            for start, stop in (*prompt.left_out, (prompt.count, end)):
                stale.append(np.arange(start, stop) + prompt.row * self._capacity)
        return torch.from_numpy(np.concatenate(stale))

    def _copies(
        self,
        prompts: Sequence[PromptSpans],
        prefix: CachedPrefix | None,
        prefix_starts: Sequence[Sequence[int]],
        found: Found,
    ) -> tuple[SpanCopy, ...]:
        """List what is copied: the prefix, and each span to all places at one position."""
        copies = []
        if prefix is not None and any(prefix_starts):
            first_slots = [
                prompt.row * self._capacity + start
                for prompt, own in zip(prompts, prefix_starts, strict=True)
                for start in own
            ]
            copies.append(SpanCopy(prefix.values, tuple(first_slots), 0, 0))
        places: dict[tuple[int, int], list[int]] = {}
        values_of = {}
        for (number, index), values in found.items():
            prompt = prompts[number]
            span = prompt.spans[index]
            key = id(values), prompt.first_position(span)
            values_of[key] = values
            places.setdefault(key, []).append(prompt.row * self._capacity + span.start)
        for key, slots in places.items():
            values = values_of[key]
            assert values.first_position is not None
            copies.append(SpanCopy(values.groups, tuple(slots), values.first_position, key[1]))
        return tuple(copies)

    def _kept(self, prompts: Sequence[PromptSpans], found: Found) -> tuple[KeptSpan, ...]:
        """List the spans that the store gets: those of documents and prefixes, each once."""
        kept: dict[bytes, KeptSpan] = {}
        for number, prompt in enumerate(prompts):
            for index in prompt.needed:
                span, identity = prompt.spans[index], prompt.identities[index]
                has_it = (number, index) in found or index in prompt.stored
                if prompt.is_storable(index) and not has_it:
                    kept[identity] = KeptSpan(
                        identity,
                        prompt.row * self._capacity + span.start,
                        span.stop - span.start,
                        prompt.first_position(span),
                    )
        return tuple(kept.values())

    def _decode_kernels(
        self, prompts: Sequence[PromptSpans], max_new_tokens: int
    ) -> dict[str, DecodeKernel]:
        """Choose the kernel that decodes rows, by kind of layer.

        ``decode_attention`` serves rows that see every slot before them. It is chosen where the
        mask is proved to be causal for the slots of the fusion tail.
        """
        kernels: dict[str, DecodeKernel] = dict.fromkeys(self._windows, "flex_attention")
        if self._changes_scores or not max_new_tokens:
            return kernels
        for kind, window in self._windows.items():

            def prove(
                some: Sequence[PromptSpans], kind: str = kind, window: int | None = window
            ) -> list[bool]:
                return self._see_all_before(some, {kind: window}, max_new_tokens)

            claims = [
                (kind, prompt.layout.digest, prompt.count, max_new_tokens) for prompt in prompts
            ]
            if all(self._row_proofs.of(claims, prompts, prove)):
                kernels[kind] = "decode_attention"
        return kernels

    def _see_all_before(
        self,
        prompts: Sequence[PromptSpans],
        windows: Mapping[str, int | None],
        max_new_tokens: int,
    ) -> list[bool]:
        """Prove for prompts that each token of the tail sees every slot before it."""
        counts = [prompt.count for prompt in prompts]
        size = len(prompts)
        layouts = [prompt.layout for prompt in prompts]
        longest = max(map(len, layouts))
        capacity = max(longest, min(self._capacity, max(counts) + max_new_tokens))
        batch = LayoutBatch(size, capacity, CPU)
        batch.load(layouts, counts, [0] * size)
        batch.open_tail(counts)
        (mask_mod,) = layer_masks(self._strategy, batch, windows).values()
        first_slots = torch.tensor(counts)
        most = min(max_new_tokens, capacity - min(counts))
        proved: list[bool] = rows_are_causal(
            mask_mod, torch.arange(size), first_slots, most, capacity
        ).tolist()
        return proved

    def _key_table(self, starts: Sequence[Sequence[int]], length: int) -> KeyTable | None:
        """List the key slots of each row: one copy of the cached prefix, then all other slots.

        The spare row behind all others holds the prefix for all rows, from slot 0 on.

        Example:
            With a prefix of 2 tokens at slots 0 and 3 of a row of 6 tokens: slots 0 1 2 5 6 7 …
        """
        if not self._with_key_table:
            return None
        key_slots = np.tile(np.arange(self._capacity, dtype=np.int32), (len(starts), 1))
        sharing = np.zeros((len(starts), 3), np.int32)
        for index, own in enumerate(starts):
            if own:
                is_own = np.ones(self._capacity, bool)
                for start in own:
                    is_own[start : start + length] = False
                keys = np.flatnonzero(is_own)
                key_slots[index, length : length + len(keys)] = keys
                sharing[index] = self._batch_size, length, len(own)
        return KeyTable(torch.from_numpy(key_slots), torch.from_numpy(sharing))


def _starts_of(prefix: CachedPrefix | None, prompt: PromptSpans) -> list[int]:
    """Return the first slots of the copies of a prefix in a prompt.

    Returns:
        Nothing if one of them is not proved to see only itself.
    """
    if prefix is None:
        return []
    starts, length = prefix.starts_in(prompt.layout), len(prefix.token_ids)
    return starts if all(prompt.is_closed(start, length) for start in starts) else []


def _found_in(store: KVStore, prompts: Sequence[PromptSpans]) -> Found:
    """Get keys and values of spans from a store, each once."""
    asked = {
        (number, index): prompt.identities[index]
        for number, prompt in enumerate(prompts)
        for index in prompt.needed
        if prompt.is_storable(index) and index not in (prompt.wanted or ())
    }
    values = store.get_all(asked.values())
    return {place: values[one] for place, one in asked.items() if one in values}
