"""Loading an engine for a command."""

from __future__ import annotations

import gc
from typing import TYPE_CHECKING

from flexmask.demo import model_path

if TYPE_CHECKING:
    from flexmask.attention.flex_call import PrefillKernel
    from flexmask.engine import Engine


def load_engine(
    model: str | None,
    device: str,
    dtype: str,
    trust_remote_code: bool,
    verbose: bool,
    prefill_kernel: PrefillKernel | None = None,
) -> Engine:
    """Load a model, the bundled one if none is named; its library speaks if ``verbose``."""
    from transformers.utils import logging

    from flexmask.engine import Engine

    if not verbose:
        logging.set_verbosity_error()
        logging.disable_progress_bar()
    engine = Engine.from_pretrained(
        model or str(model_path()),
        device=device,
        dtype=dtype,
        trust_remote_code=trust_remote_code,
        prefill_kernel=prefill_kernel,
    )
    # What is there by now stays. As the oldest generation it is not looked through for cycles
    # after each graph that compiles, which torch asks for.
    gc.freeze()
    gc.unfreeze()
    return engine
