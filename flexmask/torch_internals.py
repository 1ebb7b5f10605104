"""The private parts of torch that flexmask uses; no other module uses any.

All of them exist and work as described in torch 2.11, 2.13 and 2.14, unless a function says
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
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass
from torch.utils._pytree import tree_leaves, tree_map

from flexmask.errors import CompilerError

__all__ = [
    "DisableTorchFunction",
    "TorchDispatchMode",
    "abort_collectives",
    "assume",
    "compile_cache_folder",
    "compile_graph",
    "compile_settings",
    "compiled_graphs",
    "index_by_tensors",
    "inductor_error",
    "mark_static",
    "note_compile_cache",
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

    If dynamo is loaded, this calls `torch._dynamo.mark_static`. Otherwise it sets the attributes
    that mark_static would set, because importing dynamo takes longer than most commands.
    """
    if "torch._dynamo" in sys.modules:
        from torch._dynamo import mark_static as mark

        mark(tensor)
        return
    marked = cast(Any, tensor)
    marked._dynamo_static_indices = set(range(tensor.dim()))
    marked._has_dynamo_dim_marking = True  # read since torch 2.13


def is_wrapper_subclass(tensor: Tensor) -> bool:
    """Return True if a tensor has its numbers in other tensors, as quantised ones of torchao."""
    return is_traceable_wrapper_subclass(tensor)


def returns_view(operator: Any) -> bool:
    """Return True if a result of an operator is a view of an argument."""
    returns = operator._schema.returns
    return any(r.alias_info and not r.alias_info.is_write for r in returns)


def tensor_indexing() -> AbstractContextManager[object]:
    """Return a mode in which 0-d tensors can be indices under `torch.vmap`.

    torch's own ``create_block_mask`` evaluates a mask_mod in this mode, and torch.compile supports
    it. Without it, the value of an index that is a 0-d tensor is read on the host.
    """
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    return TransformGetItemToIndex()


def index_by_tensors(table: Tensor, index: Any) -> Tensor:
    """Index a tensor as in the mode `tensor_indexing`, where ``[0, 1]`` means ``(0, 1)``."""
    from torch._dynamo._trace_wrapped_higher_order_op import TransformGetItemToIndex

    getitem: Any = Tensor.__getitem__
    selected = TransformGetItemToIndex().__torch_function__(getitem, (), (table, index))
    return cast(Tensor, selected)


def abort_collectives() -> None:
    """Abort what NCCL runs or waits for, also in CUDA graphs, and leave the process group."""
    import torch.distributed.distributed_c10d as c10d

    abort: Any = c10d._abort_process_group
    abort()


class SmallSums:
    """Sums of small tensors over GPUs of a machine, by one kernel that reads the others' memory.

    It can be captured in CUDA graphs. All ranks make it, and call it alike. Unlike NCCL's, its
    kernel cannot be aborted.
    """

    def __init__(self, device: torch.device, most_bytes: int) -> None:
        """Allocate memory that the other GPUs reach.

        Args:
            device: The rank's GPU.
            most_bytes: Bytes of the largest tensor.

        Raises:
            RuntimeError: If they do not reach it.
        """
        import torch.distributed as dist
        import torch.distributed._symmetric_memory as symmetric_memory

        group: Any = dist.group.WORLD
        self._group_name = group.group_name
        # Of an earlier group of that name, which has been left.
        cast(Any, symmetric_memory)._group_name_to_store.pop(self._group_name, None)
        self._buffer = symmetric_memory.empty(most_bytes, dtype=torch.uint8, device=device)
        symmetric_memory.rendezvous(self._buffer, self._group_name)

    def takes(self, x: Tensor) -> bool:
        """Return True if the kernel can sum a tensor."""
        is_small = x.nbytes <= self._buffer.nbytes and x.nbytes % 16 == 0
        return is_small and x.is_contiguous() and x.dtype in (torch.bfloat16, torch.float32)

    def __call__(self, x: Tensor) -> None:
        """Replace a tensor by the sum over the ranks."""
        own = self._buffer[: x.nbytes].view(x.dtype).view(x.shape)
        torch.ops.symm_mem.one_shot_all_reduce_copy_out(own, x, "sum", self._group_name, x)


