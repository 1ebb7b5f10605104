"""Parts of an engine that its runs share, made again only once what they depend on has changed."""

from __future__ import annotations

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flexmask.encoding.tokenization import RequestTokenizer
from flexmask.engine.generation_rules import GenerationRules
from flexmask.engine.model_runner import num_embeddings


class KeptParts:
    """The tokenizer of requests and the rules of generation, as the last run had them.

    Making a tokenizer of requests edits a copy of the model's, which takes as long as loading it.
    """

    def __init__(self, model: PreTrainedModel) -> None:
        """Keep nothing yet.

        Args:
            model: The engine's model.
        """
        self._model = model
        self._tokenizer: tuple[object, RequestTokenizer] | None = None
        self._rules: tuple[object, GenerationRules] | None = None

    def request_tokenizer(
        self,
        tokenizer: PreTrainedTokenizerBase,
        *,
        chat_template: bool = False,
        allow_special_tokens: bool = False,
    ) -> RequestTokenizer:
        """Return the tokenizer of a run.

        Args:
            tokenizer: The model's tokenizer.
            chat_template: As in `RequestTokenizer`, like the other.
            allow_special_tokens: As there.

        Raises:
            ModelError: If a chat template is asked for and there is none that can be used.
        """
        key = (
            id(tokenizer),
            len(tokenizer),
            str(tokenizer.special_tokens_map),
            str(tokenizer.chat_template),
            [getattr(tokenizer, f"add_{end}_token", None) for end in ("bos", "eos")],
            chat_template,
            allow_special_tokens,
        )
        if self._tokenizer is None or self._tokenizer[0] != key:
            made = RequestTokenizer(
                tokenizer,
                chat_template=chat_template,
                allow_special_tokens=allow_special_tokens,
                num_embeddings=num_embeddings(self._model),
            )
            self._tokenizer = (key, made)
        return self._tokenizer[1]

    def rules(self, tokenizer: PreTrainedTokenizerBase) -> GenerationRules:
        """Return the rules of the model's generation config, as it is now.

        Args:
            tokenizer: The model's tokenizer.

        Raises:
            ModelError: If they cannot be applied.
        """
        config = self._model.generation_config
        key = (
            None if config is None else config.to_dict(),
            dict(vars(self._model.config)),
            tokenizer.eos_token_id,
        )
        if self._rules is None or self._rules[0] != key:
            self._rules = (key, GenerationRules.of(self._model, tokenizer))
        return self._rules[1]
