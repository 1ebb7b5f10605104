"""Loads engines and tokenizers according to options."""

from __future__ import annotations

from typing import TYPE_CHECKING

from flexmask.demo import model_path
from flexmask.tensor_parallel.processes import start_processes
from flexmask_cli.options import ChatOptions, EngineOptions, ModelOptions, RunModelOptions
from flexmask_cli.start_up import import_engine, quick_loading

if TYPE_CHECKING:
    from flexmask.encoding.tokenization import RequestTokenizer
    from flexmask.engine import Engine
    from flexmask.tasks.task import Task


def load_engine(model: RunModelOptions, options: EngineOptions) -> Engine:
    """Load a model; from then on, transformers logs errors only.

    Raises:
        FlexMaskError: As from `flexmask.Engine.from_pretrained`.
    """
    if options.num_ranks > 1:
        start_processes(options.num_ranks)
    with quick_loading():
        engine_class = import_engine(options.device)
        quiet_transformers()
        return engine_class.from_pretrained(
            model.model or str(model_path()),
            device=options.device,
            dtype=options.dtype,
            trust_remote_code=model.trust_remote_code,
            prefill_kernel=options.chosen_kernel,
            kv_cache=options.chosen_cache,
            tensor_parallel=options.num_ranks,
            **model.changes,
        )


def load_tokenizer(model: ModelOptions, chat: ChatOptions, task: Task | None) -> RequestTokenizer:
    """Load the tokenizer of a model, without the weights.

    Raises:
        ModelError: If it cannot be loaded, or has no chat template and one is asked for.
    """
    from flexmask.encoding.tokenization import RequestTokenizer

    return RequestTokenizer.from_pretrained(
        model.model or str(model_path()),
        trust_remote_code=model.trust_remote_code,
        chat_template=chat.uses_template(task),
        allow_special_tokens=chat.allow_special_tokens,
    )


def quiet_transformers() -> None:
    """Make transformers log errors only, and draw no progress bars."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
