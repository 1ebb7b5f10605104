"""Settings that make commands start and end faster, without an effect on results.

``FLEXMASK_PLAIN_START=1`` switches them off: the process then starts and ends like any other.
"""

from __future__ import annotations

import atexit
import ctypes
import gc
import os
import sys
from collections.abc import Iterator
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from flexmask.engine import Engine

PLAIN_START = "FLEXMASK_PLAIN_START"
"""Environment variable that switches this module off, unless it is empty or 0."""

LOADING_SWITCH_INTERVAL_S = 1e-4
"""Seconds that a thread keeps the interpreter while a model loads."""


def is_plain() -> bool:
    """Return True if this module is switched off."""
    return os.environ.get(PLAIN_START, "") not in ("", "0")


def prepare_process() -> None:
    """Change settings of the process, before torch is imported.

    OpenMP's threads sleep while they wait. By default they spin, so that on a small machine with
    another busy process, every small matrix product waits for a time slice; the demo took four
    times as long.

    Python's garbage collector runs less often. Imports and traced models leave millions of objects
    that stay alive, and scanning them took a tenth of a short run.
    """
    if not is_plain():
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        gc.set_threshold(50_000, 20, 100)


@contextmanager
def quick_loading() -> Iterator[None]:
    """Make a model load faster in this context.

    The garbage collector is off. At the end, the objects that were made move to its oldest
    generation, so that the collections that torch runs after each compiled graph do not scan them.

    Threads switch more often. One thread copies weights to the device while another imports the
    compiler. After each weight, the first waits for the interpreter: 5 ms by default, which is
    longer than most copies take.
    """
    if is_plain():
        yield
        return
    interval = sys.getswitchinterval()
    gc.disable()
    sys.setswitchinterval(LOADING_SWITCH_INTERVAL_S)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        gc.freeze()
        gc.unfreeze()
        gc.enable()


def import_engine(device: str) -> type[Engine]:
    """Import the engine, with torch and transformers, while another thread starts the GPU.

    Args:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        OptionError: If the device is not present.
    """
    if is_plain() or device == "cpu":
        from flexmask.engine import Engine

        return Engine
    with ThreadPoolExecutor(1) as pool:
        return _import_beside(pool, device)


def end_process(status: int) -> None:
    """End the process with `os._exit`, which skips freeing all objects.

    That takes the interpreter more than a second for the million objects of torch and
    transformers. Functions registered with `atexit` run first, and streams are flushed. Returns if
    the process should end as usual: without torch, if a stream cannot be written, or if this
    module is switched off.
    """
    if is_plain() or "torch" not in sys.modules:
        return
    atexit._run_exitfuncs()  # noqa: SLF001 (there is no other way to run them)
    try:
        for stream in (sys.stdout, sys.stderr):
            if stream is not None:  # None: it is closed
                stream.flush()
    except OSError:
        return
    os._exit(status)


def _import_beside(pool: Executor, device: str) -> type[Engine]:
    driver = pool.submit(_start_driver)
    from flexmask.device import resolve_device, start_device

    driver.result()
    starting = pool.submit(start_device, resolve_device(device))
    from flexmask.engine import Engine

    starting.result()
    return Engine


def _start_driver() -> None:
    """Initialize the CUDA driver, if there is one, since torch would wait for it."""
    with suppress(OSError):
        ctypes.CDLL("libcuda.so.1").cuInit(0)
