"""Copies of a tokenizer for pieces of a text: edited pipelines, and tokens that it does not find.

Many tokenizers put a space before each text that they are given (SentencePiece's dummy prefix:
a ``Prepend`` normalizer or a ``Metaspace`` pre-tokenizer), and some strip its ends. For a piece of
a longer text both are wrong where the text goes on. Components are edited as the JSON that
``tokenizers`` keeps them in (seen in 0.23).

Source: https://github.com/huggingface/transformers/issues/26273 and 28010.
"""

from __future__ import annotations

import json
from typing import Any, Literal

from tokenizers import Tokenizer
from tokenizers.models import Model

Left = Literal["start", "token", "text"]
"""What stands before a piece: nothing; an added token such as ``<s>``, which cuts the text for
the tokenizer; or text that the piece continues."""

Right = Literal["text", "end"]
"""What stands after a piece: text that continues it; or the end, or an added token."""

_Component = dict[str, Any]

_BYTES = tuple(f"<0x{byte:02X}>" for byte in range(256))

_ANY_SPACE: _Component = {"type": "Replace", "pattern": {"Regex": r"\s+"}, "content": " "}


def is_editable(tokenizer: Tokenizer) -> bool:
    """Whether no part of the pipeline is written in Python, which has no JSON."""
    parts = (tokenizer.normalizer, tokenizer.pre_tokenizer, tokenizer.decoder)
    try:
        for part in parts:
            _parsed(part)
    except Exception as error:  # tokenizers raises nothing more special
        if "Custom" in str(error):
            return False
        raise
    return True


def tokenizer_at(tokenizer: Tokenizer, left: Left, right: Right) -> Tokenizer:
    """The tokenizer for pieces between ``left`` and ``right``: itself where nothing changes."""
    normalizer = _parsed(tokenizer.normalizer)
    pre_tokenizer = _parsed(tokenizer.pre_tokenizer)
    normalizers = _normalizers_at(normalizer, left, right)
    pre_tokenizers = _flat(pre_tokenizer, "pretokenizers")
    edited = [_pre_tokenizer_at(each, left) for each in pre_tokenizers]
    kinds = [each["type"] for each in pre_tokenizers]
    if kinds[:2] == ["WhitespaceSplit", "Metaspace"] and "text" in (left, right):
        # The two give every word a space, whether one stood before it or not. Here the first word
        # has only the one that the text has.
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
    """The components of a sequence, of sequences in it too."""
    if component is None:
        return []
    if component["type"] != "Sequence":
        return [component]
    return [part for each in component[within] for part in _flat(each, within)]


def _parsed(component: Any) -> _Component | None:
    return None if component is None else json.loads(component.__getstate__())


def _tokenizer_of(**components: _Component) -> Tokenizer:
    """A tokenizer made of components, which can be taken from it as objects."""
    model = {"type": "WordLevel", "vocab": {}, "unk_token": ""}
    return Tokenizer.from_str(json.dumps({"added_tokens": [], **components, "model": model}))


def ordinary_special_ids(model: Model) -> frozenset[int]:
    """Tokens that a model gives to ordinary text even where they are flagged as special.

    That is the token for what its vocabulary lacks, and those of single bytes.
    """
    state = json.loads(model.__getstate__())
    if state["type"] == "Unigram":
        unknown = state["unk_id"]
    else:
        unknown = state["unk_token"] and model.token_to_id(state["unk_token"])
    byte_ids = map(model.token_to_id, _BYTES) if state.get("byte_fallback") else ()
    return frozenset(int(id_) for id_ in (unknown, *byte_ids) if id_ is not None)


def without_tokens(tokenizer: Tokenizer, contents: set[str], nonce: str) -> Tokenizer:
    """A copy that does not find some tokens in a text; all ids stay.

    Not to match added tokens is not enough: the vocabulary of the model may hold them too, and a
    word-level or Unigram model finds them there. So they are renamed to what no text holds.

    Args:
        tokenizer: What is copied.
        contents: Texts of the tokens.
        nonce: Text that stands in no other, before which they are put.
    """
    whole = json.loads(tokenizer.to_str())
    model = whole["model"]
    if model.get("byte_fallback"):  # which looks for these names in the vocabulary
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
