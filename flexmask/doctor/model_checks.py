"""Checks of one model: flexmask against transformers' own attention, on the model itself."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from flexmask.attention.backend import BACKEND, register_attention
from flexmask.attention.strategy_context import use_strategy
from flexmask.device import resolve_device, resolve_dtype
from flexmask.doctor.check_result import Check, WrongResult
from flexmask.encoding.tokenization import RequestTokenizer
from flexmask.engine.engine import Engine
from flexmask.engine.model_loading import load_model
from flexmask.error_text import described
from flexmask.errors import AttentionError, FlexMaskError
from flexmask.layout import Layout
from flexmask.plugins.registry import make_strategy
from flexmask.request import Request
from flexmask.strategy import Strategy

REFERENCE = "eager"
"""transformers' plainest attention, which every model has."""

PROMPTS = (
    Request(("Q: Where was Ada Lovelace born?",), suffix="\nA:"),
    Request(("Q: Name the capital city of the country called France, please.",), suffix="\nA:"),
)
NEW_TOKENS = 10

BACKEND_NAME = "model.generate under use_strategy"
ENGINE_NAME = "Engine"


def check_model(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> list[Check]:
    """Compare logits and greedy tokens of a model with those under transformers' own attention.

    Two prompts of different lengths run as one batch, once through ``model.generate`` under
    `flexmask.use_strategy` and once through the engine, under ``causal``; each must give what the
    model gives for it alone under `REFERENCE`, without a cache. The model ends with ``flexmask``.
    """
    strategy = make_strategy("causal", {})
    tokenize = RequestTokenizer(tokenizer)
    layouts = [strategy.layout(tokenize(request)) for request in PROMPTS]
    register_attention()
    model.set_attn_implementation(REFERENCE)
    reference = [_alone(model, layout) for layout in layouts]
    ids = model.generation_config.eos_token_id if model.generation_config else None
    eos = [ids] if isinstance(ids, int) else ids or []

    def backend() -> str:
        return _compared(reference, _under_use_strategy(model, strategy, layouts), eos)

    def engine() -> str:
        run = Engine(model, tokenizer).generate(PROMPTS, strategy, max_new_tokens=NEW_TOKENS)
        return _compared(reference, [(g.token_ids, None) for g in run], eos)

    model.set_attn_implementation(BACKEND)
    if model.config.get_text_config()._attn_implementation != BACKEND:
        return _refused(f"{type(model).__name__} supports no attention backends of transformers")
    return [_checked(BACKEND_NAME, backend), _checked(ENGINE_NAME, engine)]


def load_and_check(model: str, device: str, dtype: str, *, trust_remote_code: bool) -> list[Check]:
    """Load a model and check it.

    Args:
        model: Hub id, folder or file.
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.
        dtype: ``auto``, ``float32``, ``bfloat16`` or ``float16``.
        trust_remote_code: Run code that comes with the model.

    Raises:
        ModelError: If it cannot be loaded.
        OptionError: If device or dtype cannot be had.
    """
    target = resolve_device(device)
    try:
        loaded = load_model(
            model,
            device=target,
            dtype=resolve_dtype(dtype, target),
            trust_remote_code=trust_remote_code,
        )
    except AttentionError as error:
        return _refused(described(error))
    return check_model(*loaded)


def _refused(reason: str) -> list[Check]:
    return [Check(name, "unavailable", reason) for name in (BACKEND_NAME, ENGINE_NAME)]


def _checked(name: str, run: Callable[[], str]) -> Check:
    try:
        return Check(name, "ok", run())
    except WrongResult as error:
        return Check(name, "broken", str(error), "please report it, with the model's name")
    except FlexMaskError as error:
        return Check(name, "unavailable", described(error))


_Outcome = tuple[Sequence[int], Tensor | None]
"""Greedy tokens, and the logits ``(T, V)`` that chose them where they are known."""


def _alone(model: PreTrainedModel, layout: Layout) -> _Outcome:
    """Generate for one prompt by itself, all of it run anew for each token."""
    token_ids = layout.token_tensor[None].to(model.device)
    inputs = {"input_ids": token_ids, "attention_mask": torch.ones_like(token_ids)}
    return _generated(model, inputs, use_cache=False)[0]


def _under_use_strategy(
    model: PreTrainedModel, strategy: Strategy, layouts: Sequence[Layout]
) -> list[_Outcome]:
    with use_strategy(strategy, layouts, model.device) as inputs:
        return _generated(model, inputs)


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
    reference: Sequence[_Outcome], found: Sequence[_Outcome], eos: Collection[int]
) -> str:
    """Compare generations, up to where the reference's two best tokens are as good as equal."""
    worst = 0.0
    for (wanted, logits), (tokens, own) in zip(reference, found, strict=True):
        assert logits is not None
        allowed = _tolerance(logits)
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


def _tolerance(logits: Tensor) -> float:
    return max(1e-3, 4 * torch.finfo(logits.dtype).eps) * float(logits.abs().max())
