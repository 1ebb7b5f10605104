"""Loading models and tokenizers."""

from __future__ import annotations

import sys
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from flexmask.attention.backend import BACKEND, register_attention
from flexmask.errors import AttentionError, CompilerError, ModelError


def load_model(
    model: str, *, device: torch.device, dtype: torch.dtype | str, trust_remote_code: bool = False
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model, from safetensors only, and its tokenizer.

    Args:
        model: Hub id or folder.
        device: Where to put it.
        dtype: A torch dtype, or ``"auto"`` for the one it was saved in.
        trust_remote_code: Run code that comes with the model.

    Raises:
        ModelError: If it cannot be found or loaded.
        AttentionError: If its architecture does not support attention backends.
        CompilerError: If the device needs a compiler that is not there.
    """
    register_attention()
    _check_folder(model)
    try:
        tokenizer = AutoTokenizer.from_pretrained(model, trust_remote_code=trust_remote_code)
        loaded = AutoModelForCausalLM.from_pretrained(
            model,
            dtype=dtype,
            attn_implementation=BACKEND,
            use_safetensors=True,
            trust_remote_code=trust_remote_code,
        )
    except (OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ModelError(f"cannot load model {model!r}: {reason}") from error
    if not loaded.is_backend_compatible():
        raise AttentionError(
            f"{type(loaded).__name__} does not support transformers' attention backends, "
            "which flexmask needs"
        )
    module: nn.Module = loaded  # whose to() has the plainer signature
    _move(module.eval().requires_grad_(False), device)
    return loaded, tokenizer


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


def _check_folder(model: str) -> None:
    folder = Path(model)
    if not folder.exists():
        if model.startswith((".", "/", "~")):
            raise ModelError(f"model folder {model!r} does not exist")
        return
    if not (folder / "config.json").is_file():
        raise ModelError(f"model folder {model!r} has no config.json")
    if not any(folder.glob("*.safetensors")):
        raise ModelError(
            f"model folder {model!r} has no weights in safetensors; "
            "flexmask loads no other format (pickled weights can run code)"
        )
