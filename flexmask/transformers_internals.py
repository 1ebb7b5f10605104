"""The private parts of transformers that flexmask uses; no other module uses any.

All of them exist and work as described in transformers 5.17 and 5.24 (`flexmask.version.TESTED`
lists the versions of the tests).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast
from unittest.mock import patch

import torch
from transformers import (
    GenerationConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    modeling_utils,
)
from transformers.generation.logits_process import LogitsProcessorList
from transformers.utils.hub import cached_file


def attention_implementation(config: PreTrainedConfig) -> str | None:
    """Return the name of a config's attention backend."""
    return cast("str | None", config._attn_implementation)


def set_attention_implementation(config: PreTrainedConfig, name: str) -> None:
    """Set the attention backend of a config and of its sub-configs."""
    config._attn_implementation = name


def is_stateful(model: PreTrainedModel) -> bool:
    """Return True if a model declares a recurrent state."""
    return bool(getattr(model, "_is_stateful", False))


def find_model_file(location: str, name: str, *, must_exist: bool) -> Path | None:
    """Return the path of one file of a model on the hub, in the local cache.

    Returns:
        None if the model has no such file and it need not exist.

    Raises:
        OSError: If it must exist and does not, or the hub cannot be reached.
    """
    # Only the keyword is private.
    found = cached_file(location, name, _raise_exceptions_for_missing_entries=must_exist)
    return None if found is None else Path(found)


@contextmanager
def loading_parts(
    change_model: Callable[[PreTrainedModel], None], part_of: Callable[[str, Any], Any]
) -> Iterator[None]:
    """Make ``from_pretrained`` load parts of weights into a model that is changed before.

    Args:
        change_model: Called with the model when its modules are there, on the meta device, and no
            weight is.
        part_of: Called with the name of a weight and the slice of safetensors that reads it;
            returns what reads it instead.
    """
    plan_of_dtypes = cast(Any, PreTrainedModel)._get_dtype_plan  # called between the two

    def after_making(model: PreTrainedModel, dtype: torch.dtype) -> Any:
        change_model(model)
        return plan_of_dtypes(model, dtype)

    class Parts:
        """A file in safetensors, of which parts are read."""

        def __init__(self, *args: Any, **options: Any) -> None:
            self._file = safe_open(*args, **options)

        def __enter__(self) -> Any:
            return self._file.__enter__()

        def __exit__(self, *args: object) -> None:
            self._file.__exit__(*args)

        def keys(self) -> Sequence[str]:
            return cast("Sequence[str]", self._file.keys())

        def get_slice(self, name: str) -> Any:
            return part_of(name, self._file.get_slice(name))

    safe_open = cast(Any, modeling_utils).safe_open
    with (
        patch.object(PreTrainedModel, "_get_dtype_plan", after_making),
        patch.object(modeling_utils, "safe_open", Parts),
    ):
        yield


def encodes_by_backend(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Return True if a tokenizer adds no code of its own to its backend of `tokenizers`."""
    own: Any = type(tokenizer)
    return tokenizer.is_fast and own._encode_plus is PreTrainedTokenizerFast._encode_plus


def misplaced_generation_values(config: PreTrainedConfig) -> Mapping[str, Any]:
    """Return the values of a model's config that belong in its generation config, by name."""
    return cast("Mapping[str, Any]", config._get_generation_parameters())


def default_generation_values(config: GenerationConfig) -> Mapping[str, Any]:
    """Return the default values of a generation config."""
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
        config: Its generation config; receives the end tokens as an attribute.
        prompt: Token ids of the prompt.
        eos_token_ids: Tokens that end a row.
        device: Device of the logits.
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
