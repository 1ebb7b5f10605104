"""Counts and times of a run of the engine."""

from __future__ import annotations

from dataclasses import dataclass, fields

_LARGEST = ("batch_size", "capacity", "prefill_peak_bytes", "decode_peak_bytes")


@dataclass(frozen=True)
class RunStats:
    """Counts and times of a run so far.

    Attributes:
        batch_size: Batch rows: prompts that run together.
        capacity: Slots of the key-value cache per prompt.
        generations: Generations finished.
        prompt_tokens: Slots of their prompts, copies of the prefix included.
        computed_tokens: Prompt tokens that prefill computed.
        copied_tokens: Prompt tokens whose keys and values were copied, or computed once for
            several prompts.
        cached_spans: Spans whose keys and values the store had (`KVCacheOptions`).
        kept_spans: Spans that were computed and given to the store.
        generated_tokens: Tokens of the generations; a token that several prompts share counts
            once.
        prefills: Times that prompts were started together in free rows.
        decode_steps: Decode steps.
        row_steps: Batch rows of these steps, summed.
        used_row_steps: Those of them that held an unfinished prompt.
        keys_read: Tokens whose keys and values these steps read; those of a prefix that all
            prompts share count once a step where the kernel reads them once.
        prefill_s: Seconds in prefill, compilation included.
        decode_s: Seconds in decode, compilation included.
        first_token_s: Seconds from the start of each prefill until the first tokens of its prompts
            reached the host, summed.
        compilations: Graphs compiled in the run.
        warm_compilations: Graphs compiled after some prompts had finished.
        cold_groups: Unfinished prompt groups that were in flight when a graph was compiled, or
            were the first ones. Their times say little about those of others.
        mask_hits: BlockMasks found in the cache.
        mask_misses: BlockMasks built.
        prefill_peak_bytes: Most device memory in use during prefill; 0 on CPU.
        decode_peak_bytes: Most device memory in use during decode; 0 on CPU.
        halvings: Times that batches were halved because memory ran out.
    """

    batch_size: int
    capacity: int
    generations: int = 0
    prompt_tokens: int = 0
    computed_tokens: int = 0
    copied_tokens: int = 0
    cached_spans: int = 0
    kept_spans: int = 0
    generated_tokens: int = 0
    prefills: int = 0
    decode_steps: int = 0
    row_steps: int = 0
    used_row_steps: int = 0
    keys_read: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    first_token_s: float = 0.0
    compilations: int = 0
    warm_compilations: int = 0
    cold_groups: int = 0
    mask_hits: int = 0
    mask_misses: int = 0
    prefill_peak_bytes: int = 0
    decode_peak_bytes: int = 0
    halvings: int = 0

    def plus(self, other: RunStats) -> RunStats:
        """Return counts and times of two runs together; sizes and peaks are the larger ones."""
        return RunStats(
            **{
                each.name: max(mine, theirs) if each.name in _LARGEST else mine + theirs
                for each in fields(self)
                for mine, theirs in [(getattr(self, each.name), getattr(other, each.name))]
            }
        )

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second of prefill and decode."""
        seconds = self.prefill_s + self.decode_s
        return self.generated_tokens / seconds if seconds else 0.0

    @property
    def row_utilization(self) -> float:
        """Mean share of the batch rows that held an unfinished prompt, over all decode steps."""
        return self.used_row_steps / self.row_steps if self.row_steps else 0.0
