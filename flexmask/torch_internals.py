"""The private parts of torch that flexmask uses; no other module does.

They were seen, and work as described, in torch 2.11, 2.13 and 2.14, unless a function says
otherwise (`flexmask.version.TESTED` lists the versions of the tests). What belongs to
``torch.compile`` is imported by the function that uses it: those imports take seconds, which a
process that compiles nothing need not spend.
"""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Executor, Future
from contextlib import AbstractContextManager, contextmanager, nullcontext
from importlib import import_module
from pathlib import Path
from typing import Any, ParamSpec, TypeVar, cast

import torch
from torch import Tensor, fx
from torch._C import DisableTorchFunction
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from flexmask.errors import CompilerError

__all__ = [
    "DisableTorchFunction",
    "TorchDispatchMode",
    "assume",
    "compile_cache_folder",
    "compile_graph",
    "compile_settings",
    "compiled_graphs",
    "index_by_tensors",
    "inductor_error",
    "mark_static",
    "outside_graphs",
    "prepare_compiler",
    "recompile_limit",
    "returns_view",
    "tensor_indexing",
    "tree_leaves",
    "tree_map",
    "use_bundled_assembler",
]

P = ParamSpec("P")
R = TypeVar("R")


# Tensors and operators.


def mark_static(tensor: Tensor) -> None:
    """Make all sizes of a tensor constants of the graphs that it enters.

    As `torch._dynamo.mark_static`, which is called where dynamo is loaded; elsewhere the marks
    that it leaves are set, because loading it would take longer than most commands.
    """
    if "torch._dynamo" in sys.modules:
        from torch._dynamo import mark_static as mark

        mark(tensor)
        return
    marked = cast(Any, tensor)
    marked._dynamo_static_indices = set(range(tensor.dim()))
    marked._has_dynamo_dim_marking = True  # read since torch 2.13


def returns_view(operator: Any) -> bool:
    """Whether a result of an operator shares memory with an argument that it does not write."""
    returns = operator._schema.returns
    return any(r.alias_info and not r.alias_info.is_write for r in returns)


def tensor_indexing() -> AbstractContextManager[object]:
    """A mode in which indexing by 0-d tensors selects under `torch.vmap`, as masks need it.

    torch's own ``create_block_mask`` evaluates a mask_mod in this mode, and torch.compile knows
    it. Without it, an index that is a 0-d tensor is read on the host.
    """
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    return TransformGetItemToIndex()


