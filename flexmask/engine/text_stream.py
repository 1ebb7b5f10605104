"""The text of one generation, piece by piece while it is generated."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from flexmask.encoding.tokenization import RequestTokenizer
from flexmask.engine.generation_run import GenerationRun
from flexmask.generation import Generation

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
"""The character to which a tokenizer decodes bytes that do not form a whole character."""


class TextStream(Iterator[str]):
    """Pieces of a text, which together are that of the generation; `Engine.stream` makes it.

    A piece is handed out once no later token can change it: whole characters, that do not begin a
    stop string.

    Attributes:
        run: The run of the engine, with its statistics.
    """

    def __init__(
        self, run: GenerationRun, tokenizer: RequestTokenizer, stop: Sequence[str]
    ) -> None:
        """Start nothing yet; iterating does.

        Args:
            run: A run of one request, not started.
            tokenizer: Decodes its tokens.
            stop: Strings that end its text.
        """
        self.run = run
        self._tokenizer = tokenizer
        self._stop = stop
        self._generation: Generation | None = None
        self._pieces = self._made()

    @property
    def generation(self) -> Generation:
        """The generation, once the stream has ended.

        Raises:
            ValueError: If it has not.
        """
        if self._generation is None:
            raise ValueError("the stream has not ended; iterate over it first")
        return self._generation

    def __next__(self) -> str:
        """Return the next piece, which is not empty.

        Raises:
            RequestError: If no token can be chosen, because logits are NaN or infinite.
        """
        return next(self._pieces)

    def _made(self) -> Iterator[str]:
        shown = 0
        for finished in self.run.steps():
            if finished:
                (self._generation,) = finished
                text = self._generation.text
            else:
                text = self._settled(self.run.tokens_in_flight)
            if len(text) > shown:
                piece, shown = text[shown:], len(text)
                yield piece

    def _settled(self, token_ids: Sequence[int]) -> str:
        """Return the beginning of the text that later tokens leave as it is."""
        if not token_ids or not self._tokenizer.decodes_in_order:
            return ""
        text = self._tokenizer.decode(tuple(token_ids)).rstrip(_REPLACEMENT)
        begun = (
            size
            for stop in self._stop
            for size in range(min(len(stop) - 1, len(text)), 0, -1)
            if text.endswith(stop[:size])
        )
        return text[: len(text) - max(begun, default=0)]
