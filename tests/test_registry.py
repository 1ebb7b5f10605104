import sys

import pytest

from flexmask.errors import FlexMaskError, StrategyError
from flexmask.plugins.registry import load_registry, make_strategy
from plugin_site import BUILT_IN, Site, plugin


def record(distribution):
    """The record of a distribution with a single entry point."""
    (found,) = [p for p in load_registry().plugins if p.distribution == distribution]
    return found


def names():
    return [item.cls.name for item in load_registry().strategies()]


def test_built_in_strategies_come_from_the_flexmask_distribution(site, monkeypatch):
    monkeypatch.setenv("FLEXMASK_LOAD_PLUGINS", "")
    strategies = load_registry().strategies()
    assert [item.cls.name for item in strategies] == BUILT_IN
    assert {item.owner.distribution for item in strategies} == {"flexmask"}
    assert load_registry().problems() == ()


def test_a_strategy_of_another_distribution_is_found_with_its_owner(site):
    site.install("flexmask-mine", plugin("isolated"), version="2.1")
    cls = load_registry().strategy("isolated")
    assert record("flexmask-mine").strategies == (cls,)
    assert str(record("flexmask-mine")) == "flexmask-mine 2.1 (mine)"


def test_a_hook_may_be_a_generator(site):
    site.install(
        "flexmask-mine", plugin("a", "b", hook="def register_strategies(): yield from [{classes}]")
    )
    assert [cls.name for cls in record("flexmask-mine").strategies] == ["a", "b"]


def test_two_distributions_may_name_their_entry_points_alike(site):
    site.install("flexmask-one", plugin("one"), entry_points="main = flexmask_one")
    site.install("flexmask-two", plugin("two"), entry_points="main = flexmask_two")
    assert {"one", "two"} <= set(names())


def test_plugins_load_in_the_order_of_their_distributions(site):
    site.install("flexmask-b", plugin())
    site.install("flexmask-a", plugin(), entry_points="z = flexmask_a\ny = flexmask_a")
    others = [p for p in load_registry().plugins if p.distribution in ("flexmask-a", "flexmask-b")]
    assert [p.entry_point for p in others] == ["y", "z", "b"]


def test_plugins_load_once_per_process(site):
    assert load_registry() is load_registry()


FAILURES = {
    "missing import": (
        "import nowhere_to_be_found",
        "ModuleNotFoundError: No module named 'nowhere_to_be_found'",
    ),
    "syntax error": ("def", "SyntaxError: invalid syntax (flexmask_broken.py, line 1)"),
    "exit on import": ("raise SystemExit(3)", "SystemExit: 3"),
    "error without a message": ("raise RuntimeError", "RuntimeError"),
    "misspelled hook": (
        plugin("mine", hook="def register_strategy(): return [{classes}]"),
        "flexmask has no hook 'register_strategy'; did you mean",
    ),
    "wrong signature": (
        plugin("mine", hook="def register_strategies(config): return [{classes}]"),
        "PluginValidationError: Plugin 'flexmask_broken' for hook 'register_strategies' hookimpl "
        "definition: register_strategies(config) Argument(s) {'config'} are declared in the "
        "hookimpl but can not be found in the hookspec",
    ),
    "no hook": (
        plugin().replace("@hookimpl", ""),
        "no hook in it; decorate register_strategies with @flexmask.hookimpl",
    ),
    "no strategy": (
        plugin(hook="def register_strategies(): return [int]"),
        "expected a subclass of flexmask.Strategy, got <class 'int'>",
    ),
    "nothing returned": (
        plugin(hook="def register_strategies(): pass"),
        "register_strategies must return a list of strategy classes, got None",
    ),
    "no list": (
        plugin("mine", hook="def register_strategies(): return {classes}"),
        "register_strategies must return a list of strategy classes, got "
        "<class 'flexmask_broken.Strategy0'>",
    ),
    "error half way": (
        plugin("mine", hook="def register_strategies():\n    yield {classes}\n    1 / 0"),
        "ZeroDivisionError: division by zero",
    ),
    "name registered twice": (plugin("mine", "mine"), "strategy 'mine' is registered twice"),
    "name of a built-in": (
        plugin("mine", "causal"),
        "strategy 'causal' is built in; give yours another name",
    ),
}


@pytest.mark.parametrize(("source", "error"), FAILURES.values(), ids=FAILURES)
def test_a_broken_plugin_is_recorded_and_stops_no_other(site, source, error):
    site.install("flexmask-broken", source)
    site.install("flexmask-works", plugin("works"))

    broken = record("flexmask-broken")
    assert broken.error.startswith(error)
    assert "\n" not in broken.error
    assert broken.strategies == ()
    problem = f"plugin 'flexmask-broken 1.0 (broken)' failed: {broken.error_with_place}"
    assert load_registry().problems() == (problem,)
    assert load_registry().error_of(broken) == broken.error
    assert {*BUILT_IN, "works"} <= set(names())
    assert load_registry().strategy("causal").__module__ == "flexmask_strategies.causal"


def test_a_missing_object_in_a_module_is_recorded(site):
    site.install("flexmask-broken", "", entry_points="broken = flexmask_broken:nope")
    assert record("flexmask-broken").error == (
        "AttributeError: module 'flexmask_broken' has no attribute 'nope'"
    )


def test_an_entry_point_without_a_module_is_recorded(site):
    site.install("flexmask-broken", "", entry_points="no equals sign")
    broken = record("flexmask-broken")
    assert broken.entry_point == "no equals sign"
    assert broken.error.startswith("its entry point 'no equals sign' names no module but ''")


