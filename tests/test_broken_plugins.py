"""Broken plugins: what each is told, and that all others work."""

import json
import os
import subprocess
import sys
from typing import Any

import pytest
import torch

from flexmask.check import run_rules
from flexmask.plugins.registry import load_registry, make_strategy
from plugin_site import BUILT_IN, plugin


@pytest.fixture
def working(site):
    """Two plugins that load before and after what a test installs."""
    site.install("flexmask-aaa", plugin("first"))
    site.install("flexmask-zzz", plugin("last"))
    return site


def assert_others_work():
    names = {item.cls.name for item in load_registry().strategies()}
    assert names >= {*BUILT_IN, "first", "last"}
    assert make_strategy("causal", {}).mask_mod.__module__ == "flexmask_strategies.causal"


def problems():
    """What is said of the broken plugin, without the words that name it."""
    return [line.removeprefix("plugin 'flexmask-mine 1.0 (mine)' ") for line in _lines()]


def _lines():
    return load_registry().problems()


LOADING = {
    "import error": (
        "import torch_geometry",
        "failed: ModuleNotFoundError: No module named 'torch_geometry' at flexmask_mine.py:1: "
        "`import torch_geometry`",
    ),
    "import error further in": (
        "def load():\n    return {}['mask']\n\nload()\n",
        "failed: KeyError: 'mask' at flexmask_mine.py:2: `return {}['mask']`",
    ),
    "syntax error": (
        "x = 1\ndef mask(\n",
        "failed: SyntaxError: '(' was never closed (flexmask_mine.py, line 2) at "
        "flexmask_mine.py:2: `def mask(`",
    ),
    "wrong hook name": (
        plugin("mine", hook="def register_strategy(): return [{classes}]"),
        "failed: flexmask has no hook 'register_strategy'; did you mean 'register_strategies'? at "
        "flexmask_mine.py:12: `def register_strategy(): return [Strategy0]`",
    ),
    "wrong signature": (
        plugin("mine", hook="def register_strategies(config): return [{classes}]"),
        "failed: PluginValidationError: Plugin 'flexmask_mine' for hook 'register_strategies' "
        "hookimpl definition: register_strategies(config) Argument(s) {'config'} are declared "
        "in the hookimpl but can not be found in the hookspec at flexmask_mine.py:12: "
        "`def register_strategies(config): return [Strategy0]`",
    ),
    "duplicate strategy": (
        plugin("mine", "mine"),
        "failed: strategy 'mine' is registered twice at flexmask_mine.py:20: "
        "`def register_strategies(): return [Strategy0, Strategy1]`",
    ),
    "built-in name": (
        plugin("causal"),
        "failed: strategy 'causal' is built in; give yours another name at flexmask_mine.py:12: "
        "`def register_strategies(): return [Strategy0]`",
    ),
    "parameter by position": (
        "from flexmask import mask_strategy\n@mask_strategy\ndef mine(batch, window=3): ...\n",
        "failed: strategy 'mine' takes 'window' by position; write its parameters after a star: "
        "def mine(batch, *, window: …) at flexmask_mine.py:2: `@mask_strategy`",
    ),
    "exit": (
        "raise SystemExit(3)",
        "failed: SystemExit: 3 at flexmask_mine.py:1: `raise SystemExit(3)`",
    ),
    "prints at import": (
        "print('loading', 3, 'masks')\n" + plugin("mine"),
        "printed to stdout, which results may go to: 'loading 3 masks'",
    ),
}


@pytest.mark.parametrize(("source", "message"), LOADING.values(), ids=LOADING)
def test_a_plugin_that_does_not_load_as_it_should_is_told_why_and_where(working, source, message):
    working.install("flexmask-mine", source)
    assert problems() == [message.replace("{folder}", str(working.folder))]
    assert_others_work()


PROCESS = {
    "working directory": (
        "import os\nos.chdir('/')",
        "changed the working directory, which was put back",
    ),
    "working directory that is removed": (
        "import os, tempfile\nfolder = tempfile.mkdtemp()\nos.chdir(folder)\nos.rmdir(folder)",
        "changed the working directory, which was put back",
    ),
    "stdout": ("import sys\nsys.stdout.close()", "closed stdout, which was kept open"),
    "stdout for good": (
        "import sys\nsys.__stdout__.close()",
        "closed stdout, which was kept open",
    ),
    "stderr": ("import sys\nsys.stderr.close()", "closed stderr, which was opened again"),
    "stdin": ("import sys\nsys.stdin.close()", "closed stdin, which was opened again"),
    "descriptor": (
        "import os\nos.close(1)",
        "closed or redirected descriptor 1, stdout, which was put back",
    ),
    "streams replaced": ("import sys\nsys.stdout = sys.stderr = None", None),
}


