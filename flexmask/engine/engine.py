"""The engine: batches of requests through a model, under a mask strategy."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Self

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flexmask.block_mask.cache import BlockMaskCache
from flexmask.engine.decode_loop import DecodeLoop
from flexmask.engine.loading import load_model, resolve_device, resolve_dtype
from flexmask.engine.model_runner import ModelRunner, bucketed_capacity, compilations
from flexmask.engine.prefix_reuse import pays_off, shared_beginning
from flexmask.engine.sampling import Sampling
from flexmask.errors import ModelError, OptionError, RequestError
from flexmask.generation import FinishReason, Generation
from flexmask.layout import Layout
from flexmask.registry import make_strategy
from flexmask.request import Request
from flexmask.strategy import Strategy
from flexmask.tokenization import RequestTokenizer

MAX_AUTO_BATCH_SIZE = 128
CPU_AUTO_BATCH_SIZE = 8


@dataclass(frozen=True)
class RunStats:
    """What a run has done so far.

    Attributes:
        rows: Requests finished.
        prompt_tokens: Slots of their prompts, copies of the prefix counted.
        computed_tokens: Those that prefill computed; the others begin as all prompts do, and
            were copied.
        generated_tokens: Tokens generated for them.
        prefill_s: Seconds in prefill, compilation included.
        decode_s: Seconds in decode, compilation included.
        compilations: Graphs compiled in the run.
        warm_compilations: Those of them compiled after the first batch.
        mask_hits: BlockMasks found in the cache.
        mask_misses: BlockMasks built.
        prefill_peak_bytes: Most device memory in use during prefill; 0 on CPU.
        decode_peak_bytes: The same during decode.
        batch_size: Rows that run together.
        capacity: Slots of the key-value cache per row.
    """

    batch_size: int
    capacity: int
    rows: int = 0
    prompt_tokens: int = 0
    computed_tokens: int = 0
    generated_tokens: int = 0
    prefill_s: float = 0.0
    decode_s: float = 0.0
    compilations: int = 0
    warm_compilations: int = 0
    mask_hits: int = 0
    mask_misses: int = 0
    prefill_peak_bytes: int = 0
    decode_peak_bytes: int = 0

    @property
    def tokens_per_s(self) -> float:
        """Generated tokens per second of prefill and decode."""
        seconds = self.prefill_s + self.decode_s
        return self.generated_tokens / seconds if seconds else 0.0


@dataclass(frozen=True)
class _Prompt:
    request: Request
    layout: Layout


@dataclass(frozen=True)
class _Options:
    max_new_tokens: int
    sampling: Sampling
    stop: tuple[str, ...]


class Engine:
    """Generates under mask strategies with one model."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Wrap a model loaded with ``attn_implementation="flexmask"``.

        Raises:
            AttentionError: If the model does not attend through flexmask.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.mask_cache = BlockMaskCache()
        self.runner = ModelRunner(model, self.mask_cache)
        self._loop_key: object = None

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        device: str = "auto",
        dtype: str = "auto",
        trust_remote_code: bool = False,
    ) -> Self:
        """Load a model by hub id or folder.

        Args:
            model: Hub id or folder; weights load from safetensors only.
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
            dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
            trust_remote_code: Run code that comes with the model.

        Raises:
            OptionError: If device or dtype cannot be had.
            ModelError: If the model cannot be loaded.
        """
        target = resolve_device(device)
        loaded = load_model(
            model,
            device=target,
            dtype=resolve_dtype(dtype, target),
            trust_remote_code=trust_remote_code,
        )
        return cls(*loaded)

    def generate(
        self,
        requests: Iterable[Request],
        strategy: Strategy | str,
        *,
        max_new_tokens: int = 20,
        batch_size: int | None = None,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        chat_template: bool = False,
        on_refused: Callable[[Request, RequestError], None] | None = None,
    ) -> GenerationRun:
        """Generate for each request; results come in the order of the requests.

        All requests are tokenized and checked first; batches run as the result is iterated.

        Args:
            requests: What to generate for.
            strategy: Who sees whom: a strategy, or the name of one for its default parameters.
            max_new_tokens: Most tokens per request.
            batch_size: Rows that run together; None chooses by memory.
            sampling: How tokens are chosen; None takes the most likely.
            stop: Strings that end a row; they are left out of its text.
            chat_template: Put requests into the tokenizer's chat template.
            on_refused: Called with each request that cannot be tokenized or exceeds the model's
                context, which is then left out; None raises.

        Raises:
            RequestError: If a request is refused and there is no ``on_refused``.
            OptionError: If an option has an impossible value.
            StrategyError: If there is no strategy of that name.
        """
        if isinstance(strategy, str):
            strategy = make_strategy(strategy, {})
        if max_new_tokens < 1:
            raise OptionError(f"max_new_tokens must be positive, got {max_new_tokens}")
        if batch_size is not None and batch_size < 1:
            raise OptionError(f"batch_size must be positive, got {batch_size}")
        if any(not text for text in stop):
            raise OptionError("a stop string must not be empty")
        tokenizer = RequestTokenizer(self.tokenizer, chat_template=chat_template)
        prompts = []
        for request in requests:
            try:
                prompts.append(self._plan(request, strategy, tokenizer, max_new_tokens))
            except RequestError as error:
                if on_refused is None:
                    raise
                on_refused(request, error)
        options = _Options(max_new_tokens, sampling or Sampling(), tuple(stop))
        return GenerationRun(self, strategy, tokenizer, prompts, options, batch_size)

    def _plan(
        self,
        request: Request,
        strategy: Strategy,
        tokenizer: RequestTokenizer,
        max_new_tokens: int,
    ) -> _Prompt:
        try:
            layout = strategy.layout(tokenizer(request))
        except RequestError as error:
            raise RequestError(f"{request.label}: {error}") from None
        context = getattr(self.model.config.get_text_config(), "max_position_embeddings", None)
        needed = layout.position_ids[-1] + 1 + max_new_tokens
        if context is not None and needed > context:
            raise RequestError(
                f"{request.label}: needs positions up to {needed} ({max_new_tokens} of them for "
                f"new tokens), but the model's context is {context}; shorten the prompt"
            )
        return _Prompt(request, layout)

    def auto_batch_size(self, num_requests: int, capacity: int) -> int:
        """Choose a batch size: by free memory on a GPU, 8 on a CPU, no more than there are."""
        device = self.model.device
        largest = CPU_AUTO_BATCH_SIZE
        if device.type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            largest = min(MAX_AUTO_BATCH_SIZE, free // 2 // self.runner.bytes_per_row(capacity))
            if largest == 0:
                raise ModelError(
                    f"not enough GPU memory for one row of {capacity} slots; shorten the prompts"
                )
        return max(1, min(1 << (largest.bit_length() - 1), num_requests))

    def prepare(
        self, strategy: Strategy, batch_size: int, capacity: int, options: _Options
    ) -> DecodeLoop:
        """Make ready for batches of one size; what is there already is used again."""
        is_new = self.runner.prepare(strategy, batch_size, capacity)
        key = (options.sampling, options.max_new_tokens, self.eos_token_ids())
        if is_new or key != self._loop_key:
            self._loop_key = key
            self._loop = DecodeLoop(self.runner, *key)
        return self._loop

    def eos_token_ids(self) -> frozenset[int]:
        """Tokens that end a row: those of the generation config, else the tokenizer's."""
        config = self.model.generation_config
        ids = self.tokenizer.eos_token_id if config is None else config.eos_token_id
        if ids is None:
            ids = self.tokenizer.eos_token_id
        if ids is None:
            return frozenset()
        return frozenset([ids] if isinstance(ids, int) else ids)


class GenerationRun(Iterator[Generation]):
    """Iterates over the generations of one `Engine.generate` call, and counts."""

    def __init__(
        self,
        engine: Engine,
        strategy: Strategy,
        tokenizer: RequestTokenizer,
        prompts: Sequence[_Prompt],
        options: _Options,
        batch_size: int | None,
    ) -> None:
        """Prepare the run; the first ``next`` starts it."""
        self._engine = engine
        self._strategy = strategy
        self._tokenizer = tokenizer
        self._prompts = prompts
        self._options = options
        longest = max((len(prompt.layout) for prompt in prompts), default=1)
        capacity = bucketed_capacity(longest + options.max_new_tokens)
        rows = batch_size or engine.auto_batch_size(len(prompts), capacity)
        self.stats = RunStats(batch_size=rows, capacity=capacity)
        self._generations = self._run()

    def __next__(self) -> Generation:
        """Return the next generation in request order."""
        return next(self._generations)

    def _run(self) -> Iterator[Generation]:
        size, capacity = self.stats.batch_size, self.stats.capacity
        if not self._prompts:
            return
        cache = self._engine.mask_cache
        hits, misses, compiled = cache.stats.hits, cache.stats.misses, compilations()
        self._loop = self._engine.prepare(self._strategy, size, capacity, self._options)
        self._share_prefix()
        compiled_warm = None
        for start in range(0, len(self._prompts), size):
            generations = self._run_batch(self._prompts[start : start + size])
            if compiled_warm is None:
                compiled_warm = compilations()
            self.stats = replace(
                self.stats,
                rows=self.stats.rows + len(generations),
                prompt_tokens=self.stats.prompt_tokens + sum(g.prompt_tokens for g in generations),
                generated_tokens=self.stats.generated_tokens
                + sum(len(g.token_ids) for g in generations),
                compilations=compilations() - compiled,
                warm_compilations=compilations() - compiled_warm,
                mask_hits=cache.stats.hits - hits,
                mask_misses=cache.stats.misses - misses,
            )
            yield from generations

    def _share_prefix(self) -> None:
        """Compute what all prompts begin with once, if it stands in enough places to pay."""
        runner, started = self._engine.runner, time.perf_counter()
        runner.shared_prefix = None
        layouts = [prompt.layout for prompt in self._prompts]
        length = shared_beginning(layouts)
        if length and pays_off(layouts, length, self.stats.batch_size):
            runner.share_prefix(layouts[0], length)
            self.stats = replace(self.stats, computed_tokens=runner.computed_tokens)
        self._synchronize()
        self.stats = replace(self.stats, prefill_s=time.perf_counter() - started)

    def _run_batch(self, prompts: Sequence[_Prompt]) -> list[Generation]:
        spare = self.stats.batch_size - len(prompts)
        padded = [*prompts, *[prompts[-1]] * spare]  # a constant number of rows compiles once
        runner, started = self._engine.runner, time.perf_counter()
        with self._peak_bytes("prefill_peak_bytes"):
            runner.prefill([prompt.layout for prompt in padded])
        prefilled = time.perf_counter()
        with self._peak_bytes("decode_peak_bytes"):
            rows = self._decode(padded)[: len(prompts)]
        self.stats = replace(
            self.stats,
            computed_tokens=self.stats.computed_tokens + runner.computed_tokens,
            prefill_s=self.stats.prefill_s + prefilled - started,
            decode_s=self.stats.decode_s + time.perf_counter() - prefilled,
        )
        return [row.generation(self._tokenizer) for row in rows]

    def _decode(self, prompts: Sequence[_Prompt]) -> list[_Row]:
        options = self._options
        rows = [_Row(prompt, options, self._engine.eos_token_ids()) for prompt in prompts]
        uuids = [prompt.request.uuid for prompt in prompts]
        last = [prompt.layout.token_ids[-1] for prompt in prompts]
        for token_ids in self._loop.run(last, uuids):
            for row, token_id in zip(rows, token_ids, strict=True):
                row.append(token_id, self._tokenizer)
            if all(row.finish_reason for row in rows):
                break
        return rows

    @contextmanager
    def _peak_bytes(self, name: str) -> Iterator[None]:
        """Note the most memory in use during a phase, and wait for its end."""
        device = self._engine.model.device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
        yield
        self._synchronize()
        if device.type == "cuda":
            peak = max(getattr(self.stats, name), torch.cuda.max_memory_allocated(device))
            self.stats = replace(self.stats, **{name: peak})

    def _synchronize(self) -> None:
        if self._engine.model.device.type == "cuda":
            torch.cuda.synchronize(self._engine.model.device)


class _Row:
    """The tokens generated for one prompt, and whether they are complete."""

    def __init__(self, prompt: _Prompt, options: _Options, eos_token_ids: frozenset[int]) -> None:
        self._prompt = prompt
        self._options = options
        self._eos_token_ids = eos_token_ids
        self._token_ids: list[int] = []
        self.finish_reason: FinishReason | None = None

    def append(self, token_id: int, tokenizer: RequestTokenizer) -> None:
        if self.finish_reason:
            return
        self._token_ids.append(token_id)
        if token_id in self._eos_token_ids:
            self.finish_reason = "eos"
        elif self._stop_index(self._text(tokenizer) if self._options.stop else "") is not None:
            self.finish_reason = "stop"
        elif len(self._token_ids) == self._options.max_new_tokens:
            self.finish_reason = "length"

    def generation(self, tokenizer: RequestTokenizer) -> Generation:
        assert self.finish_reason is not None
        text = self._text(tokenizer)
        return Generation(
            request=self._prompt.request,
            text=text[: self._stop_index(text)],
            token_ids=tuple(self._token_ids),
            finish_reason=self.finish_reason,
            prompt_tokens=len(self._prompt.layout),
        )

    def _text(self, tokenizer: RequestTokenizer) -> str:
        ended = self.finish_reason == "eos"
        return tokenizer.decode(tuple(self._token_ids[:-1] if ended else self._token_ids))

    def _stop_index(self, text: str) -> int | None:
        found = [index for stop in self._options.stop if (index := text.find(stop)) >= 0]
        return min(found, default=None)
