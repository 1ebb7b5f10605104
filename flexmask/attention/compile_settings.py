"""Torch's settings while attention and what surrounds it compiles."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any, cast

import torch
from torch._dynamo import config as dynamo_config
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch._inductor.runtime.cache_dir_utils import cache_dir
from torch.fx.experimental import _config as shape_config


@contextmanager
def compile_settings(device: torch.device) -> Iterator[None]:
    """Torch's settings for compiled attention on a device, for the duration of a call.

    Every model shape and mask compiles once, and dynamo's limit of 8 is for code that should
    not have compiled again. Numbers that a mask_mod or score_mod captures are constants: flex
    refuses symbolic floats. Lengths of queries and keys that happen to be equal at first are
    not equal for ever; but torch before 2.13 gives two sizes of one C++ kernel the same name
    where equal ones have symbols of their own. To keep what an operation gives under symbolic
    lengths costs more than to work it out again, a fifth of the time that tracing takes.
    """
    is_cuda = device.type == "cuda"
    has_symbol_each = is_cuda or torch.__version__ >= "2.13"
    with (
        dynamo_config.patch(
            recompile_limit=256,
            specialize_float=True,
            specialize_int=True,
            fake_tensor_cache_enabled=False,
        ),
        cast(Any, shape_config).patch(use_duck_shape=not has_symbol_each),
        _without_workers() if is_cuda and _finds_all_compiled() else nullcontext(),
    ):
        yield


def _without_workers() -> AbstractContextManager[object]:
    """Compile in this process."""
    return cast("AbstractContextManager[object]", inductor_config.patch(compile_threads=1))


def _finds_all_compiled() -> bool:
    """Whether each graph of this process was found on disk so far.

    Inductor would start its worker processes all the same: seconds, which a process that compiles
    nothing waits for when it ends.
    """
    if inductor_config.force_disable_caches or not inductor_config.fx_graph_cache:
        return False
    looked_up = counters["inductor"]
    missed = looked_up["fxgraph_cache_miss"] + looked_up["fxgraph_cache_bypass"]
    return missed == 0 and _has_compiled_graphs()


@cache
def _has_compiled_graphs() -> bool:
    """Whether there were any when this process first asked."""
    return Path(cache_dir(), "fxgraph").is_dir()
