"""Checks of one model: compares flexmask with transformers' own attention."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flexmask.attention import BACKEND, DENSE_BACKEND
from flexmask.attention.backend import register_attention
from flexmask.attention.strategy_context import use_strategy
from flexmask.device import resolve_device
from flexmask.doctor.check_result import Check, WrongResult
from flexmask.encoding.tokenization import RequestTokenizer
from flexmask.engine.engine import Engine
from flexmask.engine.model_loading import load_model
from flexmask.error_text import described
from flexmask.errors import AttentionError, FlexMaskError
from flexmask.layout import Layout
from flexmask.plugins.registry import make_strategy
from flexmask.request import Request
from flexmask.transformers_internals import (
    attention_implementation,
    set_attention_implementation,
)

REFERENCE = "eager"
"""transformers' simplest attention, which every model supports."""

PROMPTS = (
    Request(("Q: Where was Ada Lovelace born?",), suffix="\nA:"),
    Request(("Q: Name the capital city of the country called France, please.",), suffix="\nA:"),
)
NEW_TOKENS = 10

BACKEND_NAME = "model.generate under use_strategy"
ENGINE_NAME = "Engine"
DENSE_NAME = f"{BACKEND_NAME}, {DENSE_BACKEND}"


def check_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[Check]:
    """Compare logits and greedy tokens of a model with those under transformers' own attention.

    Two prompts of different lengths run as one batch, once through ``model.generate`` under
    `flexmask.use_strategy` and once through the engine, under ``causal``. Each must generate what
    the model generates for it alone under `REFERENCE`, without a cache.

    Args:
        model: A model loaded with ``attn_implementation="flexmask"``, which is set again at the
            end.
        tokenizer: Its tokenizer.
    """
    comparison = _Comparison(model, tokenizer)
    _attend_by(model, BACKEND)
    return [
        _checked(BACKEND_NAME, comparison.under_use_strategy),
        _checked(ENGINE_NAME, comparison.by_engine),
    ]


