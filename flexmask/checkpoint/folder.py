"""Checks the files of a model: that they are complete, and that none can run code."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path, PurePosixPath

from safetensors import SafetensorError, safe_open
from transformers import PreTrainedConfig

from flexmask.checkpoint.gguf_file import read_header
from flexmask.checkpoint.model_name import ADAPTER_CONFIG, shown
from flexmask.checkpoint.source import CheckpointSource, check_is_no_pointer
from flexmask.checkpoint.transformers_calls import one_line
from flexmask.errors import ModelError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
LARGEST_UNUSED = 2**20
"""Largest ``intermediate_size`` allowed where no weight is as wide: experts may not use it."""
_TOKENIZER_FILE = re.compile(r"tokenizer|vocab|merges|spiece|sentencepiece|\.model$|\.tiktoken$")


def check_folder(source: CheckpointSource) -> None:
    """Check that a folder contains a configuration and weights; hub ids and GGUF files pass.

    Raises:
        ModelError: If it does not.
    """
    name, folder = source.name, source.folder
    if folder is None:
        return
    if (folder / ADAPTER_CONFIG).is_file():
        raise _adapter_error(name)
    if not (folder / "config.json").is_file():
        ggufs = sorted(path.name for path in folder.glob("*.gguf"))
        hint = f"; name the file: {shown(str(folder / ggufs[0]))}" if ggufs else ""
        raise ModelError(f"model folder {shown(name)} has no config.json{hint}")
    if not any(folder.glob("*.safetensors*")):
        raise ModelError(
            f"model folder {shown(name)} has no weights in safetensors; "
            "flexmask loads no other format (pickled weights can run code)"
        )


def _adapter_error(name: str) -> ModelError:
    return ModelError(
        f"model {shown(name)} holds an adapter, which is not a model; name the model that it was "
        "made for, and the adapter's folder as `adapter`"
    )


def check_files(source: CheckpointSource) -> list[list[int]]:
    """Check that the files of a model are complete, and of formats that cannot run code.

    For a model on the hub only its JSON files and the index of its weights are checked; downloads
    are checked by the hub's client.

    Returns:
        The shapes of the weights in a folder; empty for a GGUF file or a model on the hub.

    Raises:
        ModelError: If a file is missing, damaged or of another format.
        OSError: If the hub cannot be reached.
    """
    if source.gguf is not None:
        return []
    source.read_json("generation_config.json")
    # With peft installed, transformers would apply an adapter, whose weights may be pickled.
    if source.file(ADAPTER_CONFIG) is not None:
        raise _adapter_error(source.name)
    entry = _entry(source)
    shards = _shards(source, entry) if entry.endswith(".index.json") else [entry]
    for shard in shards:
        if PurePosixPath(shard).is_absolute() or ".." in PurePosixPath(shard).parts:
            raise ModelError(
                f"model {shown(source.name)} names {shard[:40]!r} as its weights, which is not in "
                "its folder"
            )
    folder = source.folder
    if folder is None:
        return []
    return [
        shape for shard in shards for shape in weight_shapes(folder / shard, source.name).values()
    ]


def check_sizes(config: PreTrainedConfig, shapes: Sequence[Sequence[int]], model: str) -> None:
    """Refuse a config whose sizes exceed those of the weights, before anything is allocated.

    transformers allocates the whole model, however large, and only then looks at the weights.

    Args:
        config: The config of the part that generates text.
        shapes: Shapes of the weights; without any, nothing is checked.
        model: Name of the model.

    Raises:
        ModelError: If a size is beyond all that the weights have.
    """
    if not shapes:
        return
    largest = max((max(shape) for shape in shapes if shape), default=0)
    bounds = {
        "num_hidden_layers": len(shapes),
        "hidden_size": largest,
        "vocab_size": largest,
        "intermediate_size": max(largest, LARGEST_UNUSED),
    }
    for name, most in bounds.items():
        value = getattr(config, name, None)
        if isinstance(value, int) and value > most:
            raise ModelError(
                f"config.json of model {shown(model)}: {name} is {value:,}, and its weights have "
                f"{most:,} at most; config.json and weights must be whole and of one model"
            )


def check_tokenizer_files(source: CheckpointSource) -> None:
    """Check that a model has files of a tokenizer.

    Raises:
        ModelError: If it has none, or one is damaged.
    """
    if source.gguf is not None:
        read_header(source.gguf, source.name)
    if source.folder is None:
        return
    files = [path for path in source.folder.iterdir() if _TOKENIZER_FILE.search(path.name)]
    if not files:
        raise ModelError(
            f"model folder {shown(source.name)} has no tokenizer; save it there "
            "(tokenizer.save_pretrained)"
        )
    for path in files:
        if path.is_file():
            check_is_no_pointer(path, source.name)
    source.read_json("tokenizer_config.json")


def _entry(source: CheckpointSource) -> str:
    """Return the file that transformers reads first: the weights, or their index."""
    named = (source.read_json("config.json") or {}).get("transformers_weights")
    if named is None:
        # If both exist it takes the weights. On the hub only an index can name other files.
        return WEIGHTS if source.folder and source.file(WEIGHTS) else INDEX
    if str(named).endswith((".safetensors", ".safetensors.index.json")):
        return str(named)
    raise ModelError(
        f"config.json of model {shown(source.name)} names {str(named)[:40]!r} as its weights; "
        "flexmask loads safetensors only (pickled weights can run code)"
    )


def _shards(source: CheckpointSource, entry: str) -> list[str]:
    """Return the files that the index of a checkpoint names."""
    index = source.read_json(entry)
    if index is None:
        if source.folder is None:
            return []  # the weights are one file
        raise ModelError(
            f"model folder {shown(source.name)} has neither {WEIGHTS} nor {entry}; save it with "
            "save_pretrained"
        )
    shards = index.get("weight_map")
    if not shards or not isinstance(shards, dict) or not all(map(_is_name, shards.values())):
        raise ModelError(f"{entry} of model {shown(source.name)} has no weight_map of file names")
    names = sorted(set(shards.values()))
    for name in names:
        if not name.endswith(".safetensors"):
            raise ModelError(
                f"{entry} of model {shown(source.name)} names {name!r}; flexmask loads "
                "safetensors only (pickled weights can run code)"
            )
        if source.folder is not None and not os.path.isfile(source.folder / name):
            missing = [one for one in names if not os.path.isfile(source.folder / one)]
            raise ModelError(
                f"model folder {shown(source.name)} lacks {len(missing)} of {len(names)} files of "
                f"weights, such as {name[:80]}; download it again"
            )
    return names


def _is_name(value: object) -> bool:
    return isinstance(value, str) and "\0" not in value


def weight_shapes(path: Path, model: str) -> dict[str, list[int]]:
    """Read the shapes of the weights, by name, from the header of a file.

    Raises:
        ModelError: If there is no such file, or it is damaged.
    """
    if not os.path.isfile(path):
        raise ModelError(f"model folder {shown(str(path.parent))} has no file {path.name}")
    check_is_no_pointer(path, model)
    try:
        with safe_open(path, framework="pt") as file:
            names = file.keys()
            return {name: file.get_slice(name).get_shape() for name in names}
    except SafetensorError as error:
        raise ModelError(
            one_line(
                f"{path.name} of model {shown(model)} is damaged or not whole; download it again "
                f"({error})"
            )
        ) from None
