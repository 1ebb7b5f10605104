"""Counts what was tried against flexmask, by kind, and what went wrong.

    python tests/count_hostile_cases.py            # all kinds, which takes an hour on two cores
    python tests/count_hostile_cases.py tasks pages

A test that tries several cases says how many in its property ``cases``; any other is one.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from xml.etree import ElementTree

TESTS = Path(__file__).parent

KINDS = {
    "kills": [
        "test_cli_kills.py",
        "test_results.py::test_a_run_killed_at_any_system_call_can_be_resumed",
        "test_results.py::test_a_run_killed_at_random_moments_equals_an_undisturbed_one",
        "test_precompute.py::test_runs_killed_at_random_moments_leave_what_undisturbed_ones_leave",
    ],
    "full disks": ["test_full_disks.py"],
    "journal damage": [
        "test_journal_damage.py::test_no_damage_to_a_journal_makes_a_wrong_row",
        "test_journal_damage.py::test_none_of_759_damages_to_a_journal_makes_a_wrong_row",
        "test_journal_damage.py::test_no_bit_of_a_journal_can_change_unnoticed",
    ],
    "inputs": ["test_hostile_inputs.py"],
    "tasks": ["test_hostile_tasks.py"],
    "options": ["test_hostile_options.py"],
    "plugins": ["test_hostile_plugins.py"],
    "damaged models": ["test_damaged_models.py"],
    "pages": ["test_hostile_pages.py"],
}
"""The tests of each kind."""


@dataclass
class Count:
    """The outcome of the cases of a kind."""

    passed: int = 0
    wrong: int = 0
    skipped: int = 0


def run(kind: str) -> Count:
    """Run the tests of a kind, those that take long included."""
    places = [str(TESTS / place) for place in KINDS[kind]]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        options = ["-q", "-m", "", "-p", "no:cacheprovider", f"--basetemp={folder}/tests"]
        options += [f"--junitxml={report}", "-o", "junit_family=xunit1"]  # which has properties
        subprocess.run([sys.executable, "-m", "pytest", *options, *places], check=False)
        return counted(report)


def counted(report: Path) -> Count:
    """Count the cases of a report that pytest wrote."""
    count = Count()
    for test in ElementTree.parse(report).iter("testcase"):
        properties = {each.get("name"): each.get("value") for each in test.iter("property")}
        cases = int(properties.get("cases") or 1)
        if test.find("failure") is not None or test.find("error") is not None:
            count.wrong += cases
        elif test.find("skipped") is not None:
            count.skipped += cases
        else:
            count.passed += cases
    return count


def main(kinds: list[str]) -> None:
    """Print the table; exit with 1 if anything went wrong."""
    if unknown := set(kinds) - KINDS.keys():
        sys.exit(f"no kind {', '.join(sorted(unknown))}; there are {', '.join(KINDS)}")
    counts = {kind: run(kind) for kind in kinds or KINDS}
    print(f"\n{'kind':16}{'cases':>8}{'passed':>8}{'wrong':>8}{'skipped':>8}")
    for kind, count in counts.items():
        cases = count.passed + count.wrong + count.skipped
        print(f"{kind:16}{cases:8,}{count.passed:8,}{count.wrong:8,}{count.skipped:8,}")
    sys.exit(any(count.wrong for count in counts.values()))


if __name__ == "__main__":
    main(sys.argv[1:])
