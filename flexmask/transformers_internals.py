"""The private parts of transformers that flexmask uses; no other module does.

They were seen, and work as described, in transformers 5.17 and 5.24 (`flexmask.version.TESTED`
lists the versions of the tests).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import torch
from transformers import GenerationConfig, PreTrainedConfig, PreTrainedModel
from transformers.generation.logits_process import LogitsProcessorList
from transformers.utils.hub import cached_file


def attention_implementation(config: PreTrainedConfig) -> str | None:
    """The name of the attention backend that models of a config use."""
    return cast("str | None", config._attn_implementation)


def set_attention_implementation(config: PreTrainedConfig, name: str) -> None:
    """Choose the attention backend of a config and of the configs within it."""
    config._attn_implementation = name


def is_stateful(model: PreTrainedModel) -> bool:
    """Whether a model says that it keeps a recurrent state."""
    return bool(getattr(model, "_is_stateful", False))


def find_model_file(location: str, name: str, *, must_exist: bool) -> Path | None:
    """Find one file of a model on the hub or in its cache.

    Returns:
        None if the model has no such file, and it need not have it.

    Raises:
        OSError: If it must exist and does not, or the hub cannot be reached.
    """
    # The keyword alone is private.
    found = cached_file(location, name, _raise_exceptions_for_missing_entries=must_exist)
    return None if found is None else Path(found)


def misplaced_generation_values(config: PreTrainedConfig) -> Mapping[str, Any]:
    """Values in a model's config that belong into its generation config, by name."""
    return cast("Mapping[str, Any]", config._get_generation_parameters())


def default_generation_values(config: GenerationConfig) -> Mapping[str, Any]:
    """What `generate` takes where a generation config names no value."""
    return cast("Mapping[str, Any]", config._get_default_generation_params())


def make_logits_processors(
    model: PreTrainedModel,
    config: GenerationConfig,
    prompt: Sequence[int],
    eos_token_ids: Sequence[int],
    device: torch.device,
) -> LogitsProcessorList:
    """Make the processors that `generate` would use for one prompt.

    Args:
        model: The model.
        config: Its generation config, which is changed.
        prompt: Token ids of the prompt.
        eos_token_ids: Tokens that end a row.
        device: Where the logits are.
    """
    eos = list(eos_token_ids)
    cast(Any, config)._eos_token_tensor = torch.tensor(eos, device=device) if eos else None
    make: Callable[..., LogitsProcessorList] = cast(Any, model)._get_logits_processor
    return make(
        generation_config=config,
        input_ids_seq_length=len(prompt),
        encoder_input_ids=torch.tensor([list(prompt)], device=device),
        device=device,
        model_kwargs={},
    )
