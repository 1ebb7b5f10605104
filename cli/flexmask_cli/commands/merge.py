"""``flexmask merge``: joins the result files of all shards into one."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from flexmask_cli.option_groups import takes_options
from flexmask_cli.option_kinds import flag, path, paths_argument, refuse_devices
from flexmask_cli.options import AsJson
from flexmask_cli.render.generation import print_counts
from flexmask_cli.render.lines import print_json


@dataclass(frozen=True)
class MergeOptions:
    """The parts, and the file that they become."""

    parts: Annotated[
        list[Path],
        paths_argument(
            metavar="PART", help="Result files of 'generate --shard', one of each shard."
        ),
    ]
    output: Annotated[
        Path,
        path("--output", "-o", help="The .feather, .parquet or .jsonl file to write."),
    ]
    overwrite: Annotated[bool, flag("--overwrite", help="Replace the output.")] = False
    as_json: AsJson = False


@takes_options
def merge(*, options: MergeOptions) -> None:
    """Join the result files of all shards, in the order of the input.

    The file equals the one that a single process writes. Parts of different runs or inputs, and
    missing or repeated shards, are refused.
    """
    from flexmask.results.merge import merge as merge_files

    for part in options.parts:
        refuse_devices(part)
    summary = merge_files(options.parts, options.output, is_replaced=options.overwrite)
    if options.as_json:
        print_json({"output": str(options.output), **asdict(summary)})
    else:
        print_counts(options.output, summary)