def index_by_tensors(table: Tensor, index: Any) -> Tensor:
    """Index one tensor as in `tensor_indexing`, which takes ``[0, 1]`` for ``(0, 1)``."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    getitem: Any = Tensor.__getitem__
    selected = TransformGetItemToIndex().__torch_function__(getitem, (), (table, index))
    return cast(Tensor, selected)


# While a graph is traced.


def assume(condition: bool) -> None:
    """Tell torch.compile that a relation between sizes holds, and check it elsewhere.

    Raises:
        RuntimeError: If it does not hold.
    """
    torch._check(condition)


def outside_graphs(reason: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Keep a function out of compiled graphs.

    Where torch.compile may split a graph, the function runs between its parts. Under
    ``fullgraph=True``, tracing ends with ``reason`` in place of an error from within.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        untraced: list[Callable[P, R]] = []

        def end_graph(_: object) -> None:
            # Only an error of this class ends a graph.
            from torch._dynamo.exc import Unsupported

            raise Unsupported(reason)

        @functools.wraps(function)
        def outside(*args: P.args, **kwargs: P.kwargs) -> R:
            if torch.compiler.is_compiling():
                # What ends a graph has to be raised while it is traced, not when it runs.
                from torch._dynamo.comptime import comptime

                comptime(end_graph)
            if "torch._dynamo" not in sys.modules:  # then nothing traces the calls below
                return function(*args, **kwargs)
            if not untraced:
                untraced.append(torch.compiler.disable(function))
            return untraced[0](*args, **kwargs)

        return outside

    return decorate


# Settings of the compiler, which belong to the whole process.


@contextmanager
def compile_settings(device: torch.device) -> Iterator[None]:
    """Set up torch.compile for attention on a device, for the duration of a call.

    Every model shape and mask compiles once, and dynamo's limit of 8 is for code that should
    not have compiled again. Numbers that a mask_mod or score_mod captures are constants: flex
    refuses symbolic floats. Lengths of queries and keys that are equal in the first call may
    differ later, so they get a symbol each; but torch before 2.13 gives two sizes of one C++
    kernel the same name then. To cache the results of operations on symbolic lengths costs more
    than to compute them again, a fifth of the time that tracing takes.
    """
    from torch._dynamo import config as dynamo_config
    from torch.fx.experimental import _config as shape_config

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


def recompile_limit(limit: int) -> AbstractContextManager[object]:
    """Let torch.compile compile a function for so many shapes; its default is 8."""
    from torch._dynamo import config

    return cast("AbstractContextManager[object]", config.patch(recompile_limit=limit))


def _without_workers() -> AbstractContextManager[object]:
    """Compile in this process."""
    from torch._inductor import config

    return cast("AbstractContextManager[object]", config.patch(compile_threads=1))


def _finds_all_compiled() -> bool:
    """Whether each graph of this process was found on disk so far.

    Inductor would start its worker processes all the same: seconds, which a process that compiles
    nothing waits for when it ends.
    """
    from torch._dynamo.utils import counters
    from torch._inductor import config

    if config.force_disable_caches or not config.fx_graph_cache:
        return False
    looked_up = counters["inductor"]
    missed = looked_up["fxgraph_cache_miss"] + looked_up["fxgraph_cache_bypass"]
    return missed == 0 and _has_compiled_graphs()


@functools.cache
def _has_compiled_graphs() -> bool:
    """Whether there were any when this process first asked."""
    return Path(compile_cache_folder(), "fxgraph").is_dir()


# The compiler.


def compiled_graphs() -> int:
    """Number of graphs that torch.compile has compiled in this process."""
    if "torch._dynamo" not in sys.modules:
        return 0
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def compile_graph(
    graph_module: fx.GraphModule, inputs: Sequence[Tensor], options: dict[str, Any]
) -> Callable[..., Any]:
    """Compile a traced graph by inductor, as its torch.compile backend does."""
    from torch._inductor.compile_fx import compile_fx

    compiled = compile_fx(graph_module, list(inputs), config_patches=options)
    return cast("Callable[..., Any]", compiled)


def inductor_error() -> type[Exception]:
    """The class of errors that inductor raises where it cannot compile."""
    from torch._inductor.exc import InductorError

    return cast("type[Exception]", InductorError)


def compile_cache_folder() -> Path:
    """The folder where compiled graphs and kernels are kept."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def use_bundled_assembler() -> None:
    """Let Triton assemble kernels in this process as inductor's worker processes do.

    With another assembler, such as the one that Triton brings, the next process would compile
    again what workers compiled: the cache goes by the assembler's version.
    """
    from torch._inductor.runtime.compile_tasks import _set_triton_ptxas_path

    _set_triton_ptxas_path()


def prepare_compiler(device: torch.device, pool: Executor) -> None:
    """Import and compute what torch.compile needs before its first graph.

    Some of it runs outside Python and takes no time beside the imports: to hash Triton's
    libraries, by which caches go, and to find out which vector instructions a CPU has, by
    compiling with them.

    Args:
        device: Where compiled graphs will run.
        pool: Threads for what runs beside the imports.

    Raises:
        CompilerError: If there is no C++ compiler, which a CPU needs.
    """
    from torch._inductor.codecache import CacheBase, torch_key
    from torch._inductor.cpu_vec_isa import pick_vec_isa
    from torch._inductor.exc import InvalidCxxCompiler

    tasks: list[Future[Any]] = [pool.submit(CacheBase.get_system)]
    if device.type == "cpu":
        tasks.append(pool.submit(pick_vec_isa))
    for name in ("torch._dynamo.repro.after_dynamo", "torch._inductor.compile_fx"):
        import_module(name)
    torch_key()  # It reads small files, and beside imports would wait for its turn at each.
    try:
        for task in tasks:
            task.result()
    except InvalidCxxCompiler as error:
        raise CompilerError(
            "torch.compile finds no C++ compiler; install one (apt install g++), "
            "or name one in CXX"
        ) from error
