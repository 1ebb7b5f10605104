"""Journals that a disk, or somebody, has damaged: rows are right or generated again."""

from __future__ import annotations

import os
import random
import struct
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.feather
import pytest

from damage import DAMAGES
from flexmask.errors import FlexMaskWarning, OutputError
from flexmask.results.result_writer import ResultWriter, read_finished_rows
from flexmask.results.schema import RUN, SCHEMA
from result_runs import (
    CONFIG,
    answer,
    expected_table,
    interrupted_run,
    journal_of,
    make_requests,
    run,
    uuids,
)

ROWS = 12


def damage_and_resume(output: Path, whole: bytes, expected: pa.Table, case: int) -> str:
    """Damage a journal in one way, read it and resume it; gives what came of it."""
    generator = random.Random(case)
    content = bytearray(whole)
    DAMAGES[case % len(DAMAGES)](content, generator)
    journal_of(output).write_bytes(content)
    output.unlink(missing_ok=True)
    requests = make_requests(ROWS)
    right = expected.to_pylist()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            found = read_finished_rows(journal_of(output)).to_pylist()
            assert all(row in right for row in found), "wrong rows were read"
            summary = run(output, requests, mode="resume")
        except OutputError as error:
            message = str(error)
            assert "\n" not in message
            assert not output.exists()
            return "refused"
    assert read_finished_rows(output).equals(expected), "wrong rows were kept"
    if content == whole:
        assert not caught
        return "unchanged"
    is_said = any(issubclass(item.category, FlexMaskWarning) for item in caught)
    # A journal that was cut between two writes is whole, and only shorter.
    assert is_said or (bytes(content) == whole[: len(content)] and summary.resumed < ROWS - 1)
    return "resumed"


def damaged_journals(output: Path, tmp_path: Path, cases: range) -> Counter[str]:
    requests = make_requests(ROWS)
    expected = expected_table(requests, tmp_path)
    interrupted_run(output, requests, at=f"q{ROWS - 1}")
    whole = journal_of(output).read_bytes()
    return Counter(damage_and_resume(output, whole, expected, case) for case in cases)


@pytest.fixture
def output(tmp_path: Path) -> Path:
    return tmp_path / "results" / "out.feather"


