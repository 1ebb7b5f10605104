"""``flexmask check``, ``new`` and ``strategies NAME``, and strategies straight from files."""

import json

import pytest

from flexmask.plugins.new_plugin import EXAMPLE_NAMES, PluginNames, write_plugin
from flexmask.plugins.registry import load_registry
from flexmask_cli.app import main
from plugin_site import BUILT_IN, plugin

WRONG = """
from flexmask import mask_strategy
from flexmask.mask_mods import and_masks, causal

@mask_strategy
def never(batch):
    return lambda b, h, q_idx, kv_idx: True
"""


@pytest.fixture
def flexmask(monkeypatch, capsys):
    """Runs the command line in this process; returns exit status, stdout and stderr."""
    load_registry.cache_clear()
    monkeypatch.setenv("FLEXMASK_LOAD_PLUGINS", "")  # so that what --no-plugins sets is undone
    monkeypatch.delenv("FLEXMASK_LOAD_PLUGINS")

    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["flexmask", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            main()
        out, err = capsys.readouterr()
        if isinstance(end.value.code, str):
            return 1, out, end.value.code
        return end.value.code, out, err

    yield run
    load_registry.cache_clear()


@pytest.fixture
def wrong(tmp_path):
    path = tmp_path / "wrong.py"
    path.write_text(WRONG)
    return path


def test_a_check_lists_each_rule_and_its_findings_and_exits_with_1(flexmask, wrong):
    status, out, err = flexmask("check", wrong)
    lines = out.splitlines()
    assert status == 1
    assert lines[0] == "never()"
    assert lines[1].split()[:2] == ["ok", "layout"]
    assert lines[3].split()[:3] == ["broken", "bool", "tensor"]
    assert "  mend: return a comparison of tensors" in out
    assert lines[-1] == "1 of 17 rules broken; 14 were not checked, since they build on it"
    assert f"strategy 'never' runs straight from a file, {wrong}:5; 'flexmask new'" in err


def test_a_check_as_json_is_nothing_but_json(flexmask, wrong):
    wrong.write_text("print('noise')\n" + WRONG)
    status, out, err = flexmask("check", wrong, "--json")
    (checked,) = json.loads(out)
    assert status == 1
    assert (checked["strategy"], checked["parameters"]) == ("never", {})
    assert [rule["status"] for rule in checked["rules"]][:4] == ["ok", "ok", "broken", "skipped"]
    (finding,) = checked["findings"]
    assert finding["rule"] == "bool tensor"
    assert f"warning: {wrong} printed to stdout, which results may go to: 'noise'" in err


def test_what_a_mask_prints_stays_out_of_json(flexmask, tmp_path):
    path = tmp_path / "loud.py"
    path.write_text(WRONG.replace("    return", "    print('noise')\n    return"))
    for command, expected in ((["check", path], 1), (["show", "-s", path], 0)):
        status, out, err = flexmask(*command, "--json")
        assert status == expected
        assert "noise" not in out
        assert "noise" in err
        assert json.loads(out)


def test_a_check_of_what_is_not_there_is_an_error(flexmask):
    assert flexmask("--no-plugins", "check", "nope")[0::2] == (
        1,
        f"error: unknown strategy 'nope'; known: {', '.join(BUILT_IN)}",
    )


def test_one_strategy_is_shown_with_its_owner_its_source_and_its_mask(flexmask):
    status, out, _ = flexmask("--no-plugins", "strategies", "prefix_segment")
    assert status == 0
    assert "flexmask 0.1.0, entry point prefix_segment" in out
    assert "flexmask_strategies/prefix_segment.py:" in out
    assert "--param positions  restart|sequential = restart  restart: every" in out
    assert "\n 2 ###....###.......\n" in out
    shown = json.loads(flexmask("--no-plugins", "strategies", "causal", "--json")[1])
    assert shown["picture"][1] == " P #................"


def test_a_strategy_whose_mask_cannot_be_drawn_is_shown_all_the_same(flexmask, site):
    site.install("flexmask-mine", plugin("mine"))
    status, out, _ = flexmask("strategies", "mine")
    assert status == 0
    assert "flexmask-mine 1.0, entry point mine" in out
    assert "no picture: NotImplementedError; 'flexmask check mine' says more" in out


def test_no_plugins_loads_only_what_is_built_in(flexmask, site):
    site.install("flexmask-mine", "print('loaded')\n" + plugin("mine"))
    _, out, err = flexmask("--no-plugins", "plugins")
    assert "flexmask-mine" not in out + err


def test_notes_stand_in_the_status_of_a_plugin(flexmask, site):
    site.install("flexmask-mine", "print('loaded')\n" + plugin("mine"))
    _, out, err = flexmask("plugins")
    assert "ok; printed to stdout, which results may go to: 'loaded'" in out
    assert err == ""


def test_what_a_child_process_of_a_plugin_prints_stays_out_of_json(site, monkeypatch, capfd):
    site.install("flexmask-mine", "import os\nos.system('echo noise')\n" + plugin("mine"))
    monkeypatch.setattr("sys.argv", ["flexmask", "plugins", "--json"])
    with pytest.raises(SystemExit):
        main()
    out, err = capfd.readouterr()
    assert json.loads(out)
    assert err == "noise\n"


def test_new_writes_a_plugin_under_its_own_names(flexmask, tmp_path):
    folder = tmp_path / "made"
    status, out, _ = flexmask("new", "flexmask-near-docs", "--directory", folder)
    assert status == 0
    assert f"wrote {folder}: strategy 'near_docs' in flexmask_near_docs.py" in out
    written = {path.name: path.read_text() for path in folder.iterdir()}
    assert set(written) == {
        "README.md", "flexmask_near_docs.py", "pyproject.toml", "test_flexmask_near_docs.py"
    }  # fmt: skip
    everything = "".join(written.values())
    for old in (EXAMPLE_NAMES.distribution, EXAMPLE_NAMES.module, EXAMPLE_NAMES.strategy):
        assert old not in everything
    assert 'name = "flexmask-near-docs"' in written["pyproject.toml"]
    assert 'near_docs = "flexmask_near_docs"' in written["pyproject.toml"]


def test_new_lists_what_it_wrote_as_json(flexmask, tmp_path):
    folder = tmp_path / "made"
    status, out, _ = flexmask("new", "near-docs", "--directory", folder, "--json")
    written = json.loads(out)
    assert (status, written["strategy"], written["folder"]) == (0, "near_docs", str(folder))
    assert written["files"] == sorted(map(str, folder.iterdir()))
    assert written["next"][1:] == [
        "flexmask check near_docs", "flexmask generate --strategy near_docs"
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("1st", "holds letters, digits and hyphens, as in my-strategy, got '1st'"),
        ("my strategy", "got 'my strategy'"),
        ("class", "got 'class'"),
        ("torch", "module 'torch' is installed already; choose another name"),
        ("flexmask-causal", "strategy 'causal' is there already; choose another name"),
    ],
)
def test_a_name_that_no_plugin_can_have_is_refused(flexmask, name, message):
    status, _, err = flexmask("new", name)
    assert status == 1
    assert err.endswith(message)


def test_new_overwrites_nothing(flexmask, tmp_path):
    write_plugin(PluginNames.of("my-strategy"), tmp_path / "there")
    status, _, err = flexmask("new", "my-strategy", "--directory", tmp_path / "there")
    assert (status, err) == (
        1,
        f"error: {tmp_path}/there exists already; choose another --directory",
    )
