"""Loading models and tokenizers."""

from __future__ import annotations

import sys
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext, redirect_stderr
from importlib import import_module
from io import StringIO
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from flexmask.attention import BACKEND
from flexmask.attention.backend import register_attention
from flexmask.checkpoint.config import (
    check_backend,
    check_config_file,
    load_config,
    quantization_of,
)
from flexmask.checkpoint.folder import check_files, check_folder
from flexmask.checkpoint.source import CheckpointSource
from flexmask.checkpoint.transformers_calls import errors_in_one_line, shown
from flexmask.checkpoint.weights import check_loaded_weights
from flexmask.encoding.tokenization import load_tokenizer
from flexmask.errors import AttentionError, CompilerError


def load_model(
    model: str,
    *,
    device: torch.device,
    dtype: torch.dtype | str,
    trust_remote_code: bool = False,
    needs_backend: bool = True,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model, from safetensors or GGUF only, and its tokenizer.

    Args:
        model: Hub id, folder or GGUF file.
        device: Where to put it.
        dtype: A torch dtype, or ``"auto"`` for the one it was saved in.
        trust_remote_code: Run code that comes with the model.
        needs_backend: Refuse architectures that do not support attention backends.

    Raises:
        ModelError: If it cannot be found or loaded; if its weights are not all there, and of
            that model.
        AttentionError: If its architecture does not support attention backends and needs to.
        CompilerError: If the device needs a compiler that is not there.
    """
    register_attention()
    source = CheckpointSource.find(model)
    with errors_in_one_line(f"cannot load model {shown(source.name)}"):
        check_folder(source)
        check_config_file(source, trust_remote_code=trust_remote_code)
        check_files(source)
        config = load_config(
            source, trust_remote_code=trust_remote_code, needs_backend=needs_backend
        )
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    loaded = _load_weights(source, config, dtype, trust_remote_code)
    if needs_backend:
        check_backend(type(loaded))
    module: nn.Module = loaded  # whose to() has the plainer signature
    _move(module.eval().requires_grad_(False), device)
    return loaded, tokenizer


def _load_weights(
    source: CheckpointSource,
    config: PreTrainedConfig,
    dtype: torch.dtype | str,
    trust_remote_code: bool,
) -> PreTrainedModel:
    """Make the model of a config, with all weights from its files.

    Raises:
        ModelError: If it cannot be made, or weights do not fit.
        AttentionError: If its code knows no attention but its own.
    """
    options = source.options if source.gguf is None else source.options | _dequantized()
    # A config file may name an implementation, for parts of the model too; ours replaces all.
    config._attn_implementation = BACKEND
    method = quantization_of(config)
    from_pretrained: Any = AutoModelForCausalLM.from_pretrained  # typed for a model alone
    what = f"cannot load model {shown(source.name)}"
    what = f"{what}, which is quantised by {method}" if method else what
    with errors_in_one_line(what), _no_bar_of_gguf(source):
        try:
            loaded, report = from_pretrained(
                source.location,
                config=config,
                dtype=dtype,
                attn_implementation=BACKEND,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                # Shapes that do not fit stand in the report, as all that does not.
                ignore_mismatched_sizes=True,
                **options,
            )
        except KeyError as error:
            if error.args != (BACKEND,):
                raise
            raise AttentionError(
                f"model {shown(source.name)} has attention of its own kinds only, and does not "
                "support attention backends, which flexmask needs"
            ) from None
    check_loaded_weights(type(loaded).__name__, report, source.name)
    assert isinstance(loaded, PreTrainedModel)
    return loaded


def _no_bar_of_gguf(source: CheckpointSource) -> AbstractContextManager[object]:
    """Keep from stderr the bar that transformers draws past its own settings."""
    return nullcontext() if source.gguf is None else redirect_stderr(StringIO())


def _dequantized() -> dict[str, Any]:
    """Options that unpack the weights of a GGUF file; transformers before 5.24 always does."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _move(module: nn.Module, device: torch.device) -> None:
    """Copy a module to a device, and have the compiler ready by then."""
    if device.type == "cuda":
        torch.cuda.init()
    # Copying imports nothing, and leaves the interpreter free. But after each tensor it waits for
    # its turn, which by default is 5 ms, longer than most of them take.
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-4)
    try:
        with ThreadPoolExecutor() as pool:
            compiler = pool.submit(_prepare_compiler, device, pool)
            module.to(device)
            compiler.result()
    finally:
        sys.setswitchinterval(interval)


def _prepare_compiler(device: torch.device, pool: Executor) -> None:
    """Have what torch.compile needs for its first graph.

    Much of that is no Python and takes no time beside the imports: to hash Triton's libraries, by
    which caches go, and to find out which vector instructions a CPU has, by compiling with them.

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
