"""Where result files are written, and what is left alone."""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from pathlib import Path

import pytest

from flexmask.errors import OutputError
from flexmask.results.formats import EXTENSIONS
from flexmask.results.result_writer import ResultWriter, check_output, read_finished_rows
from flexmask.results.resume import OutputMode
from flexmask.results.whole_file import replacing
from result_runs import (
    CONFIG,
    answer,
    interrupted_run,
    journal_of,
    make_requests,
    run,
    uuids,
)

REQUESTS = make_requests(3)


@pytest.fixture(params=EXTENSIONS)
def output(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    (tmp_path / "results").mkdir()
    return tmp_path / "results" / f"out{request.param}"


def mode_of(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o664, 0o444])
def test_overwriting_keeps_the_mode(output: Path, mode: int) -> None:
    run(output, REQUESTS[:1])
    output.chmod(mode)
    interrupted_run(output, REQUESTS, at="q2", mode="overwrite")
    assert mode_of(journal_of(output)) == mode, "rows that others may not read stand there too"
    run(output, REQUESTS, mode="resume")
    assert mode_of(output) == mode


def test_a_new_file_has_the_mode_that_the_umask_leaves(output: Path) -> None:
    previous = os.umask(0o027)
    try:
        run(output, REQUESTS)
    finally:
        os.umask(previous)
    assert {mode_of(path) for path in output.parent.iterdir()} == {0o640}


def test_a_private_result_has_a_private_record_beside_it(tmp_path: Path) -> None:
    output = tmp_path / "out.jsonl"
    run(output, REQUESTS[:1])
    output.chmod(0o600)
    (tmp_path / "out.run.json").unlink()
    run(output, REQUESTS, mode="overwrite")
    assert mode_of(tmp_path / "out.run.json") == 0o600


@pytest.mark.parametrize("is_there", [True, False])
def test_a_link_is_written_through(output: Path, tmp_path: Path, is_there: bool) -> None:
    link = tmp_path / f"latest{output.suffix}"
    link.symlink_to(output)
    if is_there:
        run(output, REQUESTS[:1])
    run(link, REQUESTS, mode="overwrite" if is_there else "new")
    assert link.is_symlink()
    assert os.readlink(link) == str(output)
    assert uuids(output) == uuids(link) == ["q0", "q1", "q2"]
    assert run(link, REQUESTS, mode="resume").resumed == 3


def test_a_link_and_its_file_have_one_lock_and_one_journal(output: Path, tmp_path: Path) -> None:
    link = tmp_path / f"latest{output.suffix}"
    link.symlink_to(output)
    interrupted_run(link, REQUESTS, at="q2")
    assert run(output, REQUESTS, mode="resume").resumed == 2


def test_a_link_to_another_kind_of_file_is_refused(output: Path, tmp_path: Path) -> None:
    victim = tmp_path / "notes.txt"
    victim.write_text("mine")
    output.symlink_to(victim)
    with pytest.raises(OutputError, match=r"notes.txt: unknown extension '.txt'"):
        run(output, REQUESTS, mode="overwrite")
    other = output.with_name("other.jsonl" if output.suffix != ".jsonl" else "other.parquet")
    output.unlink()
    output.symlink_to(other)
    with pytest.raises(OutputError, match="which has another extension; name that file itself"):
        run(output, REQUESTS, mode="overwrite")
    assert victim.read_text() == "mine"
    assert not other.exists()


@pytest.mark.parametrize("beside", [".tmp", ".partial"])
@pytest.mark.parametrize("make_link", [os.symlink, os.link])
def test_no_link_beside_the_output_is_followed(
    output: Path, tmp_path: Path, beside: str, make_link
) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    trap = output.with_name(output.name + beside)
    make_link(victim, trap)
    try:
        run(output, REQUESTS, mode="overwrite")
    except OutputError as error:
        message = str(error)
        assert beside == ".partial"
        assert "it is a symbolic link" in message
    else:
        assert uuids(output) == ["q0", "q1", "q2"]
    assert victim.read_text() == "mine"


