"""The model provider ``flexmask`` of Inspect: generations under any mask, without a server.

Inspect (0.3.285) asks for one answer at a time, from as many tasks as it has connections. The
calls that wait while the engine is busy become one run of it.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import anyio
import anyio.to_thread
from inspect_ai._util.error import PrerequisiteError  # shown in one line, without a traceback
from inspect_ai.model import (
    ChatCompletionChoice,
    ChatMessage,
    ChatMessageAssistant,
    GenerateConfig,
    Logprob,
    Logprobs,
    ModelAPI,
    ModelOutput,
    ModelUsage,
    StopReason,
    TopLogprob,
    modelapi,
)
from inspect_ai.tool import ToolChoice, ToolInfo
from rich.markup import escape

from flexmask import (
    Engine,
    FlexMaskError,
    Generation,
    Message,
    Request,
    RequestTokenizer,
    Sampling,
    Separator,
    make_strategy,
)
from flexmask.demo import model_path
from flexmask.errors import OptionError, RequestError

GATHERING_S = 0.02
"""Seconds for which an idle engine waits for more calls before it starts."""

MAX_TOKENS = 256
"""Most tokens of an answer where neither the task nor the command says."""

CONNECTIONS = 256
"""Calls at once where the command does not say; the engine chooses by memory how many run."""

_STOP_REASONS: dict[str, StopReason] = {"eos": "stop", "stop": "stop", "length": "max_tokens"}
_NOT_SUPPORTED = (
    *("best_of", "frequency_penalty", "logit_bias", "modalities", "presence_penalty"),
    *("prompt_logprobs", "response_schema", "extra_body"),
)
"""Settings that would change answers; they are refused rather than ignored."""


@dataclass(frozen=True)
class _Settings:
    """The options of `Engine.generate` that a call may set; calls of equal ones run together."""

    max_new_tokens: int
    sampling: Sampling
    samples: int
    stop: tuple[str, ...]
    logprobs: bool
    top_logprobs: int


@dataclass
class _Call:
    """A call that waits for its generations, one for each sample, or for its error."""

    request: Request
    settings: _Settings
    generations: list[Generation] = field(default_factory=list)
    error: Exception | None = None

    @property
    def is_done(self) -> bool:
        return self.error is not None or len(self.generations) == self.settings.samples


@modelapi(name="flexmask")
class FlexMaskAPI(ModelAPI):
    """Answers under a mask strategy.

    With ``separator``, the texts between separators in the last user turn are segments, and the
    text after the last one is the tail, which sees all of them. Without it the turn is one
    segment.
    """

    def __init__(
        self,
        model_name: str,
        base_url: str | None = None,
        api_key: str | None = None,
        config: GenerateConfig = GenerateConfig(),  # noqa: B008  (as in Inspect)
        strategy: str = "causal",
        separator: str | None = None,
        keep_separator: bool = True,
        has_prefix: bool = False,
        chat_template: bool | None = None,
        batch_size: int | None = None,
        device: str = "auto",
        dtype: str = "auto",
        adapter: str | None = None,
        quantize: str | None = None,
        trust_remote_code: bool = False,
        **parameters: Any,
    ) -> None:
        r"""Load the model.

        Args:
            model_name: Hub id, folder or GGUF file; ``demo`` is the model of flexmask itself.
            base_url: Refused, since there is no server.
            api_key: Not used.
            config: Inspect's settings.
            strategy: Name of the mask strategy.
            separator: Text between the parts of a user turn; ``\n`` in it is a newline.
            keep_separator: Leave each separator at the end of the part before it.
            has_prefix: The first part of a user turn is the prefix that all segments share.
            chat_template: Put turns into the model's chat template; None if it has one.
            batch_size: Prompts that run together; None chooses by memory.
            device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
            dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
            adapter: Folder of a LoRA adapter to merge.
            quantize: ``int8`` or ``fp8``, to which weights are rounded.
            trust_remote_code: Run code that comes with the model.
            parameters: Parameters of the strategy.

        Raises:
            PrerequisiteError: If the strategy or the model cannot be used.
        """
        super().__init__(model_name, base_url, api_key, [], config)
        self.batch_size = batch_size
        try:
            if base_url is not None:
                raise OptionError("the model runs in this process; leave out the base URL")
            self.strategy = make_strategy(strategy, parameters)
            self.separator = Separator.of_option(
                separator, keep=keep_separator, has_prefix=has_prefix
            )
            self.engine = Engine.from_pretrained(
                str(model_path()) if model_name == "demo" else model_name,
                device=device,
                dtype=dtype,
                adapter=adapter,
                quantize=quantize,
                trust_remote_code=trust_remote_code,
            )
        except FlexMaskError as error:
            raise PrerequisiteError(escape(str(error))) from error
        has_template = self.engine.tokenizer.chat_template is not None
        self.chat_template = has_template if chat_template is None else chat_template
        self._token_text = RequestTokenizer(self.engine.tokenizer).token_text
        self._asked: Counter[str] = Counter()
        self._waiting: list[_Call] = []
        self._turn = anyio.Lock()

    async def generate(
        self,
        input: list[ChatMessage],
        tools: list[ToolInfo],
        tool_choice: ToolChoice,
        config: GenerateConfig,
    ) -> ModelOutput:
        """Answer a conversation, in one run of the engine with the other calls that wait.

        Raises:
            FlexMaskError: If the engine refuses the prompt or the settings.
        """
        if tools:
            raise OptionError("flexmask calls no tools; choose tasks and solvers without them")
        call = _Call(self._request(input), _settings(config))
        self._waiting.append(call)
        async with self._turn:
            if not call.is_done:
                await anyio.sleep(GATHERING_S)
                calls, self._waiting = self._waiting, []
                await anyio.to_thread.run_sync(self._run, calls)
        if call.error is not None:
            raise call.error
        return self._output(call)

    def _request(self, messages: Sequence[ChatMessage]) -> Request:
        """Return the request of a conversation; the last user turn holds its segments.

        An assistant's turn at the end is the start of the answer. Equal conversations, such as
        epochs, have different uuids, which seed their samples, in the order in which they come.
        """
        turns = [_text_of(message) for message in messages]
        answer_prefix = turns.pop()[1] if turns and turns[-1][0] == "assistant" else ""
        if not turns or turns[-1][0] != "user":
            raise RequestError("a conversation must end with a user turn")
        request = self.separator.divide(turns.pop()[1])
        digest = hashlib.sha256(repr([*turns, request, answer_prefix]).encode()).hexdigest()[:16]
        self._asked[digest] += 1
        return replace(
            request,
            uuid=f"{digest}-{self._asked[digest]}",
            system="\n\n".join(text for role, text in turns if role == "system"),
            messages=tuple(Message(role, text) for role, text in turns if role != "system"),
            answer_prefix=answer_prefix,
        )

    def _run(self, calls: Sequence[_Call]) -> None:
        """Generate for calls, in one run for each of their settings."""
        for settings in dict.fromkeys(call.settings for call in calls):
            own = {call.request.uuid: call for call in calls if call.settings == settings}

            def refuse(request: Request, error: RequestError, own: Any = own) -> None:
                own[request.uuid].error = error

            try:
                for generation in self.engine.generate(
                    [call.request for call in own.values()],
                    self.strategy,
                    batch_size=self.batch_size,
                    chat_template=self.chat_template,
                    on_refused=refuse,
                    **vars(settings),
                ):
                    own[generation.request.uuid].generations.append(generation)
            except (
                Exception
            ) as error:  # raised by each of the calls, not only by the one that runs
                for call in own.values():
                    if not call.is_done:
                        call.error = error

    def _output(self, call: _Call) -> ModelOutput:
        prompt = sum(generation.prompt_tokens for generation in call.generations)
        tokens = sum(len(generation.token_ids) for generation in call.generations)
        return ModelOutput(
            model=self.model_name,
            choices=[self._choice(generation) for generation in call.generations],
            usage=ModelUsage(
                input_tokens=prompt, output_tokens=tokens, total_tokens=prompt + tokens
            ),
        )

    def _choice(self, generation: Generation) -> ChatCompletionChoice:
        return ChatCompletionChoice(
            message=ChatMessageAssistant(
                content=generation.text, model=self.model_name, source="generate"
            ),
            stop_reason=_STOP_REASONS[generation.finish_reason],
            logprobs=self._logprobs(generation),
        )

    def _logprobs(self, generation: Generation) -> Logprobs | None:
        if generation.logprobs is None:
            return None
        tops = generation.top_logprobs or ((),) * len(generation.token_ids)
        return Logprobs(
            content=[
                Logprob(
                    token=self._token_text(token_id),
                    logprob=logprob,
                    top_logprobs=[TopLogprob(token=t.text, logprob=t.logprob) for t in top]
                    or None,
                )
                for token_id, logprob, top in zip(
                    generation.token_ids, generation.logprobs, tops, strict=True
                )
            ]
        )

    def max_tokens(self) -> int:
        """Most tokens of an answer where nobody says."""
        return MAX_TOKENS

    def max_connections(self) -> int:
        """Calls at once where nobody says."""
        return CONNECTIONS


def _text_of(message: ChatMessage) -> tuple[str, str]:
    """Return the role and the text of a turn.

    Raises:
        RequestError: If it holds something else than text, or is of a tool.
    """
    if message.role == "tool":
        raise RequestError("a conversation must hold no turn of a tool")
    if not isinstance(message.content, str):
        kinds = sorted({part.type for part in message.content} - {"text"})
        if kinds:
            raise RequestError(f"a turn must hold text alone, got {', '.join(kinds)}")
    return message.role, message.text


def _settings(config: GenerateConfig) -> _Settings:
    """Return the settings of a call.

    Raises:
        OptionError: If one is not supported.
    """
    for name in _NOT_SUPPORTED:
        if getattr(config, name) is not None:
            raise OptionError(f"flexmask takes no {name}; leave it out")
    return _Settings(
        max_new_tokens=MAX_TOKENS if config.max_tokens is None else config.max_tokens,
        sampling=Sampling(
            temperature=config.temperature or 0.0,
            top_k=config.top_k or 0,
            top_p=1.0 if config.top_p is None else config.top_p,
            seed=config.seed or 0,
        ),
        samples=config.num_choices or 1,
        stop=tuple(config.stop_seqs or ()),
        logprobs=bool(config.logprobs),
        top_logprobs=(config.top_logprobs or 0) if config.logprobs else 0,
    )
