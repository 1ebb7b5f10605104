"""What identifies a model, so that no run is resumed with another."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from flexmask.checkpoint import identity as model_identity
from flexmask.checkpoint.identity import model_files
from flexmask.errors import OutputError
from flexmask.plugins.registry import load_registry, recorded_plugin
from flexmask.results.run_config import RunConfig
from plugin_site import Site, plugin
from result_runs import interrupted_run, make_requests, run


@pytest.fixture(autouse=True)
def identified_anew() -> Iterator[None]:
    """As in a new process."""
    model_files.cache_clear()
    yield
    model_files.cache_clear()


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    folder = tmp_path / "model"
    (folder / "additional_chat_templates").mkdir(parents=True)
    for name in ("config.json", "model.safetensors", "tokenizer.json", "chat_template.jinja"):
        (folder / name).write_text(f"content of {name}")
    (folder / "additional_chat_templates" / "tool.jinja").write_text("{{ tools }}")
    (folder / "README.md").write_text("of no consequence")
    return folder


def identified(path: Path) -> dict[str, str]:
    model_files.cache_clear()
    return dict(model_files(str(path)))


@pytest.mark.parametrize(
    "name",
    [
        "model.safetensors",
        "config.json",
        "tokenizer.json",
        "chat_template.jinja",
        "additional_chat_templates/tool.jinja",
    ],
)
def test_a_file_of_the_same_size_and_time_with_other_content_is_another(
    folder: Path, name: str
) -> None:
    before = identified(folder)
    file = folder / name
    status = file.stat()
    file.write_text(file.read_text()[::-1])
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    after = identified(folder)
    assert {key for key in before if before[key] != after[key]} == {name}


def test_a_copy_of_a_small_model_is_the_same(folder: Path) -> None:
    before = identified(folder)
    os.utime(folder / "model.safetensors", (1, 1))
    (folder / "README.md").write_text("changed")
    assert identified(folder) == before


def test_a_large_file_is_told_by_size_time_and_beginning(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model_identity, "HASHED_BYTES", 8)
    weights = folder / "model.safetensors"
    seen = [identified(folder)["model.safetensors"]]
    status = weights.stat()
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    seen.append(identified(folder)["model.safetensors"])
    weights.write_text("CONTENT OF model.safetensors")
    os.utime(weights, ns=(status.st_atime_ns, status.st_mtime_ns))
    seen.append(identified(folder)["model.safetensors"])
    assert len(set(seen)) == 3


def test_a_single_file_is_a_model_too(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF")
    assert list(identified(file)) == ["model.gguf"]


def test_a_model_of_the_hub_is_told_by_its_commit(tmp_path: Path) -> None:
    """In another process, since where the cache is is read once."""
    import subprocess
    import sys

    cache = tmp_path / "hub" / "models--owner--name"
    (cache / "refs").mkdir(parents=True)
    (cache / "refs" / "main").write_text("c0ffee" * 6 + "1234")
    snapshot = cache / "snapshots" / ("c0ffee" * 6 + "1234")
    snapshot.mkdir(parents=True)
    (snapshot / "config.json").write_text("{}")
    program = "from flexmask.checkpoint.identity import model_files as f\n"
    program += "print(f('owner/name'), f('owner/other'))"
    printed = subprocess.run(
        [sys.executable, "-c", program],
        env=os.environ | {"HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert printed == f"{{'commit': '{'c0ffee' * 6}1234'}} {{}}\n"


def test_a_model_that_is_not_there_has_no_identity(tmp_path: Path) -> None:
    assert identified(tmp_path / "nowhere") == {}


def config_of(folder: Path) -> RunConfig:
    return RunConfig({"strategy": "causal", "plugin": None, "model_files": identified(folder)})


@pytest.mark.parametrize("is_finished", [True, False])
def test_a_run_is_not_resumed_with_other_weights(
    tmp_path: Path, folder: Path, is_finished: bool
) -> None:
    output, requests = tmp_path / "out.feather", make_requests(3)
    if is_finished:
        run(output, requests[:2], config=config_of(folder))
    else:
        interrupted_run(output, requests, at="q2", config=config_of(folder))
    (folder / "model.safetensors").write_text("other weights, of another size")
    with pytest.raises(OutputError, match=r"a different run \(model_files\.model\.safetensors: "):
        run(output, requests, mode="resume", config=config_of(folder))


def test_a_result_that_does_not_record_its_model_cannot_be_resumed(
    tmp_path: Path, folder: Path
) -> None:
    output, requests = tmp_path / "out.feather", make_requests(2)
    interrupted_run(output, requests, at="q1", config=RunConfig({"strategy": "causal"}))
    with pytest.raises(OutputError) as raised:
        run(output, requests, mode="resume", config=config_of(folder))
    assert str(raised.value) == (
        f"{output}.partial: cannot be verified to be of the same model and plugin, since an "
        "earlier version of flexmask wrote it and did not record model_files and plugin; pass "
        "`overwrite` to start again, or another `output`"
    )


def test_a_plugin_is_told_by_its_version_and_its_code(site: Site) -> None:
    site.install("flexmask-mine", plugin("mine"))
    first = recorded_plugin("mine")
    assert first is not None
    assert (first["distribution"], first["version"]) == ("flexmask-mine", "1.0")
    (site.folder / "flexmask_mine.py").write_text(plugin("mine") + "\n# a change\n")
    edited = recorded_plugin("mine")
    (site.folder / "flexmask_mine-1.0.dist-info").rename(
        site.folder / "flexmask_mine-1.1.dist-info"
    )
    metadata = site.folder / "flexmask_mine-1.1.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text().replace("1.0", "1.1"))
    load_registry.cache_clear()
    newer = recorded_plugin("mine")
    assert (
        RunConfig({"plugin": edited})
        .differences(RunConfig({"plugin": first}))[0]
        .startswith("plugin.sha256: ")
    )
    assert RunConfig({"plugin": newer}).differences(RunConfig({"plugin": edited})) == [
        "plugin.version: '1.0' → '1.1'"
    ]


@pytest.mark.parametrize("name", ["causal", "masks.py:mine"])
def test_built_in_strategies_and_files_have_no_plugin(name: str) -> None:
    assert recorded_plugin(name) is None
