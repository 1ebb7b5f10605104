"""Loads models and tokenizers."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, nullcontext, redirect_stderr, redirect_stdout
from io import StringIO
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    CompressedTensorsConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from flexmask.attention import BACKEND
from flexmask.attention.backend import register_attention
from flexmask.checkpoint.adapter import merge_adapter
from flexmask.checkpoint.config import (
    check_backend,
    check_config_file,
    load_config,
    quantization_of,
)
from flexmask.checkpoint.folder import check_files, check_folder, check_sizes
from flexmask.checkpoint.model_name import check_adapter_name, shown
from flexmask.checkpoint.source import CheckpointSource
from flexmask.checkpoint.transformers_calls import errors_in_one_line
from flexmask.checkpoint.weights import check_loaded_weights
from flexmask.device import resolve_dtype, resolve_quantize
from flexmask.encoding.tokenization import load_tokenizer
from flexmask.errors import AttentionError, ModelError
from flexmask.kernels.rounded_linear import round_linear_layers
from flexmask.tensor_parallel.plan import RankOf, check_plan
from flexmask.tensor_parallel.sharding import ModelShard, PartOfWeight
from flexmask.torch_internals import is_wrapper_subclass, prepare_compiler
from flexmask.transformers_internals import loading_parts, set_attention_implementation


def load_model(
    model: str,
    *,
    device: torch.device,
    dtype: str,
    trust_remote_code: bool = False,
    needs_backend: bool = True,
    adapter: str | None = None,
    place: RankOf | None = None,
    quantize: str | None = None,
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a causal language model, from safetensors or GGUF only, and its tokenizer.

    Args:
        model: Hub id, folder or GGUF file.
        device: Device to load it to.
        dtype: Name of a dtype. ``auto`` is the one that it was saved in, and on a CPU float32
            unless it is quantised.
        trust_remote_code: Run code that comes with the model.
        needs_backend: Refuse architectures that do not support attention backends.
        adapter: Folder of a LoRA adapter to merge into the weights.
        place: The rank whose shard of the model is loaded; None for the whole model.
        quantize: ``int8`` or ``fp8``, to which the weights of linear layers are rounded, after an
            adapter is merged; None to keep them.

    Raises:
        ModelError: If it or the adapter cannot be found or loaded; if weights are missing, or
            belong to another model; if it cannot be cut into shards; if it is quantised and is to
            be rounded or adapted.
        OptionError: If the device or ``quantize`` cannot be used.
        AttentionError: If its architecture does not support attention backends and
            ``needs_backend`` is set.
        CompilerError: If the device needs a C++ compiler and there is none.
    """
    register_attention()
    source = CheckpointSource.find(model)
    if adapter is not None:
        check_adapter_name(adapter)
    rounded_to = None if quantize is None else resolve_quantize(quantize, device)
    config = _checked_config(source, trust_remote_code, needs_backend)
    method = quantization_of(config)
    if method:
        _refuse_changes(source.name, method, adapter, quantize)
    tokenizer = load_tokenizer(model, trust_remote_code=trust_remote_code)
    number_type = resolve_dtype(dtype, device)
    if dtype == "auto" and source.gguf is None and method:
        number_type = "auto"
    if place is None:
        loaded = _load_weights(source, config, number_type, trust_remote_code)
    else:
        loaded = _load_shard(source, config, number_type, trust_remote_code, place)
    if needs_backend:
        check_backend(type(loaded))
    module: nn.Module = loaded  # its to() has the simpler signature
    module.eval().requires_grad_(False)
    if adapter is not None:
        module.to(device)  # which computes the sums faster
        merge_adapter(loaded, adapter, source.name)
    if rounded_to is not None:
        _round_weights(loaded, rounded_to, device, source.name)
    _move(module, device)
    return loaded, tokenizer


def _checked_config(
    source: CheckpointSource, trust_remote_code: bool, needs_backend: bool
) -> PreTrainedConfig:
    """Load the config of a model, once its files are checked."""
    with errors_in_one_line(f"cannot load model {shown(source.name)}"):
        check_folder(source)
        check_config_file(source, trust_remote_code=trust_remote_code)
        shapes = check_files(source)
        config = load_config(
            source, trust_remote_code=trust_remote_code, needs_backend=needs_backend
        )
        check_sizes(config.get_text_config(decoder=True), shapes, source.name)
    return config


def check_shards(
    model: str,
    size: int,
    *,
    trust_remote_code: bool = False,
    adapter: str | None = None,
    quantize: str | None = None,
) -> None:
    """Refuse a model that cannot be loaded in parts, before anything is loaded.

    Args:
        model: Hub id, folder or GGUF file.
        size: Number of parts.
        trust_remote_code: Run code that comes with the model.
        adapter: Folder of a LoRA adapter.
        quantize: What weights are rounded to.

    Raises:
        ModelError: If it is quantised, in GGUF, adapted or rounded, or has no plan for so many
            parts.
        AttentionError: If its architecture does not support attention backends.
    """
    register_attention()
    source = CheckpointSource.find(model)
    config = _checked_config(source, trust_remote_code, needs_backend=True)
    method = quantization_of(config)
    reason = ""
    if source.gguf is not None:
        reason = "is a GGUF file"
    elif method:
        reason = f"is quantised by {method}"
    elif adapter is not None:
        reason = "gets an adapter; merge that, and save the result"
    elif quantize is not None:
        reason = f"is rounded to {quantize}"
    if reason:
        raise ModelError(
            "`tensor_parallel` loads parts of plain weights in safetensors, and model "
            f"{shown(source.name)} {reason}"
        )
    check_plan(config.get_text_config(decoder=True), size, shown(source.name))