def test_no_link_at_the_name_of_the_record_is_followed(tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    (tmp_path / "out.run.json.tmp").symlink_to(victim)
    run(tmp_path / "out.jsonl", REQUESTS)
    assert victim.read_text() == "mine"
    assert sorted(os.listdir(tmp_path)) == ["out.jsonl", "out.run.json", "victim"]


@pytest.mark.parametrize("mode", ["new", "resume", "overwrite"])
@pytest.mark.parametrize("content", ["{}", '{"run": "of another program"}', "\xff", ""])
def test_a_neighbour_at_the_place_of_the_record_is_left_alone(
    tmp_path: Path, mode: OutputMode, content: str
) -> None:
    neighbour = tmp_path / "out.run.json"
    neighbour.write_text(content, encoding="latin-1")
    with pytest.raises(
        OutputError, match=r"out\.run\.json: .*file belongs to another program; move it"
    ):
        check_output(tmp_path / "out.jsonl", mode)
    with pytest.raises(
        OutputError, match=r"out\.run\.json: .*file belongs to another program; move it"
    ):
        run(tmp_path / "out.jsonl", REQUESTS, mode=mode)
    assert neighbour.read_text(encoding="latin-1") == content
    assert os.listdir(tmp_path) == ["out.run.json"]


@pytest.mark.parametrize("mode", ["new", "resume"])
def test_the_record_of_rows_that_were_moved_is_left_alone(
    tmp_path: Path, mode: OutputMode
) -> None:
    run(tmp_path / "out.jsonl", REQUESTS)
    (tmp_path / "out.jsonl").rename(tmp_path / "kept.jsonl")
    before = (tmp_path / "out.run.json").read_bytes()
    with pytest.raises(OutputError, match=r"records the run of another file, since there is no"):
        run(tmp_path / "out.jsonl", REQUESTS, mode=mode)
    assert (tmp_path / "out.run.json").read_bytes() == before


def test_names_that_differ_in_case_have_records_of_their_own(tmp_path: Path) -> None:
    run(tmp_path / "out.jsonl", REQUESTS[:1])
    run(tmp_path / "out.JSONL", REQUESTS)
    assert uuids(tmp_path / "out.jsonl") == ["q0"]
    assert read_finished_rows(tmp_path / "out.JSONL").num_rows == 3
    assert {"out.run.json", "out.JSONL.run.json"} < set(os.listdir(tmp_path))


def test_a_file_system_without_locks_keeps_no_empty_journal(
    output: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(fd: int, operation: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr(fcntl, "flock", fail)
    with pytest.raises(OutputError, match=r"cannot be opened and locked \(No locks available\)"):
        run(output, REQUESTS)
    assert os.listdir(output.parent) == []
    journal_of(output).write_bytes(b"rows")
    with pytest.raises(OutputError, match=r"cannot be opened and locked \(No locks available\)"):
        run(output, REQUESTS)
    assert journal_of(output).read_bytes() == b"rows"


def test_a_name_that_is_not_utf8_is_refused(tmp_path: Path) -> None:
    output = tmp_path / os.fsdecode(b"out\xff.jsonl")
    with pytest.raises(OutputError, match="a name that is not UTF-8; choose another `output`"):
        check_output(output, "new")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["a\0b.feather", "x/\0/out.feather"])
def test_a_name_that_no_file_can_have_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(OutputError):
        check_output(tmp_path / name, "new")


def test_another_working_directory_during_a_run_moves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path)
    with ResultWriter.open("out.feather", config=CONFIG, requests=REQUESTS) as writer:
        os.chdir("elsewhere")
        writer.write(map(answer, REQUESTS))
    assert uuids(tmp_path / "out.feather") == ["q0", "q1", "q2"]
    assert sorted(os.listdir(tmp_path)) == ["elsewhere", "out.feather"]


def test_a_file_that_cannot_be_written_whole_is_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "times.json"
    path.write_text("old")
    with (
        pytest.raises(OutputError, match=r"times.json: cannot be written \(No space left"),
        replacing(path) as file,
    ):
        file.write(b"half")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["times.json"]
