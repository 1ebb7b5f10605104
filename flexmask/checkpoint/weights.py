"""Checks that a model was loaded with all of its weights and no others.

A weight that is missing from the files is initialised randomly, and generation goes on with it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from flexmask.checkpoint.transformers_calls import LONGEST_MESSAGE, one_line
from flexmask.errors import ModelError

MOST_NAMED = 5
WHOLE_MODEL = "; config.json and weights must be whole and of one model"

_NOT_OF_NEXT_TOKENS = re.compile(
    # Towers of other modalities in the checkpoint of a multimodal model.
    r"(^|\.)(vision|visual|image|video|audio|speech|multi_?modal|mm_)\w*\."
    # Heads that predict something else: the value of a state, or later tokens.
    r"|(^|\.)(v_head|value_head|mtp)\b"
    # Buffers that older versions saved, and that are computed now.
    r"|(^|\.)inv_freq$|\.masked_bias$"
)


def check_loaded_weights(
    architecture: str, report: Mapping[str, Any], what: str, advice: str = WHOLE_MODEL
) -> None:
    """Check that no weights are missing, unknown, or of another shape.

    The report of transformers omits weights that the architecture ignores and those that are tied
    to others. This check ignores weights that do not affect the next token.

    Args:
        architecture: Name of the model's class.
        report: The report of ``from_pretrained(output_loading_info=True)``.
        what: The beginning of the message, such as ``cannot load model 'x'``.
        advice: The end of the message.

    Raises:
        ModelError: If some are.
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
        raise ModelError(_message(f"{what}: ", faults, advice))
    if errors := report.get("error_msgs"):
        raise ModelError(f"{what}: {errors[0]}")


def _message(beginning: str, faults: Sequence[tuple[Sequence[str], str]], advice: str) -> str:
    """Return each kind of fault with its count and as many names as fit, at most five."""
    for most in range(MOST_NAMED, 0, -1):
        parts = [
            f"{len(names)} {'weight is' if len(names) == 1 else 'weights are'} {what} "
            f"({_some(names, most)})"
            for names, what in faults
        ]
        text = beginning + ", ".join(parts)
        if len(text + advice) <= LONGEST_MESSAGE:
            return text + advice
    return one_line(text)


def _some(names: Sequence[str], most: int) -> str:
    return ", ".join(names[:most]) + (", …" if len(names) > most else "")


def _shape(sizes: Iterable[int]) -> str:
    return "×".join(map(str, sizes)) or "one number"
