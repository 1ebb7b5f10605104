"""The engine: batches of requests through a model, under a mask strategy."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter
from typing import Self

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flexmask.attention.flex_call import PrefillKernel
from flexmask.block_mask.cache import BlockMaskCache
from flexmask.device import resolve_device, resolve_dtype
from flexmask.encoding.tokenization import RequestTokenizer
from flexmask.engine.batch_runner import RunOptions
from flexmask.engine.decode_loop import DecodeLoop
from flexmask.engine.generation_rules import GenerationRules
from flexmask.engine.generation_run import GenerationRun
from flexmask.engine.logit_fusion import LogitFusion
from flexmask.engine.model_loading import load_model
from flexmask.engine.model_runner import ModelRunner, bucketed_capacity
from flexmask.engine.prompt_queue import Job, PromptPlanner
from flexmask.engine.run_stats import RunStats
from flexmask.engine.turns import TURN, Occupancy
from flexmask.errors import ModelError, OptionError, RequestError
from flexmask.fusion import Fusion
from flexmask.generation import Generation
from flexmask.layout import TokenizedRequest
from flexmask.limits import check_size
from flexmask.plugins.registry import make_strategy
from flexmask.request import Request, checked_requests
from flexmask.sampling import Sampling
from flexmask.strategy import Strategy

MAX_AUTO_BATCH_SIZE = 128
CPU_AUTO_BATCH_SIZE = 8

BATCHES_PER_WINDOW = 16
"""Prompts of so many batches are put in order of length, and planned ahead."""


class Engine:
    """Generates under mask strategies with one model.

    Several runs of one engine may be under way, in one thread or in several: they take turns, a
    batch each, and give what each of them gives alone.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        prefill_kernel: PrefillKernel | None = None,
    ) -> None:
        """Wrap a model loaded with ``attn_implementation="flexmask"``.

        Args:
            model: The model.
            tokenizer: Its tokenizer.
            prefill_kernel: What computes prompts on a GPU: ``triton`` or ``flash``, which needs
                ``flexmask[flash]``; None to choose.

        Raises:
            AttentionError: If the model does not attend through flexmask, or the kernel cannot
                be had.
        """
        self.model = model
        self.tokenizer = tokenizer
        self.mask_cache = BlockMaskCache()
        self.occupancy = Occupancy()
        with TURN:
            self.runner = ModelRunner(model, self.mask_cache, prefill_kernel)
        self._loop_key: object = None
        self._loop: DecodeLoop | None = None

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        device: str = "auto",
        dtype: str = "auto",
        trust_remote_code: bool = False,
        prefill_kernel: PrefillKernel | None = None,
    ) -> Self:
        """Load a model by hub id, folder or GGUF file.

        Args:
            model: Hub id or folder, whose weights load from safetensors only; or a GGUF file,
                whose weights are unpacked (``flexmask[gguf]``).
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
            dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
            trust_remote_code: Run code that comes with the model.
            prefill_kernel: What computes prompts on a GPU, as in `Engine`.

        Raises:
            AttentionError: If the kernel cannot be had, or the architecture does not support
                attention backends.
            OptionError: If device or dtype cannot be had.
            ModelError: If the model cannot be loaded, or weights of it are missing.
            CompilerError: If torch.compile finds no compiler.
        """
        target = resolve_device(device)
        with TURN:
            loaded = load_model(
                model,
                device=target,
                dtype=resolve_dtype(dtype, target),
                trust_remote_code=trust_remote_code,
            )
        return cls(*loaded, prefill_kernel=prefill_kernel)

    def generate(
        self,
        requests: Iterable[Request],
        strategy: Strategy | str,
        *,
        fusion: Fusion | str = "attention",
        max_new_tokens: int = 20,
        batch_size: int | None = None,
        sampling: Sampling | None = None,
        stop: Sequence[str] = (),
        chat_template: bool = False,
        allow_special_tokens: bool = False,
        answer_of: Callable[[Generation], str] = attrgetter("prediction"),
        on_refused: Callable[[Request, RequestError], None] | None = None,
    ) -> GenerationRun:
        """Generate for each request; results come in the order of the requests.

        There is one for each request; under the fusion ``each`` one for each of its segments, and
        its ``request`` says which (`Request.alone`).

        Requests are tokenized and checked some batches ahead, the first of them at once;
        batches run as the result is iterated. What the model's generation config asks for beside
        sampling applies (`GenerationRules`).

        Args:
            requests: What to generate for.
            strategy: Who sees whom: a strategy, or the name of one for its default parameters.
            fusion: What the segments of a request have to do with each other: a `Fusion`, or the
                name of one that needs no weights.
            max_new_tokens: Most tokens per request.
            batch_size: Prompts that run together; None chooses by memory.
            sampling: How tokens are chosen; None takes the most likely.
            stop: Strings that end a row; they are left out of its text.
            chat_template: Put requests into the tokenizer's chat template.
            allow_special_tokens: Read the text of a special token in a request, such as
                ``<eos>``, as that token, which may end a turn. By default it is text like any
                other, and a warning counts the requests that hold some.
            answer_of: Cuts from a generation the answer that the fusion ``vote`` counts.
            on_refused: Called with each request that cannot be tokenized, exceeds the model's
                context or gets logits that are NaN or infinite, which is then left out; None
                raises.

        Raises:
            RequestError: If a request is refused and there is no ``on_refused``.
            ModelError: If a chat template is asked for, and there is none that can be used.
            OptionError: If an option has an impossible value.
            StrategyError: If there is no strategy of that name.
            TypeError: If requests, stop or sampling are of another type.
            ModelError: If the model's generation config cannot be applied.
        """
        if isinstance(strategy, str):
            strategy = make_strategy(strategy, {})
        if isinstance(fusion, str):
            fusion = Fusion(fusion)
        check_size("max_new_tokens", max_new_tokens, 1)
        if batch_size is not None:
            check_size("batch_size", batch_size, 1)
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
        tokenizer = RequestTokenizer(
            self.tokenizer,
            chat_template=chat_template,
            allow_special_tokens=allow_special_tokens,
            num_embeddings=_num_embeddings(self.model),
        )
        planner = PromptPlanner(
            strategy, tokenizer, max_new_tokens, self.runner.context, fusion, batch_size,
            on_refused,
        )  # fmt: skip
        size = BATCHES_PER_WINDOW * (batch_size or self._largest_batch())
        windows = planner.windows(requests, size)
        rules = self.generation_rules()
        all_stops = (*stop, *rules.stop_strings)
        options = RunOptions(
            max_new_tokens, rules, sampling or Sampling(), all_stops, fusion, answer_of
        )
        return GenerationRun(self, strategy, tokenizer, windows, options, batch_size, on_refused)

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
            strategy: Who sees whom.
            prompt_tokens: Tokens of the longest prompt.
            num_segments: Segments of each.
            max_new_tokens: Most tokens per request.
            batch_size: Rows that run together; None chooses by memory.

        Raises:
            OptionError: If the segments do not fit into the prompt, or a size is impossible.
        """
        check_size("prompt_tokens", prompt_tokens, 1)
        check_size("max_new_tokens", max_new_tokens, 1)
        length = (prompt_tokens - 1) // max(1, num_segments)
        if num_segments < 1 or length < 2:
            raise OptionError(
                f"{num_segments} segments do not fit into a prompt of {prompt_tokens} tokens"
            )
        # Another token in each segment: of equal ones only the first would be computed.
        segments = tuple((number,) * length for number in range(num_segments))
        layout = strategy.layout(TokenizedRequest((), segments, (0,)))
        capacity = bucketed_capacity(len(layout) + max_new_tokens)
        rows = batch_size or self.auto_batch_size(self._largest_batch(), capacity)
        window = [
            Job(number, Request(("-",), uuid="warm-up"), (layout,), ("",))
            for number in range(rows)
        ]
        options = RunOptions(max_new_tokens, self.generation_rules())
        tokenizer = RequestTokenizer(self.tokenizer)
        run = GenerationRun(self, strategy, tokenizer, iter([window]), options, rows)
        for _ in run.batches():
            pass
        return run.stats

    def _largest_batch(self) -> int:
        is_cpu = self.model.device.type == "cpu"
        return CPU_AUTO_BATCH_SIZE if is_cpu else MAX_AUTO_BATCH_SIZE

    def auto_batch_size(self, num_rows: int, capacity: int, group_size: int = 1) -> int:
        """Choose a batch size: by free memory on a GPU, 8 on a CPU, no more than there are.

        Args:
            num_rows: Rows that there are.
            capacity: Slots of each.
            group_size: How many of them stay together, at most.
        """
        device = self.model.device
        largest = CPU_AUTO_BATCH_SIZE
        if device.type == "cuda":
            cache = self.runner.cache
            # What earlier batches take is there again for these; else a second run of the same
            # requests would choose fewer rows, and compile for them.
            free = _free_bytes(device) + cache.num_bytes
            largest = min(MAX_AUTO_BATCH_SIZE, free // 2 // cache.bytes_per_row(capacity))
            if largest == 0:
                raise ModelError(
                    f"not enough GPU memory for one row of {capacity} slots; shorten the prompts"
                )
        rows = max(1, min(1 << (largest.bit_length() - 1), num_rows))
        return rows if rows == num_rows else max(1, rows // group_size) * group_size

    def prepare(
        self,
        strategy: Strategy,
        batch_size: int,
        capacity: int,
        options: RunOptions,
        group_size: int = 1,
    ) -> DecodeLoop:
        """Make ready for batches of one size; what is there already is used again."""
        is_new = self.runner.prepare(strategy, batch_size, capacity)
        chosen_by = (options.sampling, options.max_new_tokens, options.rules.eos_token_ids)
        fused = (options.fusion, group_size) if options.fusion.is_of_logits else None
        if is_new or self._loop is None or self._loop_key != (chosen_by, fused):
            self._loop_key = (chosen_by, fused)
            fusion = LogitFusion(*fused, batch_size, self.runner.device) if fused else None
            self._loop = DecodeLoop(self.runner, *chosen_by, fusion)
        return self._loop

    def release(self) -> None:
        """Give back the key-value cache and all that belongs to one size of batch."""
        self._loop_key = self._loop = None
        self.runner.release()

    def generation_rules(self) -> GenerationRules:
        """What the model's generation config asks for, as it is now.

        Raises:
            ModelError: If it cannot be applied.
        """
        return GenerationRules.of(self.model, self.tokenizer)


def _num_embeddings(model: PreTrainedModel) -> int:
    weight = model.get_input_embeddings().weight
    assert isinstance(weight, torch.Tensor)
    return weight.shape[0]


def _free_bytes(device: torch.device) -> int:
    """Memory of a GPU that can be allocated: what no process has, and what torch keeps for us."""
    free, _ = torch.cuda.mem_get_info(device)
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(free + kept)
