"""Capturing work as CUDA graphs, and going on without them where that fails."""

from __future__ import annotations

import gc
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch

from flexmask.errors import FlexMaskWarning

Graph = TypeVar("Graph")


class GraphCapture:
    """Captures graphs of one kind of work, until one cannot be captured.

    Attributes:
        no_graph_reason: Why a graph could not be captured; empty if none failed.
    """

    def __init__(self, work: str) -> None:
        """Store the kind of work, a verb in the third person for a warning: ``prefill runs``."""
        self._work = work
        self.no_graph_reason = ""

    def attempt(self, capture: Callable[[], Graph]) -> Graph | None:
        """Return what ``capture`` returns; None, with a warning, if it cannot be captured.

        Raises:
            torch.OutOfMemoryError: If memory does not suffice.
        """
        try:
            return capture()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            # The end of a failed capture raises another error, which hides the one that failed it.
            first: BaseException = error
            while isinstance(first.__context__, RuntimeError):
                first = first.__context__
            self.no_graph_reason = " ".join(str(first).split())
            warnings.warn(
                f"{self._work} without a CUDA graph: {self.no_graph_reason}",
                FlexMaskWarning,
                stacklevel=3,
            )
            return None


@contextmanager
def capturing(graph: torch.cuda.CUDAGraph, pool: Any = None) -> Iterator[None]:
    """Capture the work of this thread on the device.

    The thread gets a handle of cuBLAS before, since its first product makes one, for which it
    needs the device's context. Python's garbage collector is off meanwhile, since it may destroy
    another graph. Both would invalidate a capture.

    Args:
        graph: Receives the work.
        pool: Memory of other graphs to use, of which only one runs at a time; None for its own.

    Raises:
        RuntimeError: If something in it cannot be captured.
    """
    torch.cuda.synchronize()
    torch.cuda.current_blas_handle()
    is_collecting = gc.isenabled()
    gc.disable()
    try:
        # thread_local: what other threads do on the device is not captured, and no error.
        with torch.cuda.graph(graph, pool=pool, capture_error_mode="thread_local"):
            yield
    finally:
        if is_collecting:
            gc.enable()
