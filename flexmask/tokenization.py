"""From the texts of a request to token ids."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cached_property, lru_cache

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from flexmask.checkpoint.folder import check_tokenizer_files
from flexmask.checkpoint.source import CheckpointSource
from flexmask.checkpoint.transformers_calls import errors_in_one_line, shown
from flexmask.errors import ModelError, RequestError
from flexmask.layout import TokenizedRequest
from flexmask.request import Request

_SEGMENT_MARK = "<<flexmask segment>>"


def load_tokenizer(model: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model, by hub id, folder or GGUF file, and not the model.

    Raises:
        ModelError: If there is none.
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
    """Tokenizes prefix, segments and suffix, each by itself.

    Pieces are encoded apart, so that a segment has the same tokens whatever stands beside it.
    The prefix begins with the beginning-of-sequence token where the tokenizer adds one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, *, chat_template: bool = False) -> None:
        """Wrap ``tokenizer``.

        Args:
            tokenizer: The model's tokenizer.
            chat_template: Put the request into the user turn of the tokenizer's chat template:
                what the template writes before the segments joins the prefix, and what follows
                joins the suffix.

        Raises:
            ModelError: If a chat template is asked for and the tokenizer has none.
        """
        if chat_template and not getattr(tokenizer, "chat_template", None):
            raise ModelError("this tokenizer has no chat template; leave out --chat-template")
        self._tokenizer = tokenizer
        self._chat_template = chat_template
        # Few-shot prefixes and suffixes repeat from row to row.
        self._encode_shared = lru_cache(maxsize=256)(self._encode)
        self._in_user_turn = lru_cache(maxsize=256)(self._apply_chat_template)
        self._ahead: dict[str, tuple[int, ...]] = {}

    def read_ahead(self, requests: Iterable[Request]) -> None:
        """Encode the segments of requests that are about to be tokenized, all in one call."""
        texts = list({segment for request in requests for segment in request.segments})
        self._ahead = dict(zip(texts, self._encode_all(texts), strict=True))

    def __call__(self, request: Request) -> TokenizedRequest:
        """Tokenize ``request``.

        Raises:
            RequestError: If it leaves a segment or the fusion tail without tokens.
        """
        request = self.in_chat(request)
        return TokenizedRequest.from_token_ids(
            prefix=self._begin + self._encode_shared(request.prefix),
            segments=[self._ahead.get(text) or self._encode(text) for text in request.segments],
            suffix=self._encode_shared(request.suffix),
        )

    def in_chat(self, request: Request) -> Request:
        """The request with what the chat template writes around it, where there is one.

        Raises:
            RequestError: If the template does not write the user turn once.
        """
        if not self._chat_template:
            return request
        prefix, suffix = self._in_user_turn(request.prefix, request.suffix)
        return replace(request, prefix=prefix, suffix=suffix)

    def decode(self, token_ids: tuple[int, ...]) -> str:
        """Text of generated tokens, special tokens left out."""
        text = self._tokenizer.decode(
            list(token_ids), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        assert isinstance(text, str)
        return text

    def token_text(self, token_id: int) -> str:
        """Text of one token as it stands within a text, leading space included."""
        # Decoders drop the space before a first token, so it is decoded after another.
        before = self._encode("a")[-1:]
        texts = [
            self._tokenizer.decode(list(token_ids), clean_up_tokenization_spaces=False)
            for token_ids in (before, (*before, token_id))
        ]
        return str(texts[1]).removeprefix(str(texts[0]))

    def token_texts(self, text: str) -> list[str]:
        """Cut a text into its tokens."""
        return [self.token_text(token_id) for token_id in self._encode(text)]

    def _encode(self, text: str) -> tuple[int, ...]:
        return self._encode_all([text])[0] if text else ()

    def _encode_all(self, texts: Sequence[str]) -> list[tuple[int, ...]]:
        if not texts:
            return []
        encoded = self._tokenizer(list(texts), add_special_tokens=False)
        return [tuple(token_ids) for token_ids in encoded["input_ids"]]

    @cached_property
    def _begin(self) -> tuple[int, ...]:
        bos = self._tokenizer.bos_token_id
        # A chat template writes the token itself.
        if self._chat_template or bos is None or self._tokenizer.encode("a")[0] != bos:
            return ()
        return (bos,)

    def _apply_chat_template(self, prefix: str, suffix: str) -> tuple[str, str]:
        turn = {"role": "user", "content": prefix + _SEGMENT_MARK + suffix}
        text = self._tokenizer.apply_chat_template(
            [turn], tokenize=False, add_generation_prompt=True
        )
        parts = str(text).split(_SEGMENT_MARK)
        if len(parts) != 2:
            raise RequestError(
                f"the chat template writes the user turn {len(parts) - 1} times; "
                "flexmask needs it once"
            )
        return parts[0], parts[1]
