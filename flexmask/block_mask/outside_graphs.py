"""Refuses inside torch.compile the functions that cannot be part of a graph."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import ParamSpec, TypeVar

import torch

# Not public in torch (seen in 2.13, and the error's arguments in earlier versions): only an
# error of this class ends a graph, and only what runs at compile time can raise it.
from torch._dynamo.comptime import ComptimeContext, comptime
from torch._dynamo.exc import Unsupported

P = ParamSpec("P")
R = TypeVar("R")


def outside_graphs(function: Callable[P, R]) -> Callable[P, R]:
    """Keep a function that builds a BlockMask out of compiled graphs.

    Where torch.compile may split a graph, the function runs between its parts. Under
    ``fullgraph=True``, tracing ends with one line that says what to do, in place of whatever
    inside would fail first.
    """
    # Otherwise torch.compile would try the frames below one by one.
    untraced = torch.compiler.disable(function)

    @functools.wraps(function)
    def outside(*args: P.args, **kwargs: P.kwargs) -> R:
        if torch.compiler.is_compiling():
            comptime(_end_graph)
        result: R = untraced(*args, **kwargs)
        return result

    return outside


def _end_graph(_: ComptimeContext) -> None:
    raise Unsupported(
        "a BlockMask cannot be built inside a compiled graph, because building looks at values; "
        "build it before the compiled function and pass it in"
    )
