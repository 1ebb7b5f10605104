"""Writes docs/plugin-api.md from the docstrings of what a plugin may rely on: ``make docs``."""

from __future__ import annotations

import inspect
import re
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import flexmask.check
from flexmask import layout, mask_mods, mod_types
from flexmask.layout import Layout, TokenizedRequest
from flexmask.layout_batch import LayoutBatch
from flexmask.plugins import hookspecs, registry
from flexmask.strategy import ScaledPart, Strategy, parameter
from flexmask.strategy_function import mask_strategy

TARGET = Path(__file__).with_name("plugin-api.md")

HEAD = """# The plugin API

Written by `make docs` from the code. What stands here is what a plugin may rely on: none of it is
removed or changes its meaning without a line in CHANGELOG.md and a higher second number of the
version (0.1 to 0.2; from 1.0 on, a higher first number). State the version that you wrote against
in the plugin's metadata, `dependencies = ["flexmask>=0.1"]`: a flexmask that is older says so in a
sentence and loads the other plugins. Everything else may change in any version.
"""

SECTIONS = ("Args", "Attributes", "Returns", "Raises", "Yields", "Example")

MASKS: list[Callable[..., Any]] = [
    mask_mods.causal,
    mask_mods.same_segment,
    mask_mods.is_prefix,
    mask_mods.is_fusion_tail,
    mask_mods.within_window,
    mask_mods.multiples_apart,
    mask_mods.holds_tokens,
    mask_mods.and_masks,
    mask_mods.or_masks,
]


def page() -> str:
    """The whole page."""
    parts = [
        HEAD,
        "## The hook\n",
        _text(hookspecs.__doc__),
        _function(hookspecs.register_strategies, "@flexmask.hookimpl\ndef "),
        "## A strategy\n",
        _function(mask_strategy, "@flexmask.", signature="  # or mask_strategy(is_causal=False)"),
        _function(parameter, "flexmask."),
        _class(
            Strategy,
            "flexmask.",
            ["mask_mod", "layout", "allowed", "score_mod", "scaled_part"],
            with_init=False,
        ),
        _class(ScaledPart, "flexmask.strategy.", []),
        "`name` and `is_causal` are class attributes; `is_causal` is True unless set.\n",
        "## What a mask is built from\n",
        *(
            _class(kind, "flexmask.mod_types.", [], with_init=False)
            for kind in (mod_types.MaskMod, mod_types.ScoreMod, mod_types.RowMod)
        ),
        _class(LayoutBatch, "flexmask.layout_batch.", ["table", "device"], with_init=False),
        *(_function(mask, "flexmask.mask_mods.") for mask in MASKS),
        "## Layouts\n",
        f"Segment ids: `flexmask.layout.PREFIX` is {layout.PREFIX}, segments count from 1, `TAIL` "
        f"is {layout.TAIL} and `PADDING` {layout.PADDING}.\n",
        _class(TokenizedRequest, "flexmask.", ["with_copied_prefix"]),
        _class(Layout, "flexmask.", []),
        _function(layout.shared_prefix_layout, "flexmask.layout."),
        _function(layout.copied_prefix_layout, "flexmask.layout."),
        _function(layout.placed_layout, "flexmask.layout."),
        _function(layout.consecutive_starts, "flexmask.layout."),
        "## The check\n",
        _function(flexmask.check.check_strategy, "flexmask.check."),
        _class(flexmask.check.Finding, "flexmask.check.", []),
        "| rule | asserts |\n|---|---|",
        *(f"| {rule.name} | {rule.summary} |" for rule in flexmask.check.RULES),
        "\n## Environment variables\n",
        f"- `{registry.LOAD_PLUGINS}`: names of the distributions whose plugins load, separated "
        "by commas. Unset means all; empty, or `flexmask --no-plugins`, the built-in ones alone.",
    ]
    return "\n".join(parts) + "\n"


def _function(function: Callable[..., Any], prefix: str, signature: str = "") -> str:
    shown = signature or _signature(function)
    return f"```python\n{prefix}{function.__name__}{shown}\n```\n\n{_text(function.__doc__)}"


def _class(cls: type, prefix: str, members: list[str], with_init: bool = True) -> str:
    signature = _signature(cls).removesuffix(" -> None") if with_init else ""
    parts = [f"```python\nclass {prefix}{cls.__name__}{signature}\n```\n\n{_text(cls.__doc__)}"]
    for name in members:
        member = getattr(cls, name)
        if isinstance(member, property):
            parts.append(f"**`.{name}`** {_text(member.__doc__)}")
        else:
            signature = _signature(member).replace("self, ", "").replace("(self)", "()")
            parts.append(f"**`.{name}{signature}`**\n\n{_text(member.__doc__)}")
    return "\n".join(parts)


def _signature(function: Callable[..., Any]) -> str:
    """With annotations as they are written, not as the strings they are kept as."""
    return re.sub(r"(: |-> )'([^']+)'", r"\1\2", str(inspect.signature(function)))


def _text(docstring: str | None) -> str:
    """A docstring in Google style, as Markdown."""
    blocks = re.split(
        rf"^({'|'.join(SECTIONS)})::?\n", inspect.cleandoc(docstring or ""), flags=re.M
    )
    parts = [_paragraphs(blocks[0])]
    for title, body in zip(blocks[1::2], blocks[2::2], strict=True):
        body = textwrap.dedent(body).strip("\n")
        if title == "Example":
            parts.append(f"```python\n{textwrap.dedent(body)}\n```\n")
        elif title in ("Returns", "Yields"):
            parts.append(f"*{title}:* {_inline(' '.join(body.split()))}\n")
        else:
            items = re.split(r"\n(?=\S)", body)
            lines = (" ".join(item.split()).partition(": ") for item in items)
            listed = "\n".join(f"- `{name}`: {_inline(text)}" for name, _, text in lines)
            parts.append(f"*{title}:*\n\n{listed}\n")
    return "\n".join(parts)


def _paragraphs(text: str) -> str:
    """Paragraphs, and the indented blocks that ``::`` introduces."""
    lines = []
    for paragraph in text.strip().split("\n\n"):
        if paragraph.startswith("    "):
            lines.append(f"```toml\n{textwrap.dedent(paragraph)}\n```\n")
        else:
            lines.append(_inline(" ".join(paragraph.split())).replace("::", ":") + "\n")
    return "\n".join(lines)


def _inline(text: str) -> str:
    return text.replace("``", "`")


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
