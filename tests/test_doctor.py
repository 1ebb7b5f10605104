import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from command import run_command
from flexmask.attention.backend import dense_attention, flexmask_attention
from flexmask.doctor import Check, attention_checks, environment_checks, run_checks
from flexmask.doctor.check_result import WrongResult, tried
from flexmask.doctor.kernel_checks import check_decode_kernels
from flexmask.plugins.distribution_loading import PluginRecord
from flexmask.plugins.registry import Registry
from flexmask.version import TESTED
from flexmask_cli.app import main

ROOT = Path(__file__).parents[1]


def doctor(*arguments, **variables):
    return subprocess.run(
        [sys.executable, "-m", "flexmask_cli", "doctor", *arguments],
        env=os.environ | {name: str(value) for name, value in variables.items()},
        capture_output=True,
        text=True,
    )


def states(printed):
    return {check["name"]: check["state"] for check in json.loads(printed)}


def test_everything_that_is_needed_works_here():
    result = run_command("doctor", "--json")
    assert result.status == 0, result.out
    found = states(result.out)
    for name in ("python", "compiler", "compile cache", "model cache"):
        assert found[name] == "ok"
    assert {found["torch"], found["transformers"]} <= {"ok", "warning"}
    assert found["attention, prefill"] == found["attention, decode"] == "ok"
    assert found["plugin causal"] == "ok"
    assert "broken" not in found.values()


def test_without_a_compiler_attention_is_found_broken_and_the_exit_status_says_so(tmp_path):
    empty = tmp_path / "empty"
    empty.mkdir()
    result = doctor("--json", PATH=empty, CXX="", TORCHINDUCTOR_CACHE_DIR=tmp_path / "cache")
    assert result.returncode == 1, result.stderr
    found = states(result.stdout)
    assert found["compiler"] == found["attention, prefill"] == "broken"
    compiler = next(c for c in json.loads(result.stdout) if c["name"] == "compiler")
    assert "apt install g++" in compiler["advice"]


def test_folders_that_cannot_be_written_are_named_with_what_to_set(tmp_path):
    (tmp_path / "file").write_text("")
    result = doctor(
        TORCHINDUCTOR_CACHE_DIR=tmp_path / "file" / "cache", HF_HOME=tmp_path / "file" / "home"
    )
    assert result.returncode == 1
    lines = result.stdout.splitlines()
    assert any(line.startswith("BROKEN  compile cache") for line in lines)
    assert "set TORCHINDUCTOR_CACHE_DIR to a folder" in result.stdout
    assert "set HF_HOME to a folder" in result.stdout
    assert "attention" in lines[-1]
    assert "not tried without a compile cache" in lines[-1]


def test_a_compiler_that_fails_is_broken_with_its_message(monkeypatch):
    monkeypatch.setenv("CXX", "false")
    assert environment_checks.check_compiler().state == "broken"
    monkeypatch.setenv("CXX", "no-such-compiler")
    check = environment_checks.check_compiler()
    assert check.detail == "no-such-compiler: No such file or directory"


def test_old_and_missing_packages_are_broken(monkeypatch):
    monkeypatch.setitem(TESTED, "torch", ("99.0",))
    check = environment_checks.check_package("torch")
    assert (check.state, check.advice) == ("broken", "pip install 'torch>=99.0'")
    monkeypatch.setitem(TESTED, "no_such_package", ("1.0",))
    check = environment_checks.check_package("no_such_package")
    assert check.detail == "ModuleNotFoundError: No module named 'no_such_package'"


def test_a_version_that_the_tests_do_not_run_with_is_a_warning_and_not_an_error(monkeypatch):
    monkeypatch.setattr(environment_checks, "version", lambda name: "2.13.1+cpu")
    assert environment_checks.check_package("torch") == Check("torch", "ok", "2.13.1+cpu")
    for installed in ("2.12.0", "99.0.1.dev0"):
        monkeypatch.setattr(environment_checks, "version", {"torch": installed}.__getitem__)
        check = environment_checks.check_package("torch")
        assert check.state == "warning"
        assert check.detail == f"{installed}, and flexmask is tested with 2.11, 2.13, 2.14"