@pytest.mark.parametrize(("source", "note"), PROCESS.values(), ids=PROCESS)
def test_what_a_plugin_does_to_the_process_is_taken_back(working, tmp_path, source, note):
    """In a process of its own, whose streams are real."""
    working.install("flexmask-mine", source + "\n" + plugin("mine"))
    program = "from flexmask_cli.__main__ import run\nimport sys\n"
    program += "sys.argv[1:] = ['strategies', '--json']\nrun()"
    started = tmp_path / "started"
    started.mkdir()
    result = subprocess.run(
        [sys.executable, "-c", f"import atexit, os\natexit.register(lambda: print(os.getcwd()))\n"
         f"{program}"],
        cwd=started,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(working.folder), *sys.path])},
        stdin=subprocess.PIPE,
        capture_output=True,
        text=True,
        check=False,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    listed, _, folder = result.stdout.rpartition("]")
    assert {item["name"] for item in json.loads(listed + "]")} >= {"first", "last", "mine"}
    assert folder.strip() == str(started)
    expected = "" if note is None else f"warning: plugin 'flexmask-mine 1.0 (mine)' {note}\n"
    assert result.stderr == expected


ENTRY_POINTS = {
    "no module": ("mine = !!!", "'mine' names no module but '!!!'"),
    "two objects": ("mine = a:b:c", "'mine' names no module but 'a:b:c'"),
    "nothing": ("mine =", "'mine' names no module but ''"),
    "no equals sign": ("mine", "'mine' names no module but ''"),
    "no name": ("= flexmask_nowhere!", "'' names no module but 'flexmask_nowhere!'"),
}


@pytest.mark.parametrize(("line", "message"), ENTRY_POINTS.values(), ids=ENTRY_POINTS)
def test_a_malformed_entry_point_is_named_and_the_others_load(working, line, message):
    working.install("flexmask-mine", plugin("mine"), entry_points=f"{line}\ngood = flexmask_mine")
    (problem,) = _lines()
    assert problem.startswith("plugin 'flexmask-mine 1.0 (")
    assert problem.endswith(
        f"failed: its entry point {message}; write package.module or package.module:object"
    )
    assert load_registry().strategy("mine").__module__ == "flexmask_mine"
    assert_others_work()


def test_entry_points_that_are_not_text_are_named(working):
    working.install("flexmask-mine", plugin("mine"))
    file = working.folder / "flexmask_mine-1.0.dist-info" / "entry_points.txt"
    file.write_bytes(file.read_bytes() + b"\xff = x\n")
    (problem,) = _lines()
    assert problem.startswith(
        "plugin 'flexmask-mine 1.0 (entry_points.txt)' failed: it cannot be read: UnicodeDecodeErr"
    )
    assert_others_work()


def test_metadata_that_is_not_text_is_named(working):
    working.install("flexmask-mine", plugin("mine"))
    (working.folder / "flexmask_mine-1.0.dist-info" / "METADATA").write_bytes(b"Name: \xff\xfe")
    (problem,) = _lines()
    assert "its metadata names no version" in problem or "cannot be read" in problem
    assert_others_work()


def test_a_plugin_that_needs_a_newer_flexmask_is_told_in_a_sentence(working):
    working.install("flexmask-mine", "from flexmask import NotThereYet", requires="flexmask>=9.1")
    assert _lines() == (
        "plugin 'flexmask-mine 1.0 (entry_points.txt)' failed: it needs flexmask>=9.1, and 0.1.0 "
        "is installed; run: pip install --upgrade flexmask flexmask-mine",
    )
    assert_others_work()


@pytest.mark.parametrize("requires", ["flexmask>=0.1", "flexmask; extra == 'masks'", "torch<1"])
def test_a_plugin_whose_requirement_is_met_loads(working, requires):
    working.install("flexmask-mine", plugin("mine"), requires=requires)
    assert problems() == []
    assert_others_work()


def test_an_entry_point_that_is_declared_twice_loads_once(working):
    lines = "mine = flexmask_mine\nmine = flexmask_other"
    working.install("flexmask-mine", plugin("mine"), entry_points=lines)
    assert problems() == ["failed: entry point 'mine' is declared twice; rename one"]
    assert load_registry().strategy("mine").__module__ == "flexmask_mine"
    assert_others_work()


