"""Tokenizes requests, and decodes the tokens generated for them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property
from typing import Self

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from flexmask.checkpoint.folder import check_tokenizer_files
from flexmask.checkpoint.model_name import shown
from flexmask.checkpoint.source import CheckpointSource
from flexmask.checkpoint.transformers_calls import errors_in_one_line
from flexmask.encoding.chat_template import ChatTemplate, WrittenPrompt
from flexmask.encoding.prompt_encoder import EncodedPrompt, PromptEncoder
from flexmask.encoding.text_decoder import TextDecoder
from flexmask.encoding.text_encoder import Encoded
from flexmask.encoding.tokenizer_errors import tokenizer_errors
from flexmask.errors import ModelError, RequestError
from flexmask.layout import TokenizedRequest
from flexmask.request import Request


def load_tokenizer(model: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model (hub id, folder or GGUF file) without its weights.

    Raises:
        ModelError: If it cannot be loaded.
    """
    source = CheckpointSource.find(model)
    with errors_in_one_line(f"cannot load the tokenizer of {shown(source.name)}"):
        check_tokenizer_files(source)
        tokenizer = AutoTokenizer.from_pretrained(
            source.location, trust_remote_code=trust_remote_code, **source.options
        )
    if not isinstance(tokenizer, PreTrainedTokenizerBase):
        raise ModelError(
            f"the tokenizer of {shown(source.name)} is a {type(tokenizer).__name__}, which "
            "flexmask cannot use; save one of transformers' own classes"
        )
    return tokenizer


