"""Shell completion, asked as a shell asks."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

PROGRAM = (
    "import sys\n"
    "from flexmask_cli.app import main\n"
    "sys.argv[0] = 'flexmask'\n"
    "try:\n"
    "    main()\n"
    "finally:\n"
    "    print(sorted({'torch', 'transformers', 'pyarrow'} & sys.modules.keys()), file=sys.stderr)"
)


def completed(line: str) -> list[str]:
    """What bash offers for the last word of a line, without having imported torch."""
    words = line.split(" ")
    environment = os.environ | {
        "_FLEXMASK_COMPLETE": "complete_bash",
        "COMP_WORDS": line,
        "COMP_CWORD": str(len(words) - 1),
        "FLEXMASK_LOAD_PLUGINS": "",
    }
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "torch" not in result.stderr
    assert "transformers" not in result.stderr
    return result.stdout.split()


@pytest.mark.parametrize(
    ("line", "offered"),
    [
        ("flexmask gen", ["generate"]),
        ("flexmask generate --prefill", ["--prefill-kernel"]),
        ("flexmask generate --strategy prefix", ["prefix_lm", "prefix_segment"]),
        ("flexmask check causa", ["causal"]),
        ("flexmask generate --task my", ["myriadlama"]),
        ("flexmask generate --fusion weighted_m", ["weighted_mean", "weighted_max"]),
        ("flexmask bench --dtype bfl", ["bfloat16"]),
        ("flexmask bench --dtype bfx", []),
        ("flexmask generate --on-error s", ["stop", "skip"]),
    ],
)
def test_a_shell_completes_commands_options_and_names(line, offered):
    assert completed(line) == offered


def test_the_script_that_a_shell_installs_calls_flexmask():
    environment = os.environ | {"_FLEXMASK_COMPLETE": "source_bash"}
    result = subprocess.run(
        [sys.executable, "-m", "flexmask_cli"],
        env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert "complete -o default -F _flexmask_completion flexmask" in result.stdout