# While a graph is traced.


def assume(condition: bool) -> None:
    """Tell torch.compile that a relation between sizes holds; outside of it, check the relation.

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
            if "torch._dynamo" not in sys.modules:  # no dynamo, so nothing traces the calls below
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

    Raises:
        CompilerError: If torch.compile cannot trace a model.
    """
    from torch._dynamo import config as dynamo_config
    from torch._dynamo.exc import Unsupported
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
        try:
            yield
        except Unsupported as error:
            reason, _, rest = str(error).partition("\n")
            detail = rest.partition("context: ")[2].partition("\n")[0]
            raise CompilerError(
                f"torch.compile cannot trace a layer of the model: {reason.strip()} ({detail}); "
                "load another checkpoint, or try another dtype"
            ) from error


def recompile_limit(limit: int) -> AbstractContextManager[object]:
    """Allow torch.compile to compile a function ``limit`` times; its default is 8."""
    from torch._dynamo import config

    return cast("AbstractContextManager[object]", config.patch(recompile_limit=limit))


def _without_workers() -> AbstractContextManager[object]:
    """Compile in this process, without worker processes."""
    from torch._inductor import config

    return cast("AbstractContextManager[object]", config.patch(compile_threads=1))


def _finds_all_compiled() -> bool:
    """Return True if all graphs of this process so far were found in the cache on disk.

    Inductor would start its worker processes nevertheless, and the process would wait for their
    start, some seconds, before it ends.
    """
    from torch._dynamo.utils import counters
    from torch._inductor import config

    if config.force_disable_caches or not config.fx_graph_cache:
        return False
    looked_up = counters["inductor"]
    missed = looked_up["fxgraph_cache_miss"] + looked_up["fxgraph_cache_bypass"]
    return missed == 0 and _has_compiled_graphs()


def note_compile_cache() -> None:
    """Note whether the cache on disk holds graphs, before another process adds some."""
    _has_compiled_graphs()


@functools.cache
def _has_compiled_graphs() -> bool:
    """Return True if the cache on disk was not empty at the first call."""
    return Path(compile_cache_folder(), "fxgraph").is_dir()


# The compiler.


def compiled_graphs() -> int:
    """Return the number of graphs that torch.compile has compiled in this process."""
    if "torch._dynamo" not in sys.modules:
        return 0
    from torch._dynamo.utils import counters

    return int(counters["stats"]["unique_graphs"])


def compile_graph(
    graph_module: fx.GraphModule, inputs: Sequence[Tensor], options: dict[str, Any]
) -> Callable[..., Any]:
    """Compile a traced graph by inductor, as the backend of torch.compile does."""
    from torch._inductor.compile_fx import compile_fx

    compiled = compile_fx(graph_module, list(inputs), config_patches=options)
    return cast("Callable[..., Any]", compiled)


def inductor_error() -> type[Exception]:
    """Return the class of the errors that inductor raises if it cannot compile."""
    from torch._inductor.exc import InductorError

    return cast("type[Exception]", InductorError)


def compile_cache_folder() -> Path:
    """Return the folder of the cache of compiled graphs and kernels."""
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    return Path(cache_dir())


def use_bundled_assembler() -> None:
    """Make Triton use the assembler (ptxas) that inductor's worker processes use.

    The keys of the cache contain the assembler's version. With another one, such as Triton's own,
    a later process would compile again the kernels that workers have compiled.
    """
    from torch._inductor.runtime.compile_tasks import _set_triton_ptxas_path

    _set_triton_ptxas_path()


def prepare_compiler(device: torch.device, pool: Executor) -> None:
    """Import and compute what torch.compile needs before its first graph.

    Hashing Triton's libraries for the keys of caches, and finding the vector instructions of a CPU
    by compiling programs, run outside Python; they run in other threads during the imports.

    Args:
        device: The device of the compiled graphs.
        pool: The other threads.

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
    torch_key()  # After the imports: it reads many small files, each of which would wait for them.
    try:
        for task in tasks:
            task.result()
    except InvalidCxxCompiler as error:
        raise CompilerError(
            "torch.compile finds no C++ compiler; install one (apt install g++), "
            "or name one in CXX"
        ) from error
