"""Models whose files are damaged or made to do harm: refused in one line, and nothing runs."""

from __future__ import annotations

import json
import os
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from flexmask.demo import model_path
from flexmask.encoding.tokenization import RequestTokenizer, load_tokenizer
from flexmask.engine import Engine
from flexmask.errors import ModelError, RequestError
from flexmask.request import Request
from sampling_of_cases import sampled

Files = dict[str, str | bytes | None]
"""What stands in place of the bundled model's files; None for nothing."""

CONFIG = json.loads((model_path() / "config.json").read_text())
TOKENIZER = (model_path() / "tokenizer.json").read_text()
TOKENIZER_CONFIG = json.loads((model_path() / "tokenizer_config.json").read_text())
WEIGHTS = (model_path() / "model.safetensors").read_bytes()
START = 8 + struct.unpack("<Q", WEIGHTS[:8])[0]
HEADER = json.loads(WEIGHTS[8:START])
NAME = "model.embed_tokens.weight"
DEEP = "[" * 100_000
CODE = "import os\nos.system('touch PWNED')\n"

DAMAGED = "is damaged or not whole; download it again"
SIZE = "config.json and weights must be whole and of one model"
NO_TOKENIZER = "cannot load the tokenizer of"
NO_MODEL = "cannot load model"
NO_MAP = "has no weight_map of file names"
LACKS = "lacks 1 of 1 files of weights"


def weights(header: Any, start: int | None = None) -> Files:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    length = len(text) if start is None else start
    return {"model.safetensors": struct.pack("<Q", length) + text + WEIGHTS[START:]}


def tensor(**values: Any) -> Files:
    """Weights of which one says something else of itself."""
    return weights(HEADER | {NAME: HEADER[NAME] | values})


def config(**values: Any) -> Files:
    return {"config.json": json.dumps(CONFIG | values)}


def tokenizer(change: Callable[[dict[str, Any]], object]) -> Files:
    parts = json.loads(TOKENIZER)
    change(parts)
    return {"tokenizer.json": json.dumps(parts)}


def tokenizer_config(**values: Any) -> Files:
    return {"tokenizer_config.json": json.dumps(TOKENIZER_CONFIG | values)}


def index(content: Any) -> Files:
    text = content if isinstance(content, str) else json.dumps({"weight_map": content})
    return {"model.safetensors": None, "model.safetensors.index.json": text}


def split(pattern: str) -> Files:
    part = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    return tokenizer(lambda parts: parts.update(pre_tokenizer=part | {"invert": False}))


