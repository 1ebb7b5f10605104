"""Loads the subject of a picture: a request of given lengths, from a file, or from a result."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING

from flexmask.demo import model_path
from flexmask.errors import OptionError, OutputError, RequestError
from flexmask.limits import shown_number
from flexmask.plugins.registry import make_strategy
from flexmask.plugins.strategy_file import reference_of_record
from flexmask.request import Request
from flexmask.results.result_writer import read_finished_rows, read_run_config
from flexmask.results.run_config import RunConfig
from flexmask.results.schema import answer_logprobs
from flexmask.show.tokens import ShownRequest
from flexmask.strategy import Strategy

if TYPE_CHECKING:
    from flexmask.encoding.tokenization import RequestTokenizer

RUN_KEYS = {
    "strategy": str,
    "parameters": dict,
    "model": str,
    "chat_template": bool,
    "fusion": dict,
}
"""Entries of a run configuration that a picture needs, and their types."""

TEXTS = ("prefix", "suffix", "system", "messages", "answer_prefix", "segment_turns")
"""Columns of a result file that are fields of the request."""

MOST_TOKENS = 1 << 24
"""Size limit of a request of which only lengths are known."""

DEMO = "demo"
"""Name of the bundled model in run configurations."""


@dataclass(frozen=True)
class Answer:
    """The answer of a run to a request.

    Attributes:
        prediction: The answer.
        generation: The whole generated text.
        accepted: Accepted answers; may be empty.
        is_correct: Whether the prediction is an accepted answer; None if there are none.
        finish_reason: Reason why generation ended.
        model: The model.
        strategy: Returns the strategy with the parameters of the run; if it comes from a file,
            that file is executed. Raises `StrategyError` if it cannot be found any more.
        attention: For each generated token the attention that the prefix, each segment and the
            tail got; None where it was not measured.
        logprobs: The log-probability of each token of the answer, generated or chosen; None
            where they were not kept.
    """

    prediction: str
    generation: str
    accepted: tuple[str, ...]
    is_correct: bool | None
    finish_reason: str
    model: str
    strategy: Callable[[], Strategy]
    attention: Sequence[Sequence[float]] | None = None
    logprobs: Sequence[float] | None = None

    @property
    def mean_attention(self) -> tuple[float, ...] | None:
        """Mean of the attention over the generated tokens."""
        return tuple(map(fmean, zip(*self.attention, strict=True))) if self.attention else None


@dataclass(frozen=True)
class Subject:
    """The subject of a picture: a request, and perhaps the answer of a run.

    Attributes:
        heading: One-line description.
        shown: Tokens of the request.
        answer: Answer of a run; None if the request was not run.
    """

    heading: str
    shown: ShownRequest
    answer: Answer | None = None

    def with_new_tokens(self, count: int) -> Subject:
        """Return a copy with ``count`` generated tokens.

        Raises:
            OptionError: If they are more than can be drawn.
        """
        if count > MOST_TOKENS:
            raise OptionError(
                f"{shown_number(count)} new tokens; at most {MOST_TOKENS:,} can be drawn"
            )
        return replace(self, shown=replace(self.shown, new_tokens=count))


def subject_of_lengths(prefix: int, segments: Sequence[int], suffix: int) -> Subject:
    """Return a request of which only lengths are known.

    Raises:
        OptionError: If a length is not positive, or all together are too many.
    """
    if not segments or min(segments) < 1 or suffix < 1 or prefix < 0:
        raise OptionError(
            f"lengths must be positive, got prefix {prefix}, segments {list(segments)}, "
            f"suffix {suffix}"
        )
    if prefix + sum(segments) + suffix > MOST_TOKENS:
        raise OptionError(
            f"a request of {shown_number(prefix + sum(segments) + suffix)} tokens; at most "
            f"{MOST_TOKENS:,} can be drawn"
        )
    listed = " + ".join(map(str, segments))
    heading = f"{prefix} prefix tokens, segments of {listed}, {suffix} of the fusion tail"
    return Subject(heading, ShownRequest.of_lengths(prefix, segments, suffix))


def subject_of_request(request: Request, tokenize: RequestTokenizer, heading: str) -> Subject:
    """Take a request as the engine gets it.

    Args:
        request: The request.
        tokenize: Tokenizes it, in a chat template or not.
        heading: The heading of the picture.

    Raises:
        RequestError: If it cannot be tokenized.
    """
    shown = ShownRequest(tokenize(request), text_of=cache(tokenize.token_text))
    return Subject(heading, shown)


def subject_of_result(
    source: str, row: int, *, model: str | None = None, trust_remote_code: bool = False
) -> Subject:
    """Load a row of a result file as it was run, with its generation.

    Args:
        source: Path of the file.
        row: Number of the row, from 1.
        model: Hub id, folder or GGUF file whose tokenizer is used. Default: the model of the run
            that wrote the file.
        trust_remote_code: Run code that comes with the model.

    Raises:
        RequestError: If there is no such row, or it failed.
        OutputError: If the file cannot be read.
        OptionError: If its segments ran as separate prompts.
        ModelError: If the tokenizer cannot be loaded.
    """
    config = read_run_config(source)
    run = config.run
    recorded = {"fusion": {}, **run}  # early versions had no fusions
    if missing := [
        key for key, kind in RUN_KEYS.items() if not isinstance(recorded.get(key), kind)
    ]:
        raise OutputError(f"{source}: its run does not record {', '.join(missing)}")
    fusion = recorded["fusion"].get("name", "attention")
    if fusion not in ("attention", "none", "each", "self_consistency"):
        raise OptionError(
            f"{source}: its segments ran as separate prompts (fusion {fusion!r}), with no mask "
            "between them to draw; name the file of the requests"
        )
    rows = read_finished_rows(source)
    if not 1 <= row <= rows.num_rows:
        raise RequestError(f"{source}: `row` must be 1 to {rows.num_rows}, got {row}")
    (values,) = rows.slice(row - 1, 1).to_pylist()
    if values["error"]:
        raise RequestError(f"{source}: row {row} failed: {values['error']}")
    if not 0 <= values["generated_tokens"] <= MOST_TOKENS:
        raise OutputError(
            f"{source}: damaged, row {row} has {values['generated_tokens']} generated tokens"
        )
    request = Request(
        segments=tuple(values["paraphrases"]),
        **{name: values[name] for name in TEXTS},
    )
    answer = Answer(
        prediction=values["prediction"],
        generation=values["generation"],
        accepted=tuple(values["answers"]),
        is_correct=values["correct"],
        finish_reason=values["finish_reason"],
        model=run["model"],
        strategy=partial(_strategy_of_run, config),
        attention=values.get("segment_attention"),
        logprobs=answer_logprobs(values),
    )
    # Imported here, because a request of given lengths need not wait for transformers.
    from flexmask.encoding.tokenization import RequestTokenizer

    name = model or answer.model
    tokenize = RequestTokenizer.from_pretrained(
        str(model_path()) if name == DEMO else name,
        trust_remote_code=trust_remote_code,
        chat_template=run["chat_template"],
        allow_special_tokens=run.get("allow_special_tokens", False),
    )
    shown = ShownRequest(
        tokenize(request),
        new_tokens=values["generated_tokens"],
        text_of=cache(tokenize.token_text),
        new_texts=_generated_texts(tokenize, answer.generation, values["generated_tokens"]),
    )
    return Subject(f"{Path(source).name}, row {row}: {values['uuid']}", shown, answer)


def _strategy_of_run(config: RunConfig) -> Strategy:
    location = config.environment.get("strategy_file")
    where = location if isinstance(location, str) else None
    reference = reference_of_record(config.run["strategy"], where)
    return make_strategy(reference, config.run["parameters"])


def _generated_texts(tokenize: RequestTokenizer, generation: str, count: int) -> tuple[str, ...]:
    """Split generated text into ``count`` tokens.

    A result file holds the text and the number of tokens. Tokens without text, such as the
    end-of-sequence token, stay blank; if the text gives more tokens, the last one gets the rest.
    """
    texts = tokenize.token_texts(generation)
    if len(texts) > count:
        texts[count - 1 :] = ["".join(texts[count - 1 :])]
    return tuple(texts)