def load_shard(
    place: RankOf, device: torch.device, *, model: str, dtype: str, trust_remote_code: bool
) -> PreTrainedModel:
    """Load the shard of a rank, as `load_model` loads a model.

    Args:
        place: The rank.
        device: Its device.
        model: Hub id or folder.
        dtype: Name of a dtype, or ``auto``.
        trust_remote_code: Run code that comes with the model.
    """
    loaded, _ = load_model(
        model, device=device, dtype=dtype, trust_remote_code=trust_remote_code, place=place
    )
    return loaded


def _load_shard(
    source: CheckpointSource,
    config: PreTrainedConfig,
    dtype: torch.dtype | str,
    trust_remote_code: bool,
    place: RankOf,
) -> PreTrainedModel:
    """Make the shard of one rank; of each weight only the rank's part is read.

    Raises:
        ModelError: As `_load_weights`; if sizes do not divide.
    """
    shards: list[ModelShard] = []

    def part_of(name: str, weight: Any) -> Any:
        cut = shards[0].cut_of(name) if shards else None
        return weight if cut is None else PartOfWeight(weight, cut)

    with loading_parts(lambda model: shards.append(ModelShard(model, place)), part_of):
        loaded = _load_weights(source, config, dtype, trust_remote_code)
    shards[0].complete()
    return loaded


def _refuse_changes(name: str, method: str, adapter: str | None, quantize: str | None) -> None:
    """Refuse to change the weights of a quantised model, which would have to be rounded again.

    Raises:
        ModelError: If an adapter is given, or weights are to be rounded.
    """
    if adapter is not None:
        raise ModelError(
            f"adapter {shown(adapter)} cannot be merged into model {shown(name)}, which is "
            f"quantised by {method}; load one that is not quantised"
        )
    if quantize is not None:
        raise ModelError(
            f"model {shown(name)} is quantised by {method} and cannot be rounded to {quantize}; "
            "leave out `quantize`, or load one that is not quantised"
        )


def _round_weights(
    model: PreTrainedModel, dtype: torch.dtype, device: torch.device, name: str
) -> None:
    """Round the weights of all linear layers but the output head.

    Raises:
        ModelError: If there are none, or a weight is not finite.
    """
    try:
        count = round_linear_layers(model, model.get_output_embeddings(), dtype, device)
    except ValueError as error:
        raise ModelError(f"cannot round the weights of model {shown(name)}: {error}") from None
    if not count:
        raise ModelError(
            f"model {shown(name)} has no layers of torch.nn.Linear before its output head, and "
            "`quantize` rounds no others"
        )


def _load_weights(
    source: CheckpointSource,
    config: PreTrainedConfig,
    dtype: torch.dtype | str,
    trust_remote_code: bool,
) -> PreTrainedModel:
    """Make the model of a config, with all weights from its files.

    Raises:
        ModelError: If it cannot be made, or its weights do not match.
        AttentionError: If its code does not support attention backends.
    """
    options = source.options if source.gguf is None else source.options | _dequantized()
    # A config file may name an attention implementation, also for parts of the model.
    set_attention_implementation(config, BACKEND)
    method = quantization_of(config)
    from_pretrained: Any = AutoModelForCausalLM.from_pretrained  # typed for a model alone
    what = f"cannot load model {shown(source.name)}"
    what = f"{what}, which is quantised by {method}" if method else what
    speaks = method is not None or source.gguf is not None
    with errors_in_one_line(what), _quietly() if speaks else nullcontext():
        if method == "compressed-tensors":
            # Otherwise the first forward unpacks the weights, and draws a bar.
            options = {"quantization_config": CompressedTensorsConfig(run_compressed=False)}
        try:
            loaded, report = from_pretrained(
                source.location,
                config=config,
                dtype=dtype,
                attn_implementation=BACKEND,
                use_safetensors=True,
                trust_remote_code=trust_remote_code,
                output_loading_info=True,
                # Shapes that differ are listed in the report, which is checked below.
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
    check_loaded_weights(type(loaded).__name__, report, what)
    assert isinstance(loaded, PreTrainedModel)
    if method is not None:
        _check_dtype(loaded, dtype, what)
    return loaded


def _check_dtype(loaded: PreTrainedModel, wanted: torch.dtype | str, what: str) -> None:
    """Refuse a dtype that quantised weights were not made for.

    Raises:
        ModelError: If the model has weights that compute in another.
    """
    own = next((p.dtype for p in loaded.parameters() if is_wrapper_subclass(p)), loaded.dtype)
    if own != (loaded.dtype if wanted == "auto" else wanted):
        name = str(own).removeprefix("torch.")
        raise ModelError(f"{what}: its weights compute in {name} only; pass `dtype={name}`")


def _quietly() -> ExitStack:
    """Hide what no setting hides: bars of GGUF files, and words of quantising libraries."""
    hidden = ExitStack()
    hidden.enter_context(redirect_stdout(StringIO()))
    hidden.enter_context(redirect_stderr(StringIO()))
    return hidden


def _dequantized() -> dict[str, Any]:
    """Options that dequantize the weights of a GGUF file; before 5.24 transformers always does."""
    try:
        from transformers import GgufConfig
    except ImportError:
        return {}
    return {"quantization_config": GgufConfig(dequantize=True)}


def _move(module: nn.Module, device: torch.device) -> None:
    """Copy a module to a device, and prepare the compiler meanwhile."""
    if device.type == "cuda":
        torch.cuda.init()
    with ThreadPoolExecutor() as pool:
        compiler = pool.submit(prepare_compiler, device, pool)
        module.to(device)  # imports nothing, and leaves the interpreter to the other thread
        compiler.result()