def test_no_damage_to_a_journal_makes_a_wrong_row(
    output: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    record_property("cases", 96)
    outcomes = damaged_journals(output, tmp_path, range(96))
    assert outcomes["resumed"] > 60


@pytest.mark.long
def test_none_of_759_damages_to_a_journal_makes_a_wrong_row(
    output: Path, tmp_path: Path, record_property: Callable[[str, object], None]
) -> None:
    record_property("cases", 759)
    outcomes = damaged_journals(output, tmp_path, range(1000, 1759))
    print(f"759 damaged journals: {dict(outcomes)}, 0 wrong")
    assert outcomes["resumed"] > 500


@pytest.mark.long
def test_no_bit_of_a_journal_can_change_unnoticed(
    output: Path, record_property: Callable[[str, object], None]
) -> None:
    requests = make_requests(2)
    interrupted_run(output, requests, at="q1")
    whole = journal_of(output).read_bytes()
    right = read_finished_rows(journal_of(output))
    record_property("cases", len(whole) * 8)
    for bit in range(len(whole) * 8):
        content = bytearray(whole)
        content[bit // 8] ^= 1 << bit % 8
        journal_of(output).write_bytes(content)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            try:
                rows = read_finished_rows(journal_of(output))
            except OutputError:
                continue
        assert rows.num_rows == 0, f"bit {bit} is not in the checksum"
        assert rows.schema.equals(right.schema, check_metadata=True)


def test_rows_before_the_damage_are_kept_and_the_rest_is_said(output: Path) -> None:
    requests = make_requests(6)
    interrupted_run(output, requests, at="q3")
    end = journal_of(output).stat().st_size
    interrupted_run(output, requests, at="q5", mode="resume")
    with journal_of(output).open("r+b") as journal:
        journal.seek(end + 700)
        journal.write(b"\0" * 100)
    with pytest.warns(FlexMaskWarning, match=r"partial: damaged; the 3 rows before that are kept"):
        assert uuids(journal_of(output)) == ["q0", "q1", "q2"]
    with pytest.warns(FlexMaskWarning, match="bytes after them dropped; the rows in them are gen"):
        assert run(output, requests, mode="resume").resumed == 3
    assert uuids(output) == [f"q{number}" for number in range(6)]


def test_a_damaged_journal_is_not_replaced_by_a_new_run(output: Path) -> None:
    requests = make_requests(3)
    with (
        pytest.raises(KeyboardInterrupt),
        ResultWriter.open(output, config=CONFIG, requests=requests) as writer,
    ):
        start = journal_of(output).stat().st_size
        writer.write([answer(requests[0])])
        raise KeyboardInterrupt
    content = bytearray(journal_of(output).read_bytes())
    content[start + 900] ^= 1
    journal_of(output).write_bytes(content)
    with pytest.raises(OutputError, match="0 finished rows of an interrupted run; pass `resume`"):
        run(output, requests)
    assert journal_of(output).read_bytes() == content


def test_batches_of_another_journal_do_not_count(output: Path, tmp_path: Path) -> None:
    """Each batch is whole; the chain of checksums tells that the second is not of this run."""
    requests = make_requests(3)
    other = tmp_path / "other.feather"
    changed = [replace(request, prefix="Réponde.\n\n") for request in requests]
    parts = []
    for path, asked in ((output, requests), (other, changed)):
        with (
            pytest.raises(KeyboardInterrupt),
            ResultWriter.open(path, config=CONFIG, requests=asked) as writer,
        ):
            writer.write([answer(asked[0])])
            middle = journal_of(path).stat().st_size
            writer.write([answer(asked[1])])
            raise KeyboardInterrupt
        content = journal_of(path).read_bytes()
        parts.append((content[:middle], content[middle:]))
    journal_of(output).write_bytes(parts[0][0] + parts[1][1])
    with pytest.warns(FlexMaskWarning, match="damaged; the 1 rows before"):
        assert uuids(journal_of(output)) == ["q0"]


def test_any_reader_of_arrow_streams_reads_a_journal(output: Path) -> None:
    requests = make_requests(3)
    interrupted_run(output, requests, at="q2")
    rows = pa.ipc.open_stream(journal_of(output).read_bytes()).read_all()
    assert rows.equals(read_finished_rows(journal_of(output)), check_metadata=True)


def test_a_journal_without_checksums_is_refused_with_what_to_do(output: Path) -> None:
    output.parent.mkdir()
    schema = SCHEMA.with_metadata({RUN: CONFIG.to_json()})
    journal_of(output).write_bytes(schema.serialize().to_pybytes())
    said = "its rows cannot be verified, since it has no checksums .*; pass `overwrite` to start"
    with pytest.raises(OutputError, match=said):
        run(output, make_requests(2), mode="resume")
    with pytest.raises(OutputError, match=said):
        run(output, make_requests(2))
    assert run(output, make_requests(2), mode="overwrite").rows == 2


def test_a_journal_whose_beginning_is_damaged_is_refused(output: Path) -> None:
    interrupted_run(output, make_requests(3), at="q2")
    content = bytearray(journal_of(output).read_bytes())
    content[100] ^= 1
    journal_of(output).write_bytes(content)
    with pytest.raises(OutputError, match=r"damaged at its beginning, .*; pass `overwrite` to"):
        run(output, make_requests(3), mode="resume")


def test_a_journal_that_is_removed_during_a_run_is_written_again(output: Path) -> None:
    requests = make_requests(4)
    with ResultWriter.open(output, config=CONFIG, requests=requests) as writer:
        writer.write(map(answer, requests[:2]))
        journal_of(output).unlink()
        writer.write([answer(requests[2])])
        assert uuids(journal_of(output)) == ["q0", "q1", "q2"]
        with pytest.raises(OutputError, match="another process is writing it"):
            run(output, requests, mode="resume")
        journal_of(output).unlink()
        writer.write([answer(requests[3])])
        journal_of(output).unlink()
    assert uuids(output) == ["q0", "q1", "q2", "q3"]
    assert os.listdir(output.parent) == ["out.feather"]


def test_a_journal_that_is_removed_with_its_folder_is_kept_by_an_interrupted_run(
    output: Path,
) -> None:
    requests = make_requests(4)
    with (
        pytest.raises(KeyboardInterrupt),
        ResultWriter.open(output, config=CONFIG, requests=requests) as writer,
    ):
        writer.write(map(answer, requests[:2]))
        journal_of(output).unlink()
        output.parent.rmdir()
        raise KeyboardInterrupt
    assert uuids(journal_of(output)) == ["q0", "q1"]
    assert run(output, requests, mode="resume").resumed == 2


@pytest.mark.parametrize("size", [0, 700])
def test_a_journal_that_is_truncated_during_a_run_ends_it_at_the_next_write(
    output: Path, size: int
) -> None:
    requests = make_requests(4)
    with (
        pytest.raises(OutputError, match="another process has changed it while this one wrote"),
        ResultWriter.open(output, config=CONFIG, requests=requests) as writer,
    ):
        writer.write(map(answer, requests[:2]))
        os.truncate(journal_of(output), size)
        writer.write([answer(requests[2])])


def test_another_file_in_the_place_of_the_journal_is_left_alone(output: Path) -> None:
    requests = make_requests(2)
    with (
        pytest.raises(OutputError, match="another file has replaced it"),
        ResultWriter.open(output, config=CONFIG, requests=requests) as writer,
    ):
        journal_of(output).unlink()
        journal_of(output).write_text("theirs")
        writer.write(map(answer, requests))
    assert journal_of(output).read_text() == "theirs"


def test_rows_that_are_changed_during_a_run_make_no_file(output: Path) -> None:
    requests = make_requests(2)
    with (
        pytest.raises(OutputError, match="damaged while it was written: 0 of 2 rows are intact"),
        ResultWriter.open(output, config=CONFIG, requests=requests) as writer,
    ):
        start = journal_of(output).stat().st_size
        writer.write(map(answer, requests))
        with journal_of(output).open("r+b") as journal:
            journal.seek(start + 40)
            journal.write(struct.pack("<Q", 1 << 40))
    assert os.listdir(output.parent) == ["out.feather.partial"]