class RequestTokenizer:
    """Tokenizes prefix, segments and suffix, each separately.

    So the tokens of a segment do not depend on its neighbours, and the concatenated tokens decode
    to the whole text (`flexmask.encoding.prompt_encoder`). The prefix begins with the
    beginning-of-sequence token if the tokenizer adds one.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: bool = False,
        allow_special_tokens: bool = False,
        num_embeddings: int | None = None,
    ) -> None:
        """Wrap ``tokenizer``.

        Args:
            tokenizer: The model's tokenizer.
            chat_template: Put the request into the tokenizer's chat template, as its last user
                turn: text and turns before the segments are added to the prefix, what follows
                them to the suffix.
            allow_special_tokens: Encode the text of a special token in a request, such as
                ``<eos>``, as that token. By default it is encoded as plain text.
            num_embeddings: Number of tokens that the model knows; None without a model.

        Raises:
            ModelError: If ``chat_template`` is set and the tokenizer has no template, or an
                unusable one.
        """
        self._tokenizer = tokenizer
        self._num_embeddings = num_embeddings
        self._template = ChatTemplate(tokenizer) if chat_template else None
        self._decoder = TextDecoder(tokenizer)
        self._encoder = PromptEncoder(
            tokenizer,
            self._decoder,
            template=self._template.source if self._template else None,
            allow_special_tokens=allow_special_tokens,
        )

    @classmethod
    def from_pretrained(
        cls,
        model: str,
        *,
        trust_remote_code: bool = False,
        chat_template: bool = False,
        allow_special_tokens: bool = False,
    ) -> Self:
        """Load the tokenizer of a model, and not the model.

        Args:
            model: Hub id, folder or GGUF file.
            trust_remote_code: Run code that comes with the tokenizer.
            chat_template: As in `RequestTokenizer`.
            allow_special_tokens: As in `RequestTokenizer`.

        Raises:
            ModelError: If there is none, or its chat template cannot be used.
        """
        tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
        return cls(
            tokenizer, chat_template=chat_template, allow_special_tokens=allow_special_tokens
        )

    def read_ahead(self, requests: Iterable[Request]) -> None:
        """Encode the segments of the next requests in one call."""
        self._encoder.read_ahead(text for request in requests for text in request.segments)

    def __call__(self, request: Request) -> TokenizedRequest:
        """Tokenize ``request``.

        Raises:
            RequestError: If it cannot be tokenized, leaves a segment or the fusion tail without
                tokens, or has tokens that the model does not know.
        """
        prompt = self._encoded(request)
        return _with_special_text(
            TokenizedRequest.from_token_ids(
                prefix=self._begin + prompt.prefix.token_ids,
                segments=[segment.token_ids for segment in prompt.segments],
                suffix=prompt.suffix.token_ids,
            ),
            prompt,
        )

    def document(self, request: Request) -> TokenizedRequest:
        """Tokenize the first segment of a request with the tokens that it has among several.

        A tokenizer may encode a segment otherwise if it is the only one; and without a suffix, the
        fusion tail would take its last token.

        Returns:
            The request with this segment alone, whose last token is the fusion tail once more if
            there is no suffix.

        Raises:
            RequestError: As calling the tokenizer does.
        """
        document = request.segments[0]
        prompt = self._encoded(replace(request, segments=(document, document), weights=()))
        token_ids = prompt.segments[0].token_ids
        return _with_special_text(
            TokenizedRequest.from_token_ids(
                prefix=self._begin + prompt.prefix.token_ids,
                segments=[token_ids],
                suffix=prompt.suffix.token_ids or token_ids[-1:],
            ),
            prompt,
        )

    def _encoded(self, request: Request) -> EncodedPrompt:
        prompt = self._encoder.encode(self._written(request), request.segments)
        for name, piece in prompt.named():
            self._check_known(name, piece)
        return prompt

    def choices(
        self, request: Request, texts: Sequence[str] | None = None
    ) -> tuple[tuple[int, ...], ...]:
        """Tokenize the choices of a request, each as a piece that continues the prompt.

        Args:
            request: The request.
            texts: Choices to use in place of the request's.

        Raises:
            RequestError: If a choice cannot be tokenized or leaves no token, or has tokens that
                the model does not know.
        """
        texts = request.choices if texts is None else texts
        encoded = self._encoder.encode_choices(self._written(request), texts)
        for number, piece in enumerate(encoded, start=1):
            if not piece.token_ids:
                raise RequestError(f"choice {number} ({texts[number - 1]!r:.40}) has no tokens")
            self._check_known(f"choice {number}", piece)
        return tuple(piece.token_ids for piece in encoded)

    @property
    def is_chat(self) -> bool:
        """True if requests are put into a chat template."""
        return self._template is not None

    def in_chat(self, request: Request) -> Request:
        """Return the request as prefix, segments and suffix only, as its tokens are.

        They include the text of the chat template, if one is used, and everything that stands in
        other turns.

        Raises:
            RequestError: If the template fails on it, or changes its text; if it has turns and
                there is no template.
        """
        written = self._written(request)
        texts = zip(request.segments, written.gaps, strict=True)
        return replace(
            request,
            prefix="".join(written.before),
            segments=tuple(text + gap for text, gap in texts),
            suffix="".join(written.after),
            system="",
            messages=(),
            answer_prefix="",
        )

    def chat_text(self, request: Request) -> str:
        """Return the whole text of a prompt, as its tokens are."""
        written = self.in_chat(request)
        return written.prefix + "".join(written.segments) + written.suffix

    def decode(self, token_ids: tuple[int, ...]) -> str:
        """Return the text of generated tokens as a continuation, without special tokens."""
        return self._decoder.decode(token_ids, skip_special_tokens=True)

    @property
    def decodes_in_order(self) -> bool:
        """False if later tokens may change the text of earlier ones, whole characters included."""
        return self._decoder.is_in_order

    def token_text(self, token_id: int) -> str:
        """Return the text of one token in the middle of a text, including a leading space."""
        return self._decoder.decode((token_id,), skip_special_tokens=False)

    def token_texts(self, text: str) -> list[str]:
        """Split a text that continues another into the texts of its tokens."""
        encoded = self._encoder.encode_text(text)
        return [self.token_text(token_id) for token_id in encoded.token_ids]

    def _written(self, request: Request) -> WrittenPrompt:
        if self._template is None:
            return WrittenPrompt.without_template(request)
        return self._template.write(request)

    @cached_property
    def _begin(self) -> tuple[int, ...]:
        bos = self._tokenizer.bos_token_id
        if self._template or bos is None:  # a chat template writes the token itself
            return ()
        with tokenizer_errors("it cannot be tokenized"):
            return (bos,) if self._tokenizer.encode("a")[0] == bos else ()

    def _check_known(self, name: str, piece: Encoded) -> None:
        largest = max(piece.token_ids, default=0)
        if self._num_embeddings is not None and largest >= self._num_embeddings:
            token = self._tokenizer.convert_ids_to_tokens(largest)
            raise RequestError(
                f"{name} has token {largest} ({token!r}), but the model knows tokens 0 to "
                f"{self._num_embeddings - 1} only; remove that text, or give the model the "
                "tokenizer it was trained with"
            )


def _with_special_text(tokenized: TokenizedRequest, prompt: EncodedPrompt) -> TokenizedRequest:
    """Note the text of a special token that a prompt holds."""
    texts = [piece.special_text for _, piece in prompt.named() if piece.special_text]
    return replace(tokenized, special_text=texts[0]) if texts else tokenized
