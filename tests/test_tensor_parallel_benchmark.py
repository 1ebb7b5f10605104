"""The program that measures tensor parallelism: its table, and how it ends what takes too long."""

import sys
from pathlib import Path

import pytest

import tensor_parallel
from flexmask.bench.floors import Rates
from tensor_parallel import Case, Way, run_processes, table


def test_the_share_is_that_of_the_floor_of_all_gpus_together() -> None:
    found = [
        {
            "way": {"name": "flexmask", "ranks": ranks},
            "case": {"phase": "decode", "rows": 1, "tokens": 256},
            "first_s": 9.0,
            "ms": 8.0 / ranks,
            "peak_gb": 1.0,
        }
        for ranks in (1, 2)
    ]
    _, *rows = table(found, "tiny", "cpu", Rates(1e10, 1e20))
    one, two = (row.split() for row in rows)
    assert float(one[-3]) == pytest.approx(2 * float(two[-3]), abs=2e-3)
    assert one[-2] == two[-2]


def test_cases_are_read_from_rows_and_tokens() -> None:
    cases = Case.all_of(["1x256"], ["8x1024"])
    assert cases == [Case("decode", 1, 256), Case("prefill", 8, 1024)]


@pytest.mark.parametrize(
    ("program", "reason"),
    [
        ("import time; time.sleep(60)", "ended at its limit of 1 s"),
        ("raise SystemExit('no such GPU')", "exit status 1: no such GPU"),
    ],
)
def test_a_way_that_fails_or_takes_too_long_is_ended_and_named(
    program: str, reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["-c", program])
    assert run_processes(Way("flexmask", 2), tmp_path, 1, 1) == ([], reason)


def test_a_way_that_does_not_end_after_its_last_result_keeps_its_results(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program = "import sys, time; open(sys.argv[-1], 'a').write('{}\\n'); time.sleep(60)"
    monkeypatch.setattr(sys, "argv", ["-c", program])
    monkeypatch.setattr(tensor_parallel, "CLOSING_S", 1)
    found, reason = run_processes(Way("flexmask", 2), tmp_path, 30, 1)
    assert (found, reason) == ([{}], "had not ended 1 s after its last result")