CASES: dict[str, tuple[Files, str]] = {
    "no bytes": ({"model.safetensors": b""}, DAMAGED),
    "seven bytes": ({"model.safetensors": bytes(7)}, DAMAGED),
    "a header of no bytes": ({"model.safetensors": bytes(8)}, DAMAGED),
    "a header of 2^63 bytes": (weights(b"{}", 2**63), DAMAGED),
    "a header beyond the file": (weights(HEADER, len(WEIGHTS)), DAMAGED),
    "a header that is no JSON": (weights(b"not JSON"), DAMAGED),
    "a header of lists": (weights(DEEP.encode()), DAMAGED),
    "a header that is no text": (weights(b"\xff{}"), DAMAGED),
    "a tensor of -1 rows": (tensor(shape=[-1, 4]), DAMAGED),
    "a tensor of 2^120 numbers": (tensor(shape=[2**60, 2**60]), DAMAGED),
    "a tensor of an unknown type": (tensor(dtype="F128"), DAMAGED),
    "a tensor of another type": (tensor(dtype="I8"), DAMAGED),
    "a tensor beyond the file": (tensor(data_offsets=[0, 2**62]), DAMAGED),
    "a tensor that ends before it begins": (tensor(data_offsets=[100, 0]), DAMAGED),
    "a tensor over another": (tensor(data_offsets=[4, HEADER[NAME]["data_offsets"][1]]), DAMAGED),
    "bytes that belong to no tensor": ({"model.safetensors": WEIGHTS + b"x"}, DAMAGED),
    "a byte too few": ({"model.safetensors": WEIGHTS[:-1]}, DAMAGED),
    "a pickle": ({"model.safetensors": b"\x80\4cos\nsystem\n(S'touch PWNED'\ntR."}, DAMAGED),
    "ten million layers": (config(num_hidden_layers=10**7), SIZE),
    "no layers": (config(num_hidden_layers=0), SIZE),
    "-1 layers": (config(num_hidden_layers=-1), SIZE),
    "10^12 hidden units": (config(hidden_size=6 * 10**12), SIZE),
    "10^12 tokens": (config(vocab_size=10**12), SIZE),
    "10^9 units within a layer": (config(intermediate_size=10**9), SIZE),
    "no hidden units": (config(hidden_size=0), SIZE),
    "one and a half heads": (config(num_attention_heads=1.5), "expected int, got float"),
    "heads of no size": (config(head_dim=0), NO_MODEL),
    "text for a number": (config(rms_norm_eps="x"), "expected float, got str"),
    "text for the rotation": (
        config(rope_parameters={"rope_type": "default", "rope_theta": "x"}),
        NO_MODEL,
    ),
    "a list for the type": (config(model_type=[]), NO_MODEL),
    "code for the activation": (config(hidden_act="__import__('os').getcwd()"), "KeyError"),
    "code for the dtype": (config(dtype="os.system"), NO_MODEL),
    "NaN beside the norm": (config(rms_norm_eps=float("nan")), "NaN or infinity for every token"),
    "a rotation by nothing": (
        config(rope_parameters={"rope_type": "default", "rope_theta": 0}),
        "NaN or infinity for every token",
    ),
    "positions divided by nothing": (
        config(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 0}),
        "NaN or infinity for every token",
    ),
    "lists in config.json": ({"config.json": DEEP}, "RecursionError"),
    "UTF-16": ({"config.json": json.dumps(CONFIG).encode("utf-16")}, "not|JSON"),
    "code that comes with the model": (
        config(model_type="x", auto_map={"AutoConfig": "evil.C"}) | {"evil.py": CODE},
        "comes with code of its own",
    ),
    "lists in generation_config.json": ({"generation_config.json": DEEP}, "RecursionError"),
    "null for a tokenizer": ({"tokenizer.json": "null"}, NO_TOKENIZER),
    "lists for a tokenizer": ({"tokenizer.json": DEEP}, NO_TOKENIZER),
    "bytes for a tokenizer": ({"tokenizer.json": b"\xff\xfe"}, NO_TOKENIZER),
    "a tokenizer without a model": (tokenizer(lambda parts: parts.pop("model")), NO_TOKENIZER),
    "a tokenizer without tokens": (
        tokenizer(lambda parts: parts["model"].update(vocab={})),
        "out of vocabulary",
    ),
    "token -1": (tokenizer(lambda parts: parts["model"]["vocab"].update(z=-1)), "expected u32"),
    "token 2^32": (
        tokenizer(lambda parts: parts["model"]["vocab"].update(z=2**32)),
        "expected u32",
    ),
    "a merge of what is no token": (
        tokenizer(lambda parts: parts["model"].update(merges=[["q", "zzzz"]])),
        "out of vocabulary",
    ),
    "a pattern that is none": (split("("), "unmatched parenthesis"),
    "a number for a token": (tokenizer_config(eos_token=3), "eos_token has to be either str"),
    "a token with a name for a number": (
        tokenizer_config(added_tokens_decoder={"x": {"content": "y"}}),
        NO_TOKENIZER,
    ),
    "lists in tokenizer_config.json": ({"tokenizer_config.json": DEEP}, "RecursionError"),
    "an index without files": (index({}), NO_MAP),
    "an index without a map": (index("{}"), NO_MAP),
    "an index of numbers": (index({NAME: 3}), NO_MAP),
    "an index of a name with a zero": (index({NAME: "a\0.safetensors"}), NO_MAP),
    "an index of a long name": (index({NAME: "x" * 5000 + ".safetensors"}), LACKS),
    "an index of a folder": (index({NAME: "folder.safetensors"}), LACKS),
    "an index of itself": (index({NAME: "model.safetensors.index.json"}), "safetensors only"),
    "an index that leads elsewhere": (index({NAME: "../other.safetensors"}), "not in its folder"),
    "a config that leads elsewhere": (
        config(transformers_weights="../other.safetensors"),
        "not in its folder",
    ),
    "lists in an index": (index(DEEP), "RecursionError"),
}


@pytest.fixture
def model_of(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[Files], str]:
    """Makes a folder of links to the bundled model's files, with others in some places."""
    monkeypatch.chdir(tmp_path)
    Path("other.safetensors").write_bytes(WEIGHTS)

    def model_of(files: Files) -> str:
        folder = Path("model")
        (folder / "folder.safetensors").mkdir(parents=True)
        for file in model_path().iterdir():
            if file.is_file() and file.name not in files:
                os.symlink(file, folder / file.name)
        for name, content in files.items():
            if content is not None:
                made = content if isinstance(content, bytes) else content.encode()
                (folder / name).write_bytes(made)
        return str(folder)

    return model_of


@pytest.mark.parametrize(("files", "message"), sampled(CASES))
def test_a_damaged_model_is_refused_in_one_line(
    model_of: Callable[[Files], str], files: Files, message: str
) -> None:
    with pytest.raises(ModelError, match=message) as caught:
        Engine.from_pretrained(model_of(files), device="cpu")
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) <= 250
    assert not Path("PWNED").exists()


TOKENIZERS: dict[str, tuple[Files, str]] = {
    "a pattern that takes too long": (split("(a+)+$"), "segment 1: it cannot be tokenized: Panic"),
    "a template of a token that is not there": (
        tokenizer(
            lambda parts: parts.update(
                post_processor={
                    "type": "TemplateProcessing",
                    "single": [{"SpecialToken": {"id": "nope", "type_id": 0}}],
                    "pair": [],
                    "special_tokens": {},
                }
            )
        ),
        "it cannot be tokenized: Panic",
    ),
}


@pytest.mark.parametrize(("files", "message"), TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_tokenizer_that_panics_is_an_error_of_the_request(
    model_of: Callable[[Files], str], files: Files, message: str
) -> None:
    loaded = load_tokenizer(model_of(files))
    with pytest.raises(RequestError, match=message):
        RequestTokenizer(loaded)(Request(("a" * 40 + "!", "b"), suffix="c"))
