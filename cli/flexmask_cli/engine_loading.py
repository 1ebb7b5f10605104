"""Loading an engine for a command."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
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
    with _what_loads_stays():
        engine_class = _import_engine(device)
        from transformers.utils import logging

        if not verbose:
            logging.set_verbosity_error()
            logging.disable_progress_bar()
        return engine_class.from_pretrained(
            model or str(model_path()),
            device=device,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            prefill_kernel=prefill_kernel,
        )


@contextmanager
def _what_loads_stays() -> Iterator[None]:
    """Look for no garbage among objects while they load, nor among them later on.

    They become the oldest generation, which is not looked through after each graph that
    compiles, as torch asks for.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.unfreeze()
        gc.enable()


def _import_engine(device: str) -> type[Engine]:
    """Import the engine, and torch and transformers with it, while the device starts."""
    with ThreadPoolExecutor(1) as pool:
        driver = pool.submit(_start_driver, device)
        from flexmask.device import resolve_device, start_device

        driver.result()
        starting = pool.submit(start_device, resolve_device(device))
        from flexmask.engine import Engine

        starting.result()
    return Engine


def _start_driver(device: str) -> None:
    """Start CUDA's driver, if there is one; torch, asked for GPUs, would wait for it."""
    if device != "cpu":
        with suppress(OSError):
            ctypes.CDLL("libcuda.so.1").cuInit(0)
