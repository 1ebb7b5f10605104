"""Edits copies of a tokenizer so that they encode pieces of a text, or ignore special tokens.

Many tokenizers put a space before each text (SentencePiece's dummy prefix: a ``Prepend``
normalizer or a ``Metaspace`` pre-tokenizer), and some strip both ends. For a piece of a longer
text both are wrong at an end where the text continues. Components are edited in the JSON form
into which ``tokenizers`` serializes them (seen in 0.23).

Source: https://github.com/huggingface/transformers/issues/26273 and 28010.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from tokenizers import Tokenizer
from tokenizers.models import Model

Left = Literal["start", "token", "text"]
"""The context to the left of a piece: nothing; an added token such as ``<s>``, at which the
tokenizer splits the text; or text that the piece continues."""

Right = Literal["text", "end"]
"""The context to the right of a piece: text that continues it, or the end or an added token."""

_Component = dict[str, Any]

_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))

_ANY_SPACE: _Component = {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}


def is_editable(tokenizer: Tokenizer) -> bool:
    """Return True if no part of the pipeline is written in Python, which cannot be serialized."""
    parts = (tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder)
    try:
        for part in parts:
            _parsed(part)
    except Exception as error:  # tokenizers raises plain Exception
        if "Custom" in str(error):
            return False
        raise
    return True


def tokenizer_at(tokenizer: Tokenizer, left: Left, right: Right) -> Tokenizer:
    """Return a tokenizer for pieces between ``left`` and ``right``; the same one if unchanged."""
    normalizer = _parsed(tokenizer.normalizer)
    pre_tokenizer = _parsed(tokenizer.pre_tokenizer)
    normalizers = _normalizers_at(normalizer, left, right)
    pre_tokenizers = _flat(pre_tokenizer, "pretokenizers")
    edited = [_pre_tokenizer_at(each, left) for each in pre_tokenizers]
    kinds = [each["type"] for each in pre_tokenizers]
    if kinds[:2] == ["WhitespaceSplit", "Metaspace"] and "text" in (left, right):
        # Together they put a space before every word. Here the first word keeps only the space
        # that the text has.
        normalizers.append(_ANY_SPACE)
        scheme = "never" if left == "text" else "first"
        edited = [pre_tokenizers[1] | {"prepend_scheme": scheme, "split": True}, *edited[2:]]
    if (normalizers, edited) == (_flat(normalizer, "normalizers"), pre_tokenizers):
        return tokenizer
    copy = Tokenizer.from_str(tokenizer.to_str())
    parts = _tokenizer_of(
        normalizer={"type": "Sequence", "normalizers": normalizers},
        pre_tokenizer={"type": "Sequence", "pretokenizers": edited},
    )
    copy.normalizer, copy.pre_tokenizer = parts.normalizer, parts.pre_tokenizer
    copy.no_padding()
    copy.no_truncation()
    return copy


def _normalizers_at(normalizer: _Component | None, left: Left, right: Right) -> list[_Component]:
    edited = []
    for each in _flat(normalizer, "normalizers"):
        if each["type"] == "Prepend" and left == "text":
            continue
        if each["type"] == "Strip":
            strips_left = each["strip_left"] and left != "text"
            strips_right = each["strip_right"] and right != "text"
            each = each | {"strip_left": strips_left, "strip_right": strips_right}
        edited.append(each)
    return edited


def _pre_tokenizer_at(component: _Component, left: Left) -> _Component:
    if component["type"] == "Metaspace":
        scheme = component["prepend_scheme"]
        if left == "text" or (left == "token" and scheme == "first"):
            return component | {"prepend_scheme": "never"}
    if component["type"] == "ByteLevel" and left == "text":
        return component | {"add_prefix_space": False}
    return component


def _flat(component: _Component | None, within: str) -> list[_Component]:
    """Return the components of a sequence, flattened recursively."""
    if component is None:
        return []
    if component["type"] != "Sequence":
        return [component]
    return [part for each in component[within] for part in _flat(each, within)]


def _parsed(component: Any) -> _Component | None:
    return None if component is None else json.loads(component.__getstate__())


def _tokenizer_of(**components: _Component) -> Tokenizer:
    """Make a tokenizer of JSON components, from which they can be taken as objects."""
    model = {"type": "WordLevel", "vocab": {}, "unk_token": ""}
    return Tokenizer.from_str(json.dumps({"added_tokens": [], **components, "model": model}))


def ordinary_special_ids(model: Model) -> frozenset[int]:
    """Return the tokens that ordinary text may be encoded to even if they are flagged as special.

    These are the unknown token and the tokens of single bytes.
    """
    state = json.loads(model.__getstate__())
    if state["type"] == "Unigram":
        unknown = state["unk_id"]
    else:
        unknown = state["unk_token"] and model.token_to_id(state["unk_token"])
    byte_ids = map(model.token_to_id, _BYTES) if state.get("byte_fallback") else ()
    return frozenset(int(id_) for id_ in (unknown, *byte_ids) if id_ is not None)


def without_tokens(tokenizer: Tokenizer, contents: set[str], nonce: str) -> Tokenizer:
    """Return a copy that does not recognise some tokens in a text; all ids stay the same.

    Disabling the match of added tokens is not enough: the model's vocabulary may hold them too,
    and a word-level or Unigram model finds them there. So they are renamed to text that does not
    occur.

    Args:
        tokenizer: The tokenizer to copy.
        contents: Texts of the tokens.
        nonce: Random text, put before the names of the tokens.
    """
    whole = json.loads(tokenizer.to_str())
    model = whole["model"]
    if model.get("byte_fallback"):  # byte fallback looks up these names in the vocabulary
        added = [token for token in whole["added_tokens"] if token["content"] not in _BYTES]
        whole["added_tokens"], contents = added, contents.difference(_BYTES)
    names = {content: nonce + content for content in contents}
    for token in whole["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    if model["type"] == "Unigram":
        model["vocab"] = [[names.get(piece, piece), score] for piece, score in model["vocab"]]
    else:
        model["vocab"] = {names.get(word, word): id_ for word, id_ in model["vocab"].items()}
    if "unk_token" in model:
        model["unk_token"] = names.get(model["unk_token"], model["unk_token"])
    if "merges" in model:
        pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
        model["merges"] = [pair for pair in pairs if not contents & {*pair, "".join(pair)}]
    return Tokenizer.from_str(json.dumps(whole | {"post_processor": None}))
