"""Whether the weights that were loaded are those of the model: all of them, and no others.

A model whose weights do not all come from its files runs with random ones, and fluently so.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flexmask.checkpoint.model_name import shown
from flexmask.checkpoint.transformers_calls import LONGEST_MESSAGE, one_line
from flexmask.errors import ModelError

MOST_NAMED = 5
_ADVICE = "; config.json and weights must be whole and of one model"

_NOT_OF_NEXT_TOKENS = re.compile(
    # Towers of other modalities, where the language model of a multimodal checkpoint is loaded.
    r"(^|\.)(vision|visual|image|video|audio|speech|multi_?modal|mm_)\w*\."
    # Heads that say something else: the value of a state, the tokens after the next.
    r"|(^|\.)(v_head|value_head|mtp)\b"
    # Buffers that were once saved, and are computed.
    r"|(^|\.)inv_freq$|\.masked_bias$"
)


def check_loaded_weights(architecture: str, report: Mapping[str, Any], model: str) -> None:
    """Find out whether weights are missing, of no use, or of another shape.

    What transformers passes over for an architecture, and weights that are tied to others, is
    not in its report. Weights that have no part in the next token are passed over here.

    Args:
        architecture: Name of the model's class.
        report: What ``from_pretrained(output_loading_info=True)`` gives beside the model.
        model: Its name.

    Raises:
        ModelError: If so.
    """
    shapes = [
        f"{key}: {_shape(saved)}, not {_shape(wanted)}"
        for key, saved, wanted in sorted(report["mismatched_keys"])
    ]
    unknown = {key for key in report["unexpected_keys"] if not _NOT_OF_NEXT_TOKENS.search(key)}
    faults = [
        (list(names), what)
        for names, what in (
            (sorted(report["missing_keys"]), "missing"),
            (shapes, "of another shape"),
            (sorted(unknown), f"unknown to {architecture}"),
        )
        if names
    ]
    if faults:
        raise ModelError(_message(f"cannot load model {shown(model)}: ", faults))
    if errors := report.get("error_msgs"):
        raise ModelError(f"cannot load model {shown(model)}: {errors[0]}")


def _message(beginning: str, faults: Sequence[tuple[Sequence[str], str]]) -> str:
    """Each kind of fault with its count and up to five names, as many as there is room for."""
    for most in range(MOST_NAMED, 0, -1):
        parts = [
            f"{len(names)} {'weight is' if len(names) == 1 else 'weights are'} {what} "
            f"({_some(names, most)})"
            for names, what in faults
        ]
        text = beginning + ", ".join(parts)
        if len(text + _ADVICE) <= LONGEST_MESSAGE:
            return text + _ADVICE
    return one_line(text)


def _some(names: Sequence[str], most: int) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def _shape(sizes: Iterable[int]) -> str:
    return "×".join(map(str, sizes)) or "one number"