def test_an_entry_point_to_what_is_no_plugin_is_recorded(site):
    site.install("flexmask-broken", "x = 3", entry_points="broken = flexmask_broken:x")
    assert record("flexmask-broken").error == (
        "no hook in it; decorate register_strategies with @flexmask.hookimpl"
    )


def test_an_interrupt_while_plugins_load_passes_through(site):
    site.install("flexmask-slow", "raise KeyboardInterrupt")
    with pytest.raises(KeyboardInterrupt):
        load_registry()


CONFLICT = (
    "strategy 'isolated' is registered by 'flexmask-mine 1.0 (mine)' and "
    "'flexmask-yours 2.0 (yours)'; uninstall one or set FLEXMASK_LOAD_PLUGINS"
)


@pytest.fixture
def conflict(site):
    site.install("flexmask-mine", plugin("isolated", "mine"))
    site.install("flexmask-yours", plugin("isolated", "yours"), version="2.0")


def test_a_name_registered_by_two_plugins_names_both_owners_when_looked_up(conflict):
    with pytest.raises(StrategyError) as error:
        load_registry().strategy("isolated")
    assert str(error.value) == CONFLICT


def test_a_conflict_shows_at_both_plugins_and_leaves_their_other_strategies_alone(conflict):
    registry = load_registry()
    assert registry.problems() == (CONFLICT,)
    for owner in ("flexmask-mine", "flexmask-yours"):
        assert registry.error_of(record(owner)) == CONFLICT
    assert {"mine", "yours"} <= set(names())
    assert "isolated" not in names()


def test_choosing_one_distribution_settles_a_conflict(conflict, monkeypatch):
    monkeypatch.setenv("FLEXMASK_LOAD_PLUGINS", "flexmask-yours")
    assert load_registry().strategy("isolated").__module__ == "flexmask_yours"
    assert load_registry().problems() == ()


def test_an_unknown_strategy_is_answered_with_the_known_ones(site, monkeypatch):
    monkeypatch.setenv("FLEXMASK_LOAD_PLUGINS", "")
    with pytest.raises(StrategyError) as error:
        load_registry().strategy("x")
    assert str(error.value) == f"unknown strategy 'x'; known: {', '.join(BUILT_IN)}"


def test_a_misspelled_strategy_is_answered_with_the_nearest(site):
    with pytest.raises(StrategyError, match=r"did you mean 'prefix_segment'?"):
        load_registry().strategy("prefix-segments")


def test_a_failed_look_up_mentions_the_plugins_that_failed(site):
    site.install("flexmask-broken", "import nowhere_to_be_found")
    with pytest.raises(StrategyError) as error:
        load_registry().strategy("mine")
    assert str(error.value).endswith(
        "; plugins that failed (see 'flexmask plugins'): 'flexmask-broken 1.0 (broken)'"
    )


@pytest.mark.parametrize("value", ["", " ", ",", "flexmask"])
def test_an_empty_list_of_plugins_leaves_the_built_in_ones(site, monkeypatch, value):
    site.install("flexmask-mine", "raise AssertionError('not asked for')")
    monkeypatch.setenv("FLEXMASK_LOAD_PLUGINS", value)
    assert {p.distribution for p in load_registry().plugins} == {"flexmask"}


def test_plugins_are_chosen_by_normalised_distribution_name(site, monkeypatch):
    site.install("flexmask-mine", plugin("mine"))
    site.install("flexmask-yours", plugin("yours"))
    monkeypatch.setenv("FLEXMASK_LOAD_PLUGINS", " Flexmask_MINE ,")
    assert names() == sorted([*BUILT_IN, "mine"])


def test_choosing_a_plugin_that_is_not_installed_lists_those_that_are(site, monkeypatch):
    site.install("flexmask-mine", plugin("mine"))
    monkeypatch.setenv("FLEXMASK_LOAD_PLUGINS", "flexmask-mine,flexmask-yours")
    with pytest.raises(FlexMaskError) as error:
        load_registry()
    assert str(error.value).startswith(
        "FLEXMASK_LOAD_PLUGINS names 'flexmask-yours', which is not an installed plugin; "
        "installed: "
    )
    assert "flexmask-mine" in str(error.value).partition("installed: ")[2]


def test_of_a_distribution_found_twice_the_first_on_the_path_counts(site, tmp_path, monkeypatch):
    shadowed = Site(tmp_path / "shadowed")
    shadowed.install("Flexmask.Mine", plugin("old"), version="0.9")
    monkeypatch.setattr(sys, "path", [*sys.path, str(shadowed.folder)])
    site.install("flexmask-mine", plugin("new"))
    assert record("flexmask-mine").version == "1.0"
    assert "new" in names()
    assert "old" not in names()


def test_a_source_tree_without_metadata_is_told_to_install(site, monkeypatch):
    site.install("flexmask-mine", plugin("mine"))
    monkeypatch.setattr(sys, "path", [str(site.folder)])
    with pytest.raises(FlexMaskError, match=r"flexmask is not installed.* pip install -e ."):
        load_registry()


def test_parameters_given_as_text_are_parsed(site):
    strategy = make_strategy("prefix_segment", {"positions": "sequential"})
    assert strategy.parameter_values() == {"positions": "sequential"}


def test_an_unknown_parameter_is_refused(site):
    with pytest.raises(StrategyError, match="'causal' has no parameter 'window'; it takes: none"):
        make_strategy("causal", {"window": "3"})
