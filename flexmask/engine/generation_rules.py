"""The rules of a model's generation config: its logits processors and what ends a row.

They are applied as transformers' `generate` applies them with ``do_sample=False``.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Self, cast

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from flexmask.errors import FlexMaskWarning, ModelError
from flexmask.transformers_internals import (
    default_generation_values,
    make_logits_processors,
    misplaced_generation_values,
)

SAMPLING_FIELDS = (
    "temperature",
    "top_k",
    "top_p",
    "min_p",
    "top_h",
    "typical_p",
    "epsilon_cutoff",
    "eta_cutoff",
)
"""Fields that only matter where `generate` samples."""

REFUSED = {
    "num_beams": ("beam search", 1),
    "constraints": ("constrained beam search", None),
    "force_words_ids": ("constrained beam search", None),
    "dola_layers": ("DoLa decoding", None),
    "assistant_ensemble_weight": ("decoding with an assistant's probabilities", None),
    "guidance_scale": ("guidance by a second, unconditional pass", 1),
    "token_healing": ("token healing", False),
    "max_time": ("a limit of time", None),
}
"""Fields that change the tokens of `generate` in a way that flexmask does not support, with the
name of that way and the value that turns it off."""

_PROCESSOR_ERRORS = (ValueError, TypeError, IndexError, RuntimeError, AttributeError)
"""Errors that processors raise for values that they do not accept."""


@dataclass(frozen=True)
class GenerationRules:
    """The rules of a model's generation config; the engine reads them for each run.

    Applied: ``repetition_penalty``, ``no_repeat_ngram_size`` and their ``encoder_`` forms, which
    look at the prompt, ``bad_words_ids``, ``sequence_bias``, ``suppress_tokens``,
    ``begin_suppress_tokens``, ``min_length``, ``min_new_tokens``, ``forced_bos_token_id``,
    ``forced_eos_token_id``, ``exponential_decay_length_penalty``, ``remove_invalid_values``,
    ``renormalize_logits``, ``watermarking_config``, and whatever else the model's own class adds;
    also ``eos_token_id`` and ``stop_strings``. Refused: `REFUSED`, and ``penalty_alpha`` where
    `generate` would use contrastive search. Ignored: `SAMPLING_FIELDS`, ``max_length`` and
    ``max_new_tokens``, which are options of the run; and fields that only matter for several
    beams, several sequences or speed.

    Attributes:
        model: The model.
        eos_token_ids: Tokens that end a row.
        stop_strings: Strings that end a row.
        config: A copy of the generation config, without sampling; None where the model has none.
        applied: Class names of the logits processors that it asks for.
        sampling: Fields by which `generate` would sample, where they differ from the defaults;
            None where it would not sample.
    """

    model: PreTrainedModel
    eos_token_ids: frozenset[int]
    stop_strings: tuple[str, ...] = ()
    config: GenerationConfig | None = field(default=None, repr=False)
    applied: tuple[str, ...] = ()
    sampling: Mapping[str, Any] | None = None

    @classmethod
    def of(cls, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Self:
        """Read the rules of a model.

        The end-of-sequence tokens are those of the generation config, else the tokenizer's; an
        empty list means that no token ends a row.

        Raises:
            ModelError: If the generation config cannot be applied.
        """
        config = copy.deepcopy(model.generation_config)
        eos_token_ids = _eos_token_ids(config, model, tokenizer)
        if config is None:
            return cls(model, eos_token_ids)
        _refuse_misplaced(model)
        try:
            _refuse_unsupported(config)
            stop, sampling = _stop_strings(config), _sampling_of(config)
            # Values of another way to generate would change which processors there are.
            config.do_sample, config.num_beams, config.num_return_sequences = False, 1, 1
            rules = cls(model, eos_token_ids, stop, config, sampling=sampling)
            return replace(rules, applied=rules._try_processors())
        except _PROCESSOR_ERRORS as error:
            reason = " ".join(str(error).split())
            raise ModelError(
                f"the model's generation config cannot be applied: {reason}; "
                "correct its generation_config.json"
            ) from error

    @property
    def keeps_invalid_values(self) -> bool:
        """True if NaN and infinite logits are kept, so that they become an error."""
        return self.config is None or self.config.remove_invalid_values is not True

    def processors(
        self, prompt: Sequence[int], max_new_tokens: int, device: torch.device
    ) -> LogitsProcessorList:
        """Make the logits processors that `generate` would use for a prompt alone.

        They may have state, so each row needs its own.

        Args:
            prompt: Token ids of the prompt.
            max_new_tokens: Most tokens generated after it.
            device: Device of the logits.
        """
        if self.config is None:
            return LogitsProcessorList()
        config, length = copy.copy(self.config), len(prompt)
        config.max_length = length + max_new_tokens
        if config.min_new_tokens is not None:
            config.min_length = length + config.min_new_tokens
        eos = sorted(self.eos_token_ids)
        return make_logits_processors(self.model, config, prompt, eos, device)

    def _try_processors(self) -> tuple[str, ...]:
        """Apply the processors once to made-up logits, to find values that they do not accept.

        On the CPU, where an index out of range is an exception; on a GPU it would end the process.

        Returns:
            Class names of the processors.
        """
        vocab_size = self.model.config.get_text_config().vocab_size
        # One prompt token and one new one: the first token and the last one in a single step.
        processors = self.processors([0], 1, torch.device("cpu"))
        apply_processors(processors, torch.zeros(1, 1).long(), torch.zeros(1, vocab_size))
        return tuple(type(processor).__name__ for processor in processors)


def apply_processors(processors: LogitsProcessorList, token_ids: Tensor, logits: Tensor) -> Tensor:
    """Apply the logits processors of one row.

    Args:
        processors: The processors made for its prompt.
        token_ids: ``(1, S)``, the prompt and the tokens generated so far.
        logits: ``(1, V)`` in float32.

    Returns:
        Scores ``(1, V)``.
    """
    return processors(cast(torch.LongTensor, token_ids), cast(torch.FloatTensor, logits))


def _refuse_misplaced(model: PreTrainedModel) -> None:
    """Refuse generation fields in the model's own config, as `generate` does.

    Raises:
        ModelError: If there is one.
    """
    if misplaced := misplaced_generation_values(model.config):
        name = next(iter(misplaced))
        raise ModelError(
            f"the model's config holds {name}, which belongs to its generation config; "
            f"set model.generation_config.{name} instead"
        )


def _refuse_unsupported(config: GenerationConfig) -> None:
    for name, (meaning, neutral) in REFUSED.items():
        value = getattr(config, name, None)
        if value is not None and value != neutral:
            raise ModelError(
                f"the model's generation config asks for {meaning} ({name}={value!r}), which "
                f"flexmask does not do; set its {name} to {neutral}"
            )
    alpha, top_k = getattr(config, "penalty_alpha", None), config.top_k
    if alpha is not None and alpha > 0 and (top_k is None or top_k > 1):
        raise ModelError(
            f"the model's generation config asks for contrastive search (penalty_alpha={alpha!r}),"
            " which flexmask does not do; set its penalty_alpha to None"
        )


def _sampling_of(config: GenerationConfig) -> dict[str, Any] | None:
    if config.do_sample is not True:
        return None
    defaults = default_generation_values(config)
    values = {name: getattr(config, name, None) for name in SAMPLING_FIELDS}
    return {
        name: value
        for name, value in values.items()
        if value is not None and value != defaults.get(name)
    }


def _stop_strings(config: GenerationConfig) -> tuple[str, ...]:
    stop = config.stop_strings
    strings = [stop] if isinstance(stop, str) else [] if stop is None else stop
    if not all(isinstance(text, str) and text for text in strings):
        raise ModelError(
            f"stop_strings of the model's generation config must be texts, got {stop!r}; "
            "correct its generation_config.json"
        )
    return tuple(strings)


def _eos_token_ids(
    config: GenerationConfig | None, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase
) -> frozenset[int]:
    named = None if config is None else _token_ids(config.eos_token_id)
    if named is None:
        named = _token_ids(tokenizer.eos_token_id) or ()
    vocab_size = model.config.get_text_config().vocab_size
    known = frozenset(token_id for token_id in named if 0 <= token_id < vocab_size)
    if unknown := sorted(set(named) - known):
        warnings.warn(
            f"eos_token_id {', '.join(map(str, unknown))} is none of the model's {vocab_size} "
            "tokens, so it ends no row",
            FlexMaskWarning,
            stacklevel=2,
        )
    return known


def _token_ids(value: Any) -> tuple[int, ...] | None:
    """Read token ids from a config: one, several, a tensor of them, or None."""
    if isinstance(value, Tensor):
        value = value.tolist()
    if value is None:
        return None
    ids = [value] if isinstance(value, int) else value
    if not isinstance(ids, (list, tuple, set, frozenset)) or not all(
        isinstance(token_id, int) and not isinstance(token_id, bool) for token_id in ids
    ):
        raise ModelError(
            f"eos_token_id must be a token id or a list of them, got {value!r}; "
            "correct the model's generation_config.json"
        )
    return tuple(ids)
