"""What a model's folder must hold, and which of its weights may be read."""

from __future__ import annotations

import re
from pathlib import Path

from safetensors import SafetensorError, safe_open

from flexmask.checkpoint.gguf_file import read_header
from flexmask.checkpoint.model_name import shown
from flexmask.checkpoint.source import CheckpointSource, check_is_no_pointer
from flexmask.checkpoint.transformers_calls import one_line
from flexmask.errors import ModelError

WEIGHTS = "model.safetensors"
INDEX = "model.safetensors.index.json"
ADAPTER = "adapter_config.json"
_TOKENIZER_FILE = re.compile(r"tokenizer|vocab|merges|spiece|sentencepiece|\.model$|\.tiktoken$")


def check_folder(source: CheckpointSource) -> None:
    """Find out whether a folder has what makes it one of a model; anything else passes.

    Raises:
        ModelError: If not.
    """
    name, folder = source.name, source.folder
    if folder is None:
        return
    if (folder / ADAPTER).is_file():
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
        f"model {shown(name)} holds an adapter, which flexmask does not load; merge it into its "
        "model (peft's merge_and_unload) and save that"
    )


def check_files(source: CheckpointSource) -> None:
    """Find out whether the files of a model are there, whole, and of kinds that run no code.

    Of a model on the hub only its JSON files and the index of its weights are looked at; that
    the weights are whole was checked as they came.

    Raises:
        ModelError: If not.
        OSError: If the hub cannot be reached.
    """
    if source.gguf is not None:
        return
    source.read_json("generation_config.json")
    # With peft installed, transformers would apply an adapter, whose weights may be pickled.
    if source.file(ADAPTER) is not None:
        raise _adapter_error(source.name)
    entry = _entry(source)
    shards = _shards(source, entry) if entry.endswith(".index.json") else [entry]
    if source.folder is not None:
        for shard in shards:
            _check_weights(source.folder / shard, source.name)


def check_tokenizer_files(source: CheckpointSource) -> None:
    """Find out whether there is a tokenizer, as far as that shows before it is loaded.

    Raises:
        ModelError: If not.
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
    """Where transformers begins to read weights: a file of them, or their index."""
    named = (source.read_json("config.json") or {}).get("transformers_weights")
    if named is None:
        # Of both it takes the file. On the hub an index is the only one that can name others.
        return WEIGHTS if source.folder and source.file(WEIGHTS) else INDEX
    if str(named).endswith((".safetensors", ".safetensors.index.json")):
        return str(named)
    raise ModelError(
        f"config.json of model {shown(source.name)} names {str(named)[:40]!r} as its weights; "
        "flexmask loads safetensors only (pickled weights can run code)"
    )


def _shards(source: CheckpointSource, entry: str) -> list[str]:
    """Files that the index of a checkpoint names."""
    index = source.read_json(entry)
    if index is None:
        if source.folder is None:
            return []  # its weights are one file
        raise ModelError(
            f"model folder {shown(source.name)} has neither {WEIGHTS} nor {entry}; save it with "
            "save_pretrained"
        )
    shards = index.get("weight_map")
    if not isinstance(shards, dict) or not all(isinstance(x, str) for x in shards.values()):
        raise ModelError(f"{entry} of model {shown(source.name)} has no weight_map of file names")
    names = sorted(set(shards.values()))
    for name in names:
        if not name.endswith(".safetensors"):
            raise ModelError(
                f"{entry} of model {shown(source.name)} names {name!r}; flexmask loads "
                "safetensors only (pickled weights can run code)"
            )
        if source.folder is not None and not (source.folder / name).is_file():
            missing = [one for one in names if not (source.folder / one).is_file()]
            raise ModelError(
                f"model folder {shown(source.name)} lacks {len(missing)} of {len(names)} files of "
                f"weights, such as {name}; download it again"
            )
    return names


def _check_weights(path: Path, model: str) -> None:
    if not path.is_file():
        raise ModelError(f"model folder {shown(str(path.parent))} has no file {path.name}")
    check_is_no_pointer(path, model)
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise ModelError(
            one_line(
                f"{path.name} of model {shown(model)} is damaged or not whole; download it again "
                f"({error})"
            )
        ) from None