def test_a_strategy_of_two_plugins_names_both(working):
    working.install("flexmask-mine", plugin("last"))
    assert problems() == [
        "strategy 'last' is registered by 'flexmask-mine 1.0 (mine)' and 'flexmask-zzz 1.0 (zzz)'"
        "; uninstall one or set FLEXMASK_LOAD_PLUGINS"
    ]


def test_a_plugin_whose_module_is_gone_is_told_to_install_again(working):
    working.install("flexmask-mine", "")
    (working.folder / "flexmask_mine.py").unlink()
    assert problems() == [
        "failed: its module 'flexmask_mine' is not there; install it again: "
        "pip install --force-reinstall flexmask-mine"
    ]
    assert_others_work()


def test_a_plugin_without_metadata_is_told_to_install_again(working):
    working.install("flexmask-mine", plugin("mine"))
    (working.folder / "flexmask_mine-1.0.dist-info" / "METADATA").unlink()
    assert _lines() == (
        "plugin 'flexmask_mine-1.0.dist-info ? (entry_points.txt)' failed: its installation "
        "is incomplete: its metadata names no version; reinstall",
    )
    assert_others_work()


HEAD = """
import torch
from flexmask import hookimpl, mask_strategy
from flexmask.mask_mods import and_masks, causal, or_masks, same_segment

@hookimpl
def register_strategies():
    return [mine]

@mask_strategy
def mine(batch):
"""

MASKS = {
    "Python bool": (
        "    def rule(b, h, q_idx, kv_idx): return True\n    return rule",
        "bool tensor: mask_mod 'mine.<locals>.rule' (flexmask_mine.py:12) returns the Python bool "
        "True; return a tensor: `q_idx >= 0`",
    ),
    "reduction": (
        "    ids = batch.segment_ids\n"
        "    def rule(b, h, q_idx, kv_idx): return (ids[b] == ids[b, q_idx]).any()\n"
        "    return rule",
        "pointwise: mask_mod 'mine.<locals>.rule' (flexmask_mine.py:13) calls any(), a reduction",
    ),
    ".item()": (
        "    def rule(b, h, q_idx, kv_idx): return q_idx >= kv_idx.item()\n    return rule",
        "pointwise: mask_mod 'mine.<locals>.rule' (flexmask_mine.py:12) reads a value on the host"
        ": item();",
    ),
    "if on a tensor": (
        "    def rule(b, h, q_idx, kv_idx): return q_idx > 0 if q_idx > kv_idx else q_idx >= 0\n"
        "    return rule",
        "pointwise: mask_mod 'mine.<locals>.rule' (flexmask_mine.py:12) reads a value on the host"
        ": __bool__();",
    ),
    "wrong device": (
        "    table, ids = torch.ones(9, dtype=torch.bool), batch.segment_ids\n"
        "    def rule(b, h, q_idx, kv_idx): return (q_idx >= kv_idx) & table[ids[b, q_idx]]\n"
        "    return rule",
        "device: mask_mod 'mine.<locals>.rule' (flexmask_mine.py:13) captures tensor 'table' on "
        "cpu, while its batch is on another device",
    ),
    "values read while building": (
        "    last = batch.segment_ids.max().item()\n"
        "    def rule(b, h, q_idx, kv_idx):\n"
        "        return (q_idx >= kv_idx) & (batch.segment_ids[b, q_idx] <= last)\n"
        "    return rule",
        "device: building the mask reads values of the batch, or mixes devices, at "
        "flexmask_mine.py:12: `last = batch.segment_ids.max().item()` (RuntimeError)",
    ),
    "Python-int capture": (
        "    mine.mask_mod.calls = getattr(mine.mask_mod, 'calls', 1000) + 1\n"
        "    window = mine.mask_mod.calls\n"
        "    def rule(b, h, q_idx, kv_idx):\n"
        "        return (q_idx >= kv_idx) & (q_idx - kv_idx < window)\n"
        "    return rule",
        "numbers: mask_mod 'mine.<locals>.rule' (flexmask_mine.py:14) captures the Python number "
        "'window', which is ",
    ),
    "length-sized capture": (
        "    slots = torch.arange(batch.segment_ids.shape[1], device=batch.device)\n"
        "    def rule(b, h, q_idx, kv_idx): return slots[q_idx] >= slots[kv_idx]\n"
        "    return rule",
        "tables: mask_mod 'mine.<locals>.rule' (flexmask_mine.py:13) captures tensor 'slots', "
        "whose shape follows the batch: (64,), then (128,)",
    ),
    "copy of the batch": (
        "    ids = batch.segment_ids.clone()\n"
        "    def rule(b, h, q_idx, kv_idx): return ids[b, q_idx] == ids[b, kv_idx]\n"
        "    return and_masks(causal, rule)",
        "next layout: the row of slot 7 is still that of the previous layout",
    ),
    "non-causal": (
        "    return or_masks(causal, same_segment(batch))",
        "causal: the token at slot 1 sees slot 2, which comes later",
    ),
    "empty rows": (
        "    def rule(b, h, q_idx, kv_idx): return q_idx > kv_idx\n    return rule",
        "no empty row: the token at slot 0 sees no token at all",
    ),
    "absolute slots": (
        "    def rule(b, h, q_idx, kv_idx): return (q_idx - kv_idx < 3) | (kv_idx < 2)\n"
        "    return and_masks(causal, rule)",
        "any slot: the row of slot 3 changes when its row is padded on the left",
    ),
    "sees what is not there yet": (
        "    ids = batch.segment_ids\n"
        "    def rule(b, h, q_idx, kv_idx):\n"
        "        is_last = ids[b, (q_idx + 1).clamp(max=63)] != ids[b, q_idx]\n"
        "        return is_last | (q_idx == kv_idx)\n"
        "    return and_masks(causal, rule)",
        "decode: the row of slot 6 differs when it is decoded",
    ),
    "random": (
        "    table = batch.table(torch.rand(4, 4)) < 0.5\n"
        "    def rule(b, h, q_idx, kv_idx): return table[q_idx % 4, kv_idx % 4]\n"
        "    return and_masks(causal, rule)",
        "deterministic: the row of slot ",
    ),
    "wrong dtype": (
        "    def rule(b, h, q_idx, kv_idx): return q_idx - kv_idx\n    return rule",
        "bool tensor: mask_mod 'mine.<locals>.rule' (flexmask_mine.py:12) returns torch.int64; it "
        "must return torch.bool: compare, `x != 0`",
    ),
    "raises at call": (
        "    raise ValueError('no table for this batch')",
        "bool tensor: it raises ValueError: no table for this batch at flexmask_mine.py:12: "
        "`raise ValueError('no table for this batch')`",
    ),
    "torch's settings": (
        "    torch.set_float32_matmul_precision('medium')\n    return causal",
        "torch settings: it sets torch's float32 matmul precision to medium",
    ),
}


