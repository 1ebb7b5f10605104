"""The model ``flexmask`` of lm-evaluation-harness: log-likelihoods and generations under any mask.

The harness (0.4.13) finds models by their registration and has no entry points for them, so
importing this module registers the model; the command ``flexmask-lm-eval`` is ``lm_eval`` with
that import. Requests of one context are scored in one pass.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from typing import Any

from lm_eval import utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.api.registry import register_model
from lm_eval.models.utils import handle_stop_sequences, normalize_gen_kwargs
from tqdm import tqdm

from flexmask import Engine, Request, RequestTokenizer, Sampling, Separator, make_strategy
from flexmask.errors import OptionError
from flexmask.layout import TokenizedRequest

DEFAULT_CONTEXT = 2048
"""Most tokens of a context and its continuation for a model that names no limit, as in ``hf``."""

Key = TokenizedRequest
Tokens = tuple[int, ...]


@register_model("flexmask")
class FlexMaskLM(TemplateLM):
    """Evaluates a model under a mask strategy.

    Without ``separator`` a context is one segment, tokenized as the harness's ``hf`` does. With
    it, the texts between separators are the segments of the context, and the text after the last
    one is its tail, which sees all of them; each text is tokenized by itself.
    """

    def __init__(
        self,
        pretrained: str,
        strategy: str = "causal",
        separator: str | None = None,
        keep_separator: bool = True,
        has_prefix: bool = False,
        device: str | None = "auto",
        dtype: str = "auto",
        batch_size: int | str | None = "auto",
        max_batch_size: int | None = None,
        max_length: int | None = None,
        max_gen_toks: int = 256,
        add_bos_token: bool | None = None,
        adapter: str | None = None,
        quantize: str | None = None,
        trust_remote_code: bool = False,
        **parameters: Any,
    ) -> None:
        r"""Load the model.

        Args:
            pretrained: Hub id, folder or GGUF file.
            strategy: Name of the mask strategy.
            separator: Text between the parts of a context; ``\n`` in it is a newline.
            keep_separator: Leave each separator at the end of the part before it, so that the
                text stays the same; otherwise it is removed.
            has_prefix: The first part of a context is its prefix, which all segments share, and
                not a segment.
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
            dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
            batch_size: Prompts that run together; ``auto`` chooses by memory.
            max_batch_size: Largest batch that ``auto`` chooses; None for no limit.
            max_length: Most tokens of a context and its continuation; None for the model's.
            max_gen_toks: Most tokens to generate where a task does not say.
            add_bos_token: Begin contexts with the beginning-of-sequence token, or not; None does
                as the tokenizer does. Without ``separator`` only.
            adapter: Folder of a LoRA adapter to merge.
            quantize: ``int8`` or ``fp8``, to which weights are rounded.
            trust_remote_code: Run code that comes with the model.
            parameters: Parameters of the strategy.

        Raises:
            FlexMaskError: If the strategy or the model cannot be used.
        """
        super().__init__()
        self.strategy = make_strategy(strategy, parameters)
        self.separator = Separator.of_option(separator, keep=keep_separator, has_prefix=has_prefix)
        if separator is not None and add_bos_token is not None:
            raise OptionError("add_bos_token is for contexts without a separator; leave out one")
        self.add_bos_token = add_bos_token
        self.batch_size = _batch_size(batch_size)
        self.max_batch_size = max_batch_size
        self.max_gen_toks = max_gen_toks
        self.pretrained = pretrained
        self.engine = Engine.from_pretrained(
            pretrained,
            device=device or "auto",
            dtype=dtype,
            adapter=adapter,
            quantize=quantize,
            trust_remote_code=trust_remote_code,
        )
        self.max_length = max_length or self.engine.runner.context or DEFAULT_CONTEXT
        self.tokenizer = self.engine.tokenizer
        self._tokenize = RequestTokenizer(self.tokenizer, allow_special_tokens=True)
        self._device = self.engine.model.device

    @property
    def eot_token_id(self) -> int:
        """The end-of-sequence token."""
        return int(self.tokenizer.eos_token_id)

    @property
    def prefix_token_id(self) -> int:
        """The token that stands for an empty context: beginning, else end of sequence."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """The name that caches of requests go by."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **kwargs: Any
    ) -> list[int]:
        """Tokenize a text as ``hf`` does: with a beginning of sequence unless it has one."""
        adds = self.add_bos_token if add_special_tokens is None else add_special_tokens
        if add_special_tokens is None and string.startswith(self._prefix_text):
            adds = False
        given = {} if adds is None else {"add_special_tokens": adds}
        return list(self.tokenizer.encode(string, **given))

    @property
    def _prefix_text(self) -> str:
        return str(self.tokenizer.decode(self.prefix_token_id))

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """Write messages with the tokenizer's chat template."""
        text = self.tokenizer.apply_chat_template(
            chat_history,
            tokenize=False,
            add_generation_prompt=add_generation_prompt,
            continue_final_message=not add_generation_prompt,
        )
        return str(text)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[tuple[float, bool]]:
        """Score continuations: the sum of log-probabilities, and whether greedy says the same."""
        if self.separator.text is None:
            return super().loglikelihood(requests, disable_tqdm=disable_tqdm)
        pairs = [request.args for request in requests]
        return self._scored(pairs, (self._in_parts(*pair) for pair in pairs), disable_tqdm)

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Score whole texts, in windows of the model's context, each token once."""
        windows: list[tuple[None, list[int], list[int]]] = []
        counts = []
        for request in requests:
            (text,) = request.args
            own = [
                utils.make_disjoint_window(window)
                for window in utils.get_rolling_token_windows(
                    token_list=self.tok_encode(text),
                    prefix_token=self.prefix_token_id,
                    max_seq_len=self.max_length,
                    context_len=1,
                )
            ]
            windows += [(None, *window) for window in own]
            counts.append(len(own))
        scores = iter(self._loglikelihood_tokens(windows, disable_tqdm=disable_tqdm))
        totals = [sum(next(scores)[0] for _ in range(count)) for count in counts]
        for request, total in zip(requests, totals, strict=True):
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return totals

    def _loglikelihood_tokens(
        self,
        requests: Sequence[tuple[tuple[str, str] | None, list[int], list[int]]],
        disable_tqdm: bool = False,
        **kwargs: Any,
    ) -> list[tuple[float, bool]]:
        prompts = (self._whole(context, choice) for _, context, choice in requests)
        return self._scored([pair for pair, *_ in requests], prompts, disable_tqdm)

    def _whole(self, context: list[int], choice: list[int]) -> tuple[Key, Tokens]:
        """Return a context as one segment, cut on its left to what the model takes."""
        if len(choice) > self.max_length:
            raise OptionError(
                f"a continuation has {len(choice)} tokens, more than max_length={self.max_length}"
            )
        context = context[-(self.max_length + 1 - len(choice)) :]
        body, tail = tuple(context[:-1]), tuple(context[-1:])
        return TokenizedRequest((), (body,) if body else (), tail), tuple(choice)

    def _in_parts(self, context: str, continuation: str) -> tuple[Key, Tokens]:
        """Return a context as the segments between its separators."""
        if not context:
            choice = self.tok_encode(continuation, add_special_tokens=False)
            return TokenizedRequest((), (), (self.prefix_token_id,)), tuple(choice)
        trimmed = context.rstrip(" ") or context
        continuation = context[len(trimmed) :] + continuation
        request = self._request(trimmed)
        (choice,) = self._tokenize.choices(request, [continuation])
        return self._tokenize(request), choice

    def _request(self, context: str) -> Request:
        """Divide a context into prefix, segments and tail."""
        bos = self.tokenizer.bos_token
        if bos is not None and self.tokenizer.encode("a")[0] == self.tokenizer.bos_token_id:
            context = context.removeprefix(bos)  # the request's tokenizer writes it
        return self.separator.divide(context)

    def _scored(
        self,
        pairs: Sequence[tuple[str, str] | None],
        prompts: Iterable[tuple[Key, Tokens]],
        disable_tqdm: bool,
    ) -> list[tuple[float, bool]]:
        """Score the choice of each prompt; those of equal prompts in one pass.

        Args:
            pairs: The texts of each request, for the harness's cache; None for none.
            prompts: The prompt and the tokens of the choice of each request.
            disable_tqdm: Show no progress.
        """
        grouped: dict[Key, list[tuple[int, Tokens]]] = {}
        for number, (prompt, choice) in enumerate(prompts):
            grouped.setdefault(prompt, []).append((number, choice))
        owners = list(grouped.values())
        found: dict[int, tuple[float, bool]] = {}
        scored = self.engine.score_tokens(
            [(prompt, tuple(choice for _, choice in own)) for prompt, own in grouped.items()],
            self.strategy,
            batch_size=self._rows(len(grouped)),
        )
        shown = tqdm(total=len(pairs), disable=disable_tqdm, desc="Scoring continuations")
        for index, scores in scored:
            for (number, _), one in zip(owners[index], scores, strict=True):
                result = float(one.logprobs.double().sum()), bool(one.is_greedy.all())
                found[number], pair = result, pairs[number]
                if pair is not None:
                    self.cache_hook.add_partial("loglikelihood", pair, result)
            shown.update(len(scores))
        shown.close()
        return [found[number] for number in range(len(pairs))]

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Generate for each context, up to one of the texts that end it."""
        shown = tqdm(total=len(requests), disable=disable_tqdm, desc="Generating")
        texts: dict[int, str] = {}
        for numbers, given in _by_settings(requests):
            contexts = [requests[number].args[0] for number in numbers]
            for number, text in zip(numbers, self._generated(contexts, given), strict=True):
                texts[number] = text
                self.cache_hook.add_partial("generate_until", requests[number].args, text)
                shown.update()
        shown.close()
        return [texts[number] for number in range(len(requests))]

    def _generated(self, contexts: Sequence[str], given: dict[str, Any]) -> Iterator[str]:
        """Generate with settings as a task gives them."""
        settings: dict[str, Any] = dict(normalize_gen_kwargs(given, self.max_gen_toks))
        eos = str(self.tokenizer.decode(self.eot_token_id, skip_special_tokens=False))
        stop = handle_stop_sequences(settings.pop("until", None), eos=eos)
        count = settings.pop("max_gen_toks")
        samples, temperature = settings.pop("do_sample"), settings.pop("temperature", 0.0)
        sampling = Sampling(
            temperature=temperature if samples else 0.0,
            top_k=settings.pop("top_k", 0),
            top_p=settings.pop("top_p", 1.0),
            seed=settings.pop("seed", 0),
        )
        if settings:
            raise OptionError(f"generation takes no {', '.join(sorted(settings))}; leave it out")
        run = self.engine.generate(
            [
                replace(self._request(self._cut(context, count)), uuid=str(number))
                for number, context in enumerate(contexts)
            ],
            self.strategy,
            max_new_tokens=count,
            batch_size=self._rows(len(contexts)),
            sampling=sampling,
            stop=[text for text in stop if text],
            allow_special_tokens=True,
        )
        return (generation.text for generation in run)

    def _cut(self, context: str, count: int) -> str:
        """Cut a context that is too long on its left, unless it has parts."""
        if self.separator.text is not None:
            return context
        most = self.max_length - count
        if most < 1:
            raise OptionError(f"{count} new tokens leave no room in max_length={self.max_length}")
        token_ids = self.tok_encode(context)
        return context if len(token_ids) <= most else str(self.tokenizer.decode(token_ids[-most:]))

    def _rows(self, count: int) -> int | None:
        """Return the batch size for some prompts; None to choose by memory."""
        if self.batch_size is not None or self.max_batch_size is None:
            return self.batch_size
        return min(self.max_batch_size, max(1, count))


def _batch_size(given: int | str | None) -> int | None:
    """Return the batch size; None for ``auto`` and ``auto:N``, which choose by memory."""
    if given is None or str(given).startswith("auto"):
        return None
    if not str(given).isdecimal() or int(given) < 1:
        raise OptionError(f"batch_size must be a positive number or auto, got {given!r}")
    return int(given)


def _by_settings(requests: Sequence[Instance]) -> Iterator[tuple[list[int], dict[str, Any]]]:
    """Yield the numbers of requests with equal settings of generation, and these settings."""
    grouped: dict[str, tuple[list[int], dict[str, Any]]] = {}
    for number, request in enumerate(requests):
        _, given = request.args
        grouped.setdefault(repr(given), ([], given))[0].append(number)
    yield from grouped.values()


def main() -> None:
    """Run ``lm_eval`` with the model ``flexmask`` registered."""
    from lm_eval.__main__ import cli_evaluate

    cli_evaluate()
