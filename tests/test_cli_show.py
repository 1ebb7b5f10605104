import json

import pytest

from flexmask.layout import TokenizedRequest
from flexmask.registry import make_strategy
from flexmask_cli.app import main
from oracles import dense_mask

LENGTHS = ["--prefix", "2", "--segments", "3,2", "--suffix", "1"]
REQUEST = TokenizedRequest((5, 5), ((5, 5, 5), (5, 5)), (5,))


@pytest.fixture
def show(monkeypatch, capsys):
    def run(*arguments):
        monkeypatch.setattr("sys.argv", ["flexmask", "show", *arguments])
        with pytest.raises(SystemExit) as end:
            main()
        if end.value.code:
            return str(end.value.code)
        return capsys.readouterr().out

    return run


@pytest.mark.parametrize("name", ["causal", "prefix_segment", "ensemble_isolation"])
def test_the_picture_is_the_dense_mask(show, name):
    strategy = make_strategy(name, {})
    rows = show("--strategy", name, *LENGTHS).splitlines()[1:-1]
    drawn = [[cell == "#" for cell in row[3:]] for row in rows]
    assert drawn == dense_mask(strategy, strategy.layout(REQUEST)).tolist()


def test_a_long_layout_is_drawn_in_tiles(show, monkeypatch):
    monkeypatch.setenv("COLUMNS", "44")
    output = show("--strategy", "causal", "--segments", "3000,2000")
    assert len(output.splitlines()) == 42
    assert "a cell is 126 tokens" in output


def test_the_statistics_count_tiles_and_pairs(show):
    layout = make_strategy("prefix_segment", {}).layout(REQUEST)
    pairs = int(dense_mask(make_strategy("prefix_segment", {}), layout).sum())
    figures = json.loads(show("--strategy", "prefix_segment", "--json", *LENGTHS))
    assert figures["allowed_pairs"] == pairs
    assert (figures["tiles_empty"], figures["tiles_partial"], figures["tiles_full"]) == (0, 1, 0)
    assert f"allowed pairs{pairs:>24}" in show("--stats", "-s", "prefix_segment", *LENGTHS)


def test_lengths_that_are_no_numbers_are_refused(show):
    assert "--segments must be positive numbers" in show("--segments", "4,x")