def test_the_oldest_tested_versions_are_those_that_installation_asks_for():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for name, versions in TESTED.items():
        assert f"{name}>={versions[0]}" in project["dependencies"]


def test_without_torch_attention_is_not_tried(monkeypatch):
    monkeypatch.setitem(sys.modules, "transformers", None)
    checks = list(run_checks())
    assert checks[-1] == Check("attention", "broken", "not tried without torch and transformers")


def test_a_plugin_that_failed_is_broken(monkeypatch):
    failed = PluginRecord("mine", "1.0", "entry", "mine.plugin", error="ImportError: no")
    monkeypatch.setattr(environment_checks, "load_registry", lambda: Registry((failed,)))
    (check,) = environment_checks.check_plugins()
    assert check.state == "broken"
    assert check.detail == "mine 1.0 (entry): ImportError: no"


def test_attention_that_computes_something_else_is_broken(monkeypatch):
    def wrong(module, query, *arguments):
        return torch.zeros(1, query.shape[2], query.shape[1], query.shape[3]), None

    monkeypatch.setattr(attention_checks, "flexmask_attention", wrong)
    check = attention_checks.check_prefill(torch.device("cpu"))
    assert check.state == "broken"
    assert check.detail.startswith("WrongResult: differs from dense attention by ")


def without_reading_tiles(module, query, key, value, block_mask, **kwargs):
    slots = torch.arange(query.shape[2])
    dense = attention_checks._dense_mask(block_mask.mask_mod, slots)
    return dense_attention(module, query, key, value, dense)


def test_flash_that_attends_to_empty_tiles_computes_something_else(monkeypatch):
    monkeypatch.setattr(attention_checks, "flexmask_attention", without_reading_tiles)
    with pytest.raises(WrongResult, match="keys that only tiles hide: differs from dense"):
        attention_checks._flash_compared(torch.device("cpu"))


def test_flash_that_reads_the_tiles_agrees_with_dense_attention(monkeypatch):
    def by_the_cpus_kernel(*arguments, prefill_kernel):
        return flexmask_attention(*arguments)

    monkeypatch.setattr(attention_checks, "flexmask_attention", by_the_cpus_kernel)
    assert "of dense attention" in attention_checks._flash_compared(torch.device("cpu"))


def test_without_a_gpu_its_paths_are_unavailable_and_not_broken(monkeypatch):
    cpu = torch.device("cpu")
    assert attention_checks.check_flash(cpu).state == "unavailable"
    assert attention_checks.check_cuda_graph(cpu).state == "unavailable"
    assert check_decode_kernels(cpu).state == "unavailable"
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert environment_checks.check_gpu().state == "unavailable"


@pytest.mark.gpu
def test_the_paths_of_a_gpu_are_tried():
    found = {check.name: check.state for check in run_checks()}
    assert found["gpu"] == found["CUDA graph"] == found["decode kernels"] == "ok"
    assert found["attention, FLASH"] in ("ok", "unavailable")


def test_an_attempt_says_what_it_found_or_what_it_raised():
    assert tried("x", lambda: "fine", "do y") == Check("x", "ok", "fine")
    broken = tried("x", lambda: str(1 / 0), "do y")
    assert broken == Check("x", "broken", "ZeroDivisionError: division by zero", "do y")
    optional = tried("x", lambda: str(1 / 0), "do y", is_needed=False)
    assert optional.state == "unavailable"


def test_lines_say_ok_or_what_to_do(monkeypatch, capsys):
    checks = [
        Check("a", "ok", "1.0"),
        Check("b", "unavailable", "none"),
        Check("c", "broken", "x", "y"),
        Check("d", "warning", "2.0"),
    ]
    monkeypatch.setattr("flexmask.doctor.run_checks", lambda: iter(checks))
    monkeypatch.setattr("sys.argv", ["flexmask", "doctor"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 1
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["ok", "a", "1.0"],
        ["-", "b", "none"],
        ["BROKEN", "c", "x;", "y"],
        ["warn", "d", "2.0"],
    ]
