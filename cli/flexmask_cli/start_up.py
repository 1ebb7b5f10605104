"""What makes commands start and end faster, and nothing else; one variable switches it off.

With ``FLEXMASK_PLAIN_START=1`` a process starts and ends as Python and its libraries have it.
Results are the same.
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
"""Environment variable: any value but an empty one or 0 switches this module off."""

COPYING_SWITCH_INTERVAL_S = 1e-4
"""How long a thread keeps the interpreter while a model loads."""


def is_plain() -> bool:
    """Whether this module is switched off."""
    return os.environ.get(PLAIN_START, "") not in ("", "0")


def prepare_process() -> None:
    """Change settings of the process, before anything heavy is imported.

    OpenMP's threads sleep while they wait. By default they spin, and a busy neighbour on a small
    machine then makes every small matrix product wait for its time slice: four times as long for
    the demo.

    Python looks for reference cycles less often. Imports and traced models leave millions of
    objects that stay, and looking through them takes a tenth of a short run.
    """
    if not is_plain():
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        gc.set_threshold(50_000, 20, 100)


@contextmanager
def quick_loading() -> Iterator[None]:
    """Load a model faster.

    Python does not look for reference cycles among the objects that are made here. At the end
    they join the oldest generation, so that a collection after each compiled graph, as torch asks
    for, does not look through them either.

    Threads switch more often. A weight is copied to the device by one thread while another
    imports the compiler; after each weight the first waits for its turn, which by default is
    5 ms, longer than most copies take.
    """
    if is_plain():
        yield
        return
    interval = sys.getswitchinterval()
    gc.disable()
    sys.setswitchinterval(COPYING_SWITCH_INTERVAL_S)
    try:
        yield
    finally:
        sys.setswitchinterval(interval)
        gc.freeze()
        gc.unfreeze()
        gc.enable()


def import_engine(device: str) -> type[Engine]:
    """Import the engine, torch and transformers, while the GPU starts in another thread.

    Args:
        device: ``auto``, ``cpu``, ``cuda`` or ``cuda:N``.

    Raises:
        OptionError: If the device is not there.
    """
    if is_plain() or device == "cpu":
        from flexmask.engine import Engine

        return Engine
    with ThreadPoolExecutor(1) as pool:
        return _import_beside(pool, device)


def end_process(status: int) -> None:
    """End the process by `os._exit`, unless what it printed cannot be written.

    The interpreter would first look several times through the million objects that torch and
    transformers are made of, and free each of them, which takes more than a second. Functions
    registered with `atexit` run, and streams are flushed. Returns where the process should end as
    usual: without torch, if a stream cannot be written, or if this module is switched off.
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
    """Start CUDA's driver, if there is one; torch, asked for GPUs, would wait for it."""
    with suppress(OSError):
        ctypes.CDLL("libcuda.so.1").cuInit(0)
