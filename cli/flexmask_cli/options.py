"""Options that several commands take."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, cast

import typer

from flexmask.errors import OptionError
from flexmask.limits import read_size

if TYPE_CHECKING:
    from flexmask.attention.flex_call import PrefillKernel
    from flexmask.results.resume import OutputMode


def refuse_empty(param: typer.CallbackParam, value: str | None) -> str | None:
    """Pass on what an option names.

    Raises:
        OptionError: If that is empty: a shell variable that is not set, which must not stand for
            a default.
    """
    if value == "":
        raise _empty(max(param.opts, key=len))
    return value


def path_of(option: str) -> Callable[[str], Path]:
    """The parser of an option that takes a path.

    An empty one would be the working folder. Arrow opens no file whose name is not UTF-8, which
    would show once a run has ended.
    """

    def path(text: str) -> Path:
        if not text:
            raise _empty(option)
        try:
            text.encode()
        except UnicodeEncodeError:
            shown = text.encode(errors="backslashreplace").decode()
            raise OptionError(f"{option} {shown}: its name is not UTF-8; choose another") from None
        return Path(text)

    return path


def refuse_devices(path: Path) -> None:
    """Refuse a result that can be read only once, since its first bytes tell its kind.

    Raises:
        OptionError: If it is a pipe or device.
    """
    if path.exists() and not path.is_file() and not path.is_dir():
        raise OptionError(f"{path}: not a file but a pipe or device; write it to a file")


def _empty(option: str) -> OptionError:
    name = option if option.startswith("-") else option.upper()
    return OptionError(f"{name} is empty; name something or leave it out (an unset variable?)")


StrategyName = Annotated[
    str,
    typer.Option(
        "--strategy",
        "-s",
        help="Mask strategy; see 'flexmask strategies'. Or one in a file: path/to/file.py:name.",
    ),
]
Parameters = Annotated[
    list[str] | None,
    typer.Option("--param", "-p", metavar="KEY=VALUE", help="Parameter of the strategy."),
]

FusionName = Annotated[
    str,
    typer.Option(
        "--fusion",
        help="attention: all segments in one prompt, under the strategy's mask. With any other, "
        "each segment is a prompt of its own. One generation from the logits of all: mean, max, "
        "weighted_mean, weighted_max. Or of prompts alone: none (the first), each, vote (the "
        "answer of most).",
    ),
]
FusionWeights = Annotated[
    str | None,
    typer.Option(
        "--fusion-weights",
        metavar="column|confidence",
        help="Weights of weighted_mean and weighted_max: the input's column 'weights', or how "
        "sure the model is of each prompt's next token.",
    ),
]

Model = Annotated[
    str | None,
    typer.Option(
        callback=refuse_empty,
        help="Hub id, folder or .gguf file. Default: the small bundled model.",
    ),
]
MaxNewTokens = Annotated[int, typer.Option(help="Most tokens to generate per request.")]
BatchSize = Annotated[str, typer.Option(help="Prompts that run together: a number or auto.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda or cuda:N.")]
Dtype = Annotated[
    str,
    typer.Option(
        help="auto, float32, bfloat16 or float16; auto is float32 on a CPU and "
        "the model's own on a GPU."
    ),
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="Run Python code that comes with the model.")
]

PrefillKernelName = Annotated[
    str,
    typer.Option(
        "--prefill-kernel",
        help="What computes prompts on a GPU: auto, triton or flash; flash needs "
        "flexmask[flash]. auto takes it for long prompts where it is installed.",
    ),
]


class BadRows(StrEnum):
    """What ``--on-error`` takes."""

    STOP = "stop"
    SKIP = "skip"


OnBadRow = Annotated[
    BadRows,
    typer.Option(
        "--on-error",
        help="What a row does that cannot be used: stop the run, or stand in the output with "
        "its reason.",
    ),
]
Seed = Annotated[int, typer.Option(help="Seed of sampling.")]
Temperature = Annotated[
    float, typer.Option(help="0 takes the most likely token; more is more random.")
]
TopP = Annotated[float, typer.Option(help="Sample among tokens that reach this probability.")]
TopK = Annotated[int, typer.Option(help="Sample among this many tokens; 0 for all.")]
Stop = Annotated[
    list[str] | None,
    typer.Option(help="Text that ends a generation; \\n is a newline. Repeatable."),
]
ChatTemplate = Annotated[
    bool | None,
    typer.Option(
        "--chat-template/--no-chat-template",
        help="Use the model's chat template. Default: as the task says, else no.",
    ),
]
AllowSpecialTokens = Annotated[
    bool,
    typer.Option(
        "--allow-special-tokens",
        help="Read the text of a special token in the input, such as <eos>, as that token. "
        "Default: it is plain text.",
    ),
]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="Print errors and warnings only.")]
Resume = Annotated[
    bool, typer.Option("--resume", help="Keep the rows that are there, generate the rest.")
]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace the output.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="Say what runs, and how.")]


def split_pairs(pairs: Sequence[str], option: str, form: str) -> dict[str, str]:
    """Turn texts with a ``=`` into a mapping.

    Args:
        pairs: The texts.
        option: What they were given to, such as ``--param``.
        form: What they should look like, such as ``KEY=VALUE``.

    Raises:
        OptionError: If a text has no ``=``, or a key stands twice.
    """
    found: dict[str, str] = {}
    for pair in pairs:
        name, separator, value = pair.partition("=")
        if not separator or not name:
            raise OptionError(f"{option} takes {form}, got {pair!r}")
        if name in found:
            raise OptionError(f"{option} {name} is given twice")
        found[name] = value
    return found


def parse_parameters(pairs: Sequence[str]) -> dict[str, str]:
    """The parameters of a strategy by name."""
    return split_pairs(pairs, "--param", "KEY=VALUE")


def parse_batch_size(text: str) -> int | None:
    """A number of rows; None for ``auto``."""
    if text == "auto":
        return None
    return read_size("--batch-size", text, "a positive number or auto")


def parse_lengths(text: str) -> list[int]:
    """Turn ``40,35,38`` into numbers of tokens.

    Raises:
        OptionError: If one is not a positive number.
    """
    form = "positive numbers as in 40,35,38"
    return [read_size("--segments", length, form, given=text) for length in text.split(",")]


def parse_prefill_kernel(text: str) -> PrefillKernel | None:
    """A kernel; None for ``auto``."""
    if text == "auto":
        return None
    if text not in ("triton", "flash"):
        raise OptionError(f"--prefill-kernel must be auto, triton or flash, got {text!r}")
    return cast("PrefillKernel", text)


def parse_mode(resume: bool, overwrite: bool) -> OutputMode:
    """What to do where results stand."""
    if resume and overwrite:
        raise OptionError("--resume and --overwrite exclude each other")
    return "resume" if resume else "overwrite" if overwrite else "new"
