"""The engine: generates for requests, or scores their choices, under mask strategies."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from functools import partial
from operator import attrgetter
from typing import Self

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flexmask.attention.flex_call import PrefillKernel
from flexmask.checkpoint.identity import model_files
from flexmask.device import resolve_device
from flexmask.encoding.tokenization import RequestTokenizer, load_tokenizer
from flexmask.engine.choice_prompt import ChoicePrompt, Choices, stored_choices
from flexmask.engine.executor import Executor
from flexmask.engine.generation_rules import GenerationRules
from flexmask.engine.generation_run import GenerationRun
from flexmask.engine.kept_parts import KeptParts
from flexmask.engine.leading_ranks import LeadingRanks
from flexmask.engine.model_loading import check_shards, load_model, load_shard
from flexmask.engine.model_runner import (
    MIN_CAPACITY,
    ModelRunner,
    num_embeddings,
)
from flexmask.engine.output_head import TokenScores
from flexmask.engine.precomputing import PrecomputingRun
from flexmask.engine.prompt_planner import PromptPlanner, beyond_context
from flexmask.engine.rank_group import LoadShard, device_of_ranks
from flexmask.engine.ranks import Ranks
from flexmask.engine.reuse_limits import limit_of_reuse
from flexmask.engine.run_options import RunOptions
from flexmask.engine.run_stats import RunStats
from flexmask.engine.scoring import ChoiceScorer, ScoringRun
from flexmask.engine.segment_attention import AttentionMeter
from flexmask.engine.text_stream import TextStream
from flexmask.engine.turns import TURN
from flexmask.engine.warm_up import WarmUp
from flexmask.errors import FlexMaskWarning, OptionError, RankError, RequestError
from flexmask.fusion import Fusion, check_score_fusion
from flexmask.generation import Generation
from flexmask.kv_store.options import KVCacheOptions
from flexmask.layout import TAIL, Layout, TokenizedRequest
from flexmask.limits import check_size
from flexmask.plugins.registry import make_strategy
from flexmask.request import Request, checked_requests
from flexmask.sampling import Sampling
from flexmask.strategy import Strategy

LOOKAHEAD_BATCHES = 8
"""Prompts, in batches, that are planned ahead and sorted by length together."""


class Engine:
    """Generates under mask strategies with one model.

    Several runs of one engine may be under way, in one thread or in several. They take turns with
    the model, and each gives the results that it gives alone.

    Attributes:
        ranks: The processes that hold the model.
        executor: Executes the batches of all runs.
        tokenizer: The model's tokenizer.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        prefill_kernel: PrefillKernel | None = None,
        kv_cache: KVCacheOptions | None = None,
        model_files: Mapping[str, str] | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        """Wrap a model loaded with ``attn_implementation="flexmask"``.

        Args:
            model: The model.
            tokenizer: Its tokenizer.
            prefill_kernel: The kernel that computes prompts on a GPU: ``triton`` or ``flash``,
                which needs ``flexmask[flash]``; None to choose.
            kv_cache: Where keys and values of documents and prefixes are kept, to be copied where
                they occur again; None to keep none.
            model_files: What identifies the model's files, for ``kv_cache.folder``;
                `from_pretrained` finds it.
            ranks: The processes that hold the model, of which ``model`` is then this one's shard;
                `from_pretrained` starts them. None for this process alone.

        Raises:
            AttentionError: If the model does not attend through flexmask, or the kernel is not
                available.
            KVStoreError: If the folder of the cache is another model's, or cannot be written.
            OptionError: If a folder is asked for and the files of the model are not known, or GPU
                memory and the model is on a CPU; if the cache is to be of several ranks.
        """
        self.ranks = ranks or Ranks()
        if kv_cache is not None and self.ranks.size > 1:
            raise OptionError("`kv_cache` keeps whole heads, and `tensor_parallel` divides them")
        self.executor = Executor(model, prefill_kernel, self.ranks)
        self.tokenizer = tokenizer
        self._kept = KeptParts(model)
        if kv_cache is not None:
            if kv_cache.folder is not None and not model_files:
                raise OptionError(
                    "a folder of keys and values needs model_files, which identify the model; "
                    "Engine.from_pretrained finds them"
                )
            name = str(getattr(model.config, "name_or_path", "")) or type(model).__name__
            self.runner.use_store(kv_cache, name, model_files or {})

    def close(self) -> None:
        """Write keys and values that wait for the cache's folder; end threads and other ranks.

        Raises:
            KVStoreError: If the folder could not be written.
        """
        store, self.runner.store = self.runner.store, None
        try:
            if store is not None:
                store.close()
        finally:
            if self.ranks.size > 1:
                with suppress(RankError):  # a rank has failed, which the run has told
                    self.executor.end()
                self.ranks.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @property
    def model(self) -> PreTrainedModel:
        """The model."""
        return self.executor.model

    @property
    def runner(self) -> ModelRunner:
        """Prefill and decode of the model."""
        return self.executor.runner

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        device: str = "auto",
        dtype: str = "auto",
        trust_remote_code: bool = False,
        adapter: str | None = None,
        quantize: str | None = None,
        prefill_kernel: PrefillKernel | None = None,
        kv_cache: KVCacheOptions | None = None,
        tensor_parallel: int = 1,
    ) -> Self:
        """Load a model by hub id, folder or GGUF file.

        Args:
            model: Hub id or folder, whose weights load from safetensors only; or a GGUF file,
                whose weights are unpacked (``flexmask[gguf]``).
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
            dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
            trust_remote_code: Run code that comes with the model.
            adapter: Folder of a LoRA adapter, which peft merges into the weights
                (``flexmask[adapters]``).
            quantize: ``int8`` or ``fp8``, to which the weights of linear layers are rounded at
                loading, with a scale for each row; embeddings and output head stay as they are.
            prefill_kernel: The kernel that computes prompts on a GPU, as in `Engine`.
            kv_cache: Where keys and values are kept, as in `Engine`.
            tensor_parallel: GPUs that hold the model together, or on a CPU processes. This process
                is the first; `close` ends the others.

        Raises:
            AttentionError: If the kernel is not available, or the architecture does not support
                attention backends.
            OptionError: If the device is not available, or does not support the dtype or what
                weights are rounded to; if there are fewer GPUs than ``tensor_parallel``.
            RankError: If a process of ``tensor_parallel`` fails.
            ModelError: If the model cannot be loaded, or some of its weights are missing; if the
                adapter is missing, or was made for another model; if the model is quantised
                already and is to be changed.
            CompilerError: If torch.compile finds no compiler.
            KVStoreError: If the folder of the cache is another model's, or cannot be written.
        """
        check_size("tensor_parallel", tensor_parallel, 1)
        if tensor_parallel > 1:
            if kv_cache is not None:
                raise OptionError(
                    "`kv_cache` keeps whole heads, and `tensor_parallel` divides them"
                )
            check_shards(
                model,
                tensor_parallel,
                trust_remote_code=trust_remote_code,
                adapter=adapter,
                quantize=quantize,
            )
            tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
            load = partial(
                load_shard, model=model, dtype=dtype, trust_remote_code=trust_remote_code
            )
            return cls.of_ranks(load, tokenizer, tensor_parallel, device, prefill_kernel)
        target = resolve_device(device)
        with TURN:
            loaded = load_model(
                model,
                device=target,
                dtype=dtype,
                trust_remote_code=trust_remote_code,
                adapter=adapter,
                quantize=quantize,
            )
        files = model_files(model, adapter, quantize) if kv_cache and kv_cache.folder else None
        return cls(*loaded, prefill_kernel=prefill_kernel, kv_cache=kv_cache, model_files=files)

    @classmethod
    def of_ranks(
        cls,
        load_shard: LoadShard,
        tokenizer: PreTrainedTokenizerBase,
        size: int,
        device: str = "auto",
        prefill_kernel: PrefillKernel | None = None,
    ) -> Self:
        """Start the ranks of a model, of which this process is the first.

        Args:
            load_shard: Loads the shard of a rank.
            tokenizer: The model's tokenizer.
            size: Number of ranks, at least two.
            device: ``auto``, ``cpu`` or ``cuda``.
            prefill_kernel: The kernel that computes prompts on a GPU, as in `Engine`.

        Raises:
            OptionError: If there are fewer GPUs.
            RankError: If a rank fails.
        """
        device_type = device_of_ranks(device, size)
        with TURN:
            ranks = LeadingRanks(size, device_type, load_shard, prefill_kernel)
            try:
                model = ranks.load()
                return cls(model, tokenizer, prefill_kernel=prefill_kernel, ranks=ranks)
            except BaseException:
                ranks.close()
                raise

    def generate(
        self,
        requests: Iterable[Request],
        strategy: Strategy | str,
        *,
        fusion: Fusion | str = "attention",
        max_new_tokens: int = 20,
        batch_size: int | None = None,
        sampling: Sampling | None = None,
        samples: int | None = None,
        stop: Sequence[str] = (),
        logprobs: bool = False,
        top_logprobs: int = 0,
        chat_template: bool = False,
        allow_special_tokens: bool = False,
        segment_attention: bool = False,
        answer_of: Callable[[Generation], str] = attrgetter("prediction"),
        on_refused: Callable[[Request, RequestError], None] | None = None,
    ) -> GenerationRun:
        """Generate for each request; results come in the order of the requests.

        There is one generation for each request. The fusions ``none`` and ``each`` choose
        segments of a request and generate for each of these; the generation's ``request`` then
        holds that segment alone (`Request.alone`). With several samples there is a generation for
        each, unless they vote.

        Requests are tokenized and checked some batches ahead, the first of them at once;
        batches run as the result is iterated. The model's generation config applies, except for
        sampling (`GenerationRules`).

        Args:
            requests: The requests.
            strategy: The mask strategy, or the name of one for its default parameters.
            fusion: The way the segments of a request become one generation: a `Fusion`, or the
                name of one that needs no weights.
            max_new_tokens: Most tokens per generation.
            batch_size: Prompts that run together; None chooses by memory.
            sampling: The way tokens are chosen; None takes the most likely.
            samples: Number of times that each prompt is continued; None for that of the fusion.
                The prompt is computed once if the batch has room for all samples. Sample 0 is
                what a single one would be.
            stop: Strings that end a generation; its text ends before them.
            logprobs: Keep the log-probability of each token (`Generation.logprobs`).
            top_logprobs: Keep those of this many most likely tokens too; more than 0 implies
                ``logprobs``.
            chat_template: Put requests into the tokenizer's chat template.
            allow_special_tokens: Read the text of a special token in a request, such as
                ``<eos>``, as that token, which may end a turn. By default it is tokenized as
                plain text, and a warning counts the requests that hold some.
            segment_attention: Measure which parts of the prompt generated tokens attend to
                (`Generation.segment_attention`). It computes prompts again, and is no option of
                fused logits, where a token comes from several prompts.
            answer_of: Returns the answer in a generation, which the fusion ``vote`` counts.
            on_refused: Called with each request that cannot be tokenized, exceeds the model's
                context or gets logits that are NaN or infinite. Such a request is left out of the
                results. None raises.

        Raises:
            RequestError: If a request is refused and there is no ``on_refused``.
            ModelError: If the model's generation config cannot be applied, or a chat template is
                asked for and the tokenizer has none that can be used.
            OptionError: If an option has an impossible value.
            StrategyError: If there is no strategy of that name.
            TypeError: If requests, stop or sampling are of another type.
        """
        if isinstance(strategy, str):
            strategy = make_strategy(strategy, {})
        if isinstance(fusion, str):
            fusion = Fusion(fusion)
        check_size("max_new_tokens", max_new_tokens, 1)
        if batch_size is not None:
            check_size("batch_size", batch_size, 1)
        check_size("top_logprobs", top_logprobs, 0)
        vocabulary = num_embeddings(self.model)
        if top_logprobs > vocabulary:
            raise OptionError(
                f"top_logprobs must be at most the model's {vocabulary} tokens, got {top_logprobs}"
            )
        requests = checked_requests(requests)
        if isinstance(stop, str):
            raise TypeError(
                f"stop must be a list of texts, got the text {stop!r}; put it into one"
            )
        if not isinstance(sampling, Sampling | None):
            raise TypeError(
                f"sampling must be a Sampling, got {sampling!r}; write Sampling(temperature=…)"
            )
        if any(not text for text in stop):
            raise OptionError("a stop string must not be empty")
        sampling = sampling or Sampling()
        if samples is not None:
            fusion = replace(fusion, samples=samples)
        fusion.check_samples(is_greedy=sampling.is_greedy)
        if segment_attention:
            fusion.check_one_prompt()
            if self.ranks.size > 1:
                raise OptionError(
                    "`segment_attention` looks at all heads, and `tensor_parallel` divides them"
                )
        tokenizer = self._request_tokenizer(chat_template, allow_special_tokens)
        planner = PromptPlanner(
            strategy, tokenizer, max_new_tokens, self.runner.context, fusion, batch_size,
            on_refused,
        )  # fmt: skip
        lookaheads = planner.lookaheads(requests, self._lookahead_size(batch_size))
        rules = self.generation_rules()
        all_stops = (*stop, *rules.stop_strings)
        options = RunOptions(
            max_new_tokens, rules, sampling, all_stops, fusion, answer_of,
            top_logprobs if logprobs or top_logprobs else None,
        )  # fmt: skip
        meter = AttentionMeter(self.executor, strategy) if segment_attention else None
        return GenerationRun(
            self.executor, strategy, tokenizer, lookaheads, options, batch_size, on_refused, meter
        )

    def stream(
        self,
        request: Request,
        strategy: Strategy | str,
        *,
        fusion: Fusion | str = "attention",
        max_new_tokens: int = 20,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        logprobs: bool = False,
        top_logprobs: int = 0,
        chat_template: bool = False,
        allow_special_tokens: bool = False,
    ) -> TextStream:
        """Generate for one request, and yield its text in pieces as tokens are read.

        Example::

            for piece in engine.stream(request, "causal", max_new_tokens=200):
                print(piece, end="", flush=True)

        Args:
            request: The request.
            strategy: As for `generate`, like all that follows.
            fusion: One that makes a single generation from the first token on: not ``each``, a
                vote or several samples.
            max_new_tokens: Most tokens.
            sampling: The way tokens are chosen.
            stop: Strings that end the text.
            logprobs: Keep the log-probability of each token.
            top_logprobs: Keep those of this many most likely tokens too.
            chat_template: Put the request into the tokenizer's chat template.
            allow_special_tokens: Read the text of a special token as that token.

        Returns:
            An iterator of texts that are whole characters; joined, they are the text of its
            ``generation``, which is there after the last.

        Raises:
            OptionError: If the fusion makes several generations.
            FlexMaskError: As `generate`.
        """
        if isinstance(fusion, str):
            fusion = Fusion(fusion)
        if not fusion.is_single:
            raise OptionError(
                f"fusion {str(fusion)!r} makes several generations; stream another fusion"
            )
        if not isinstance(request, Request):
            raise TypeError(f"request must be a Request, got {request!r:.60}")
        run = self.generate(
            [request],
            strategy,
            fusion=fusion,
            max_new_tokens=max_new_tokens,
            sampling=sampling,
            stop=stop,
            logprobs=logprobs,
            top_logprobs=top_logprobs,
            chat_template=chat_template,
            allow_special_tokens=allow_special_tokens,
        )
        tokenizer = self._request_tokenizer(chat_template, allow_special_tokens)
        return TextStream(run, tokenizer, (*stop, *run.rules.stop_strings))

    def score(
        self,
        requests: Iterable[Request],
        strategy: Strategy | str,
        *,
        fusion: Fusion | str = "attention",
        batch_size: int | None = None,
        chat_template: bool = False,
        allow_special_tokens: bool = False,
        on_refused: Callable[[Request, RequestError], None] | None = None,
    ) -> ScoringRun:
        """Score the choices of each request; results come in the order of the requests.

        A request and its choices are one prompt: every choice continues it, at the positions after
        it, and sees of it what generated tokens would see; choices do not see each other.

        Args:
            requests: The requests, each with at least two choices.
            strategy: The mask strategy, or the name of one for its default parameters.
            fusion: The way the segments of a request become one score, one of `SCORE_FUSIONS`:
                ``attention``, ``none`` and ``each`` as in `generate`; ``mean`` and ``mean_prob``
                fuse the scores of the segments (`flexmask.choice_scores.fused_scores`).
            batch_size: Prompts that run together; None chooses by memory.
            chat_template: Put requests into the tokenizer's chat template.
            allow_special_tokens: As in `generate`.
            on_refused: As in `generate`.

        Raises:
            RequestError: If a request is refused and there is no ``on_refused``.
            ModelError: If a chat template is asked for and the tokenizer has none that can be
                used.
            OptionError: If an option has an impossible value.
            StrategyError: If there is no strategy of that name.
            TypeError: If requests are of another type.
        """
        if isinstance(strategy, str):
            strategy = make_strategy(strategy, {})
        if isinstance(fusion, str):
            fusion = Fusion(fusion)
        check_score_fusion(fusion)
        if batch_size is not None:
            check_size("batch_size", batch_size, 1)
        requests = checked_requests(requests)
        tokenizer = self._request_tokenizer(chat_template, allow_special_tokens)
        planner = PromptPlanner(
            strategy, tokenizer, 0, self.runner.context, fusion, None, on_refused,
            scores_choices=True,
        )  # fmt: skip
        lookaheads = planner.lookaheads(requests, self._lookahead_size(batch_size))
        scorer = ChoiceScorer(self.executor, strategy, batch_size)
        return ScoringRun(scorer, lookaheads, fusion, on_refused)

    def score_tokens(
        self,
        prompts: Sequence[tuple[TokenizedRequest, Choices]],
        strategy: Strategy,
        *,
        batch_size: int | None = None,
    ) -> Iterator[tuple[int, list[TokenScores]]]:
        """Score choices of prompts that are tokenized already; what `score` does with texts.

        Args:
            prompts: Each prompt with the tokens of its choices: at least one of each. A prompt
                that is a fusion tail alone is causal.
            strategy: The mask strategy.
            batch_size: Prompts that run together; None chooses by memory.

        Yields:
            The index of a prompt, and the scores of the tokens of each of its choices; long
            prompts first.

        Raises:
            RequestError: If a prompt cannot be laid out, or exceeds the model's context.
        """
        made = []
        for number, (tokenized, choices) in enumerate(prompts):
            if tokenized.prefix or tokenized.segments:
                layout = strategy.layout(tokenized)
            else:
                count = len(tokenized.tail)
                layout = Layout(tokenized.tail, (TAIL,) * count, tuple(range(count)))
            added = max(map(len, choices)) - 1
            context = self.runner.context
            if excess := beyond_context(layout, added, context, "the longest choice"):
                raise RequestError(f"prompt {number}: {excess}; shorten the prompt")
            made.append(ChoicePrompt(layout.with_choices(stored_choices(choices)), choices))
        for batch in ChoiceScorer(self.executor, strategy, batch_size).results(made):
            yield from batch

    def precompute(
        self,
        requests: Iterable[Request],
        strategy: Strategy | str,
        *,
        batch_size: int | None = None,
        chat_template: bool = False,
        allow_special_tokens: bool = False,
        on_refused: Callable[[Request, RequestError], None] | None = None,
    ) -> PrecomputingRun:
        """Compute the keys and values of documents and prefixes that the cache does not have.

        Spans are those of the prompts that `generate` makes of the requests. A request of one
        segment is a document for other prompts: it has the tokens that the segment has among
        several, all of them. Nothing else of a prompt is computed, and no token is generated.

        Which spans are computed together follows from the requests, so that a run that was killed
        is resumed to the bytes of an undisturbed one (docs/kv-cache.md).

        Args:
            requests: The requests.
            strategy: The mask strategy, or the name of one for its default parameters.
            batch_size: Prompts that run together; None chooses by memory.
            chat_template: Put requests into the tokenizer's chat template.
            allow_special_tokens: As in `generate`.
            on_refused: As in `generate`.

        Returns:
            An iterator of the requests in their order, once their spans are computed; its
            ``stats`` count spans.

        Raises:
            RequestError: If a request is refused and there is no ``on_refused``.
            ModelError: If a chat template is asked for and the tokenizer has none that can be
                used.
            OptionError: If the engine has no ``kv_cache``, or the batch size is impossible.
            StrategyError: If there is no strategy of that name, or nothing can be reused under it.
            TypeError: If requests are of another type.
        """
        if isinstance(strategy, str):
            strategy = make_strategy(strategy, {})
        if batch_size is not None:
            check_size("batch_size", batch_size, 1)
        store = self.runner.store
        if store is None:
            raise OptionError("precompute needs an engine with a kv_cache")
        if limit := limit_of_reuse(strategy):
            warnings.warn(limit, FlexMaskWarning, stacklevel=2)
        requests = checked_requests(requests)
        tokenizer = self._request_tokenizer(chat_template, allow_special_tokens)
        planner = PromptPlanner(
            strategy, tokenizer, 0, self.runner.context, Fusion(), None, on_refused,
            takes_documents=True,
        )  # fmt: skip
        lookaheads = planner.lookaheads(requests, self._lookahead_size(batch_size))
        return PrecomputingRun(self.executor, strategy, lookaheads, batch_size, store)

    def _lookahead_size(self, batch_size: int | None) -> int:
        """Return the number of prompts that are planned ahead.

        With a batch size beyond all memory, no more is read ahead than can run.
        """
        rows = self.runner.rows_that_fit(batch_size or self.executor.largest_batch, MIN_CAPACITY)
        return LOOKAHEAD_BATCHES * max(1, rows)

    def warm_up(
        self,
        strategy: Strategy,
        *,
        prompt_tokens: int,
        num_segments: int = 5,
        max_new_tokens: int = 20,
        batch_size: int | None = None,
    ) -> RunStats:
        """Compile what a run of this size needs, by running one batch of made-up tokens.

        Args:
            strategy: The mask strategy.
            prompt_tokens: Tokens of the longest prompt.
            num_segments: Segments of each prompt.
            max_new_tokens: Most tokens per generation.
            batch_size: Prompts that run together; None chooses by memory.

        Returns:
            Counts and times of the batch.

        Raises:
            OptionError: If the segments do not fit into the prompt, the prompt does not fit into
                the model's context, or a size is impossible.
            ModelError: If there is too little memory for one row, or logits are NaN or infinite.
        """
        size = WarmUp(prompt_tokens, num_segments, max_new_tokens, batch_size)
        options = RunOptions(max_new_tokens, self.generation_rules())
        return size.run(self.executor, strategy, self._request_tokenizer(), options)

    def release(self) -> None:
        """Free the key-value cache and all buffers that belong to one size of batches."""
        self.executor.release()

    def _request_tokenizer(
        self, chat_template: bool = False, allow_special_tokens: bool = False
    ) -> RequestTokenizer:
        return self._kept.request_tokenizer(
            self.tokenizer,
            chat_template=chat_template,
            allow_special_tokens=allow_special_tokens,
        )

    def generation_rules(self) -> GenerationRules:
        """Return the rules of the model's generation config, as it is now.

        Raises:
            ModelError: If they cannot be applied.
        """
        return self._kept.rules(self.tokenizer)
