"""``flexmask kv-cache``: what a folder of keys and values holds, verified and pruned."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import pytest

from command import run_command
from flexmask.errors import OptionError
from flexmask.limits import LARGEST_BYTES, read_bytes, shown_bytes
from kv_spans import FORMAT, file_bytes, identity_of, open_store, path_of, span_of, tokens_of

NUMBERS = range(5)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of five spans, used a day after each other."""
    with open_store(tmp_path) as store:
        for number in NUMBERS:
            store.put(identity_of(number), span_of(number))
    for number in NUMBERS:
        used = datetime(2026, 1, 1 + number, tzinfo=UTC).timestamp()
        os.utime(path_of(tmp_path, number), (used, used))
    return tmp_path


def listed(*arguments: object, status: int = 0) -> dict[str, Any]:
    outcome = run_command("kv-cache", *arguments, "--json")
    assert (outcome.status, outcome.err) == (status, "")
    found = json.loads(outcome.out)
    assert isinstance(found, dict)
    return found


def test_a_folder_is_listed(folder: Path) -> None:
    num_bytes = sum(map(file_bytes, NUMBERS))
    assert listed(folder) == {
        "folder": str(folder),
        **FORMAT.record(),
        "spans": 5,
        "tokens": sum(map(tokens_of, NUMBERS)),
        "bytes": num_bytes,
        "oldest_use": "2026-01-01T00:00:00+00:00",
        "newest_use": "2026-01-05T00:00:00+00:00",
        "verified": False,
        "bad_files": [],
        "temporary_files": 0,
        "foreign": [],
        "removed": None,
    }
    outcome = run_command("kv-cache", folder)
    assert (outcome.status, outcome.err) == (0, "")
    assert outcome.out.splitlines() == [
        "model       org/model",
        "dtype       bfloat16",
        "layers      3, 2 key heads, keys of 8, values of 4",
        "layers      1, 1 key heads, keys of 16, values of 16",
        "spans       5",
        f"tokens      {sum(map(tokens_of, NUMBERS))}",
        f"size        {num_bytes / 1024:.1f} KiB",
        "oldest use  2026-01-01T00:00:00+00:00",
        "newest use  2026-01-05T00:00:00+00:00",
    ]


def test_an_empty_folder_is_listed(tmp_path: Path) -> None:
    open_store(tmp_path).close()
    assert "spans       0\n" in run_command("kv-cache", tmp_path, "--verify", "--prune", "0").out
    assert listed(tmp_path)["oldest_use"] is None


def test_damaged_files_are_counted_and_pruned(folder: Path) -> None:
    content = bytearray(path_of(folder, 1).read_bytes())
    content[-1] ^= 1
    path_of(folder, 1).write_bytes(content)
    path_of(folder, 2).write_bytes(content[:20])
    assert [file["reason"] for file in listed(folder, status=1)["bad_files"]] == [
        "its header does not end in it"
    ]
    outcome = run_command("kv-cache", folder, "--verify")
    assert outcome.status == 1
    assert "verified    all files; damaged or unreadable: 2\n" in outcome.out
    assert len(outcome.err.splitlines()) == 2
    assert f"{path_of(folder, 1).relative_to(folder)}: a checksum is wrong" in outcome.err
    outcome = run_command("kv-cache", folder, "--verify", "--prune", "1GB")
    assert outcome.status == 1
    assert "removed     0 spans, 0 files of killed runs, 2 damaged files" in outcome.out
    assert listed(folder, "--verify")["spans"] == 3


def test_pruning_keeps_the_spans_used_last(folder: Path) -> None:
    kept = file_bytes(3) + file_bytes(4)
    (folder / "notes.txt").write_text("mine")
    found = listed(folder, "--prune", kept)
    assert (found["spans"], found["bytes"]) == (2, kept)
    assert found["removed"] == {
        "spans": 3,
        "num_bytes": sum(file_bytes(number) for number in range(3)),
        "leftovers": 0,
        "left_bytes": kept,
        "damaged": 0,
    }
    assert [number for number in NUMBERS if path_of(folder, number).exists()] == [3, 4]
    outcome = run_command("kv-cache", folder, "--prune", "0")
    assert outcome.err == "warning: left alone, since flexmask did not write it: notes.txt\n"
    assert (folder / "notes.txt").read_text() == "mine"
    assert listed(folder)["bytes"] == 0


def test_mistakes_are_told_in_one_line(tmp_path: Path) -> None:
    errors = {
        (tmp_path / "nowhere",): "nowhere: cannot be read (No such file or directory)",
        (tmp_path,): f"{tmp_path}: not a folder of keys and values; it has no kv-cache.json",
        (tmp_path, "--prune", "8G"): "--prune must be a size such as 8GiB, 500MB or 1000000",
        ("",): "FOLDER is empty",
    }
    for arguments, message in errors.items():
        assert message in run_command("kv-cache", *arguments).error


def test_verifying_and_pruning_need_no_torch(folder: Path) -> None:
    program = (
        "import sys\n"
        "from flexmask_cli.app import main\n"
        f"sys.argv = ['flexmask', 'kv-cache', {str(folder)!r}, '--verify', '--prune', '1GiB']\n"
        "try:\n    main()\nexcept SystemExit as end:\n    assert not end.code\n"
        "assert not {'torch', 'numpy', 'safetensors', 'transformers'} & sys.modules.keys()\n"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=False
    )
    assert (result.returncode, result.stderr) == (0, "")


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        ("0", 0),
        ("1000000", 10**6),
        ("12B", 12),
        ("500MB", 500 * 10**6),
        ("8GiB", 8 * 2**30),
        ("1.5 tib", 3 * 2**39),
        (" 2kb ", 2000),
        ("8388607TiB", 8388607 * 2**40),
    ],
)
def test_sizes_are_read(text: str, num_bytes: int) -> None:
    assert read_bytes("size", text) == num_bytes


@pytest.mark.parametrize(
    "text", ["", "GiB", "8G", "8 apples", "-1", "+1", "1e9", "1.", ".5", "1,000", "٣", "9" * 400]
)
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(OptionError, match="size must be a size such as 8GiB, 500MB or 1000000"):
        read_bytes("size", text)


def test_sizes_have_bounds() -> None:
    with pytest.raises(OptionError, match="size must be at most 8,388,607 TiB, got '8388608TiB'"):
        read_bytes("size", "8388608TiB")
    with pytest.raises(OptionError, match=r"size must be positive, got '0\.1B'"):
        read_bytes("size", "0.1B", least=1)
    assert shown_bytes(LARGEST_BYTES) == "8388608.0 TiB"
    assert [shown_bytes(size) for size in (0, 1023, 1024, 1536 * 2**20)] == [
        *("0 bytes", "1023 bytes", "1.0 KiB", "1.5 GiB"),
    ]