def check_dense(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> Check:
    """Compare a model as `check_model` does, under ``flexmask_dense`` alone.

    Models that mask scores in code of their own run only so. The model keeps
    ``flexmask_dense``.
    """
    comparison = _Comparison(model, tokenizer)
    _attend_by(model, DENSE_BACKEND)
    return _checked(DENSE_NAME, comparison.under_use_strategy)


def load_and_check(
    model: str,
    device: str,
    dtype: str,
    *,
    trust_remote_code: bool,
    adapter: str | None = None,
    quantize: str | None = None,
) -> list[Check]:
    """Load a model and check it.

    Args:
        model: Hub id, folder or file.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        trust_remote_code: Run code that comes with the model.
        adapter: Folder of a LoRA adapter to merge into it.
        quantize: What its weights are rounded to; None to keep them.

    Raises:
        ModelError: If it cannot be loaded.
        OptionError: If the device or dtype is not available.
    """
    target = resolve_device(device)

    def loaded(needs_backend: bool) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        return load_model(
            model,
            device=target,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            needs_backend=needs_backend,
            adapter=adapter,
            quantize=quantize,
        )

    try:
        with_backend = loaded(True)
    except AttentionError as error:
        found = refused(described(error))
    else:
        return check_model(*with_backend)
    try:
        return [*found, check_dense(*loaded(False))]
    except FlexMaskError:  # it fails here too; the first reason is the one to report
        return found


def refused(reason: str) -> list[Check]:
    """Return the outcomes of `check_model` for a model that cannot be loaded with ``flexmask``."""
    return [Check(name, "unavailable", reason) for name in (BACKEND_NAME, ENGINE_NAME)]


def _checked(name: str, run: Callable[[], str]) -> Check:
    try:
        return Check(name, "ok", run())
    except WrongResult as error:
        return Check(name, "broken", str(error), "please report it, with the model's name")
    except FlexMaskError as error:
        return Check(name, "unavailable", described(error))


_Outcome = tuple[Sequence[int], Tensor | None]
"""Greedy tokens, and their logits ``(T, V)`` if known."""


class _Comparison:
    """A model, and its generations for each prompt alone under transformers' own attention."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> None:
        """Generate under `REFERENCE`."""
        self._model, self._tokenizer = model, tokenizer
        self._strategy = make_strategy("causal", {})
        tokenize = RequestTokenizer(tokenizer)
        self._layouts = [self._strategy.layout(tokenize(request)) for request in PROMPTS]
        register_attention()
        _attend_by(model, REFERENCE)
        self._reference = [_alone(model, layout) for layout in self._layouts]
        ids = model.generation_config.eos_token_id if model.generation_config else None
        self._eos = [ids] if isinstance(ids, int) else ids or []

    def under_use_strategy(self) -> str:
        """Compare ``model.generate`` under `flexmask.use_strategy` with the reference."""
        with use_strategy(self._strategy, self._layouts, self._model.device) as inputs:
            found = _generated(self._model, inputs)
        return _compared(self._reference, found, self._eos, self._model.dtype)

    def by_engine(self) -> str:
        """Compare the engine with the reference."""
        engine = Engine(self._model, self._tokenizer)
        run = engine.generate(PROMPTS, self._strategy, max_new_tokens=NEW_TOKENS)
        found = [(generation.token_ids, None) for generation in run]
        return _compared(self._reference, found, self._eos, self._model.dtype)


def _attend_by(model: PreTrainedModel, implementation: str) -> None:
    """Set the attention implementation of a loaded model.

    transformers refuses this, with a line in its log, for a model that attends in code of its own;
    such code uses only the name, to ask for masks.
    """
    model.set_attn_implementation(implementation)
    if attention_implementation(model.config.get_text_config()) != implementation:
        set_attention_implementation(model.config, implementation)


def _alone(model: PreTrainedModel, layout: Layout) -> _Outcome:
    """Generate for one prompt alone, without a cache."""
    token_ids = layout.token_tensor[None].to(model.device)
    inputs = {"input_ids": token_ids, "attention_mask": torch.ones_like(token_ids)}
    return _generated(model, inputs, use_cache=False)[0]


def _generated(
    model: PreTrainedModel, inputs: dict[str, Tensor], **options: Any
) -> list[_Outcome]:
    output = cast(Any, model).generate(
        **inputs,
        max_new_tokens=NEW_TOKENS,
        do_sample=False,
        output_logits=True,
        return_dict_in_generate=True,
        **options,
    )
    logits = torch.stack(output.logits, dim=1).float()
    new = output.sequences[:, inputs["input_ids"].shape[1] :].tolist()
    return list(zip(new, logits, strict=True))


def _compared(
    reference: Sequence[_Outcome],
    found: Sequence[_Outcome],
    eos: Collection[int],
    dtype: torch.dtype,
) -> str:
    """Compare generations up to the first token where the two best logits are about equal."""
    worst = 0.0
    for (wanted, logits), (tokens, own) in zip(reference, found, strict=True):
        assert logits is not None
        allowed = max(1e-3, 4 * torch.finfo(dtype).eps) * float(logits.abs().max())
        for number, (token, expected) in enumerate(zip(tokens, wanted, strict=False)):
            at = logits[number]
            if own is not None:
                difference = float((own[number] - at).abs().max())
                if not difference <= allowed:
                    raise WrongResult(
                        f"logits of token {number + 1} differ by {difference:.2g} of "
                        f"{float(at.abs().max()):.2g}"
                    )
                worst = max(worst, difference)
            if token != expected and float(at[expected] - at[token]) > allowed:
                raise WrongResult(f"token {number + 1} is {token}, expected {expected}")
            if token != expected or token in eos:
                break
    known = "" if worst == 0.0 else f", logits within {worst:.0e}"
    return f"the greedy tokens of {REFERENCE} attention{known}"