@pytest.mark.parametrize(("body", "message"), MASKS.values(), ids=MASKS)
def test_a_mask_that_breaks_a_rule_is_told_which_and_how_to_mend_it(working, body, message):
    working.install("flexmask-mine", HEAD + body)
    torch.manual_seed(0)
    outcomes: Any = run_rules(make_strategy("mine", {}))
    finding = next(outcome.finding for outcome in outcomes if outcome.finding)
    outcomes.close()
    assert str(finding).startswith(message)
    assert finding.mend
    assert torch.get_float32_matmul_precision() == "highest"
    assert_others_work()


LAYOUTS = {
    "negative positions": (
        "tuple(p - 1 for p in plan.position_ids)",
        "layout: positions must not be negative, got -1; see flexmask_mine.py:14: `return Layout(",
    ),
    "too few positions": (
        "plan.position_ids[1:]",
        "layout: 4 tokens, 4 segment ids and 3 positions: a layout needs one of each per token",
    ),
    "positions of tensors": (
        "tuple(torch.tensor(plan.position_ids).unbind())",
        "positions: positions must be ints, got Tensor",
    ),
    "a tail that stands still": (
        "(*plan.position_ids[:-2], 9, 9)",
        "positions: the tail's positions must go up by one, got (9, 9)",
    ),
}


@pytest.mark.parametrize(("positions", "message"), LAYOUTS.values(), ids=LAYOUTS)
def test_a_layout_that_breaks_a_rule_is_told_which(working, positions, message):
    source = f"""
import torch
from dataclasses import dataclass
from flexmask import Layout, Strategy, hookimpl
from flexmask.layout import shared_prefix_layout
from flexmask.mask_mods import causal

@dataclass(frozen=True)
class Mine(Strategy):
    name = "mine"
    def mask_mod(self, batch): return causal
    def layout(self, request):
        plan = shared_prefix_layout(request, "sequential")
        return Layout(plan.token_ids, plan.segment_ids, {positions})

@hookimpl
def register_strategies(): return [Mine]
"""
    working.install("flexmask-mine", source)
    outcomes: Any = run_rules(make_strategy("mine", {}))
    finding = next(outcome.finding for outcome in outcomes if outcome.finding)
    assert str(finding).startswith(message)
    assert {outcome.status for outcome in outcomes} == {"skipped"}
    assert_others_work()
