"""What notebooks show: parsed, and compared with the oracle."""

import subprocess
import sys
import xml.etree.ElementTree as ElementTree

import numpy as np
import pytest

from flexmask.block_mask import explain_mask
from flexmask.mask_mods import causal
from flexmask.plugins.registry import make_strategy
from flexmask.show.notebook import SMALL
from flexmask.show.palette import rgb
from svg_cells import expected_colours

SVG = "{http://www.w3.org/2000/svg}"


def svg_of(content):
    """Colours of the cells of the SVG picture in a piece of HTML."""
    svg = ElementTree.fromstring(content).find(f".//{SVG}svg")
    assert svg is not None
    columns, rows = map(int, svg.attrib["viewBox"].split()[2:])
    found = np.zeros((rows, columns, 3), dtype=np.uint8)
    for rectangle in svg.iter(f"{SVG}rect"):
        x, y, width = (int(rectangle.attrib[name]) for name in ("x", "y", "width"))
        found[y, x : x + width] = rgb(rectangle.attrib["fill"])
    return found


@pytest.mark.parametrize("name", ["causal", "prefix_segment", "ensemble_isolation"])
def test_a_strategy_shows_its_mask_on_a_small_request(name):
    strategy = make_strategy(name, {})
    content = strategy._repr_html_()
    assert np.array_equal(svg_of(content), expected_colours(strategy, SMALL, tile=128))
    assert strategy.summary() in content


def test_a_layout_shows_its_parts_with_slots_and_positions():
    layout = make_strategy("ensemble_isolation", {}).layout(SMALL.tokens)
    table = ElementTree.fromstring(layout._repr_html_()).find("table")
    assert table is not None
    rows = [[cell.text for cell in row] for row in table]
    assert rows == [
        ["part", "tokens", "slots", "positions"],
        ["S1", "14", "0–13", "0–13"],
        ["S2", "12", "14–25", "0–11"],
        ["S3", "13", "26–38", "0–12"],
        ["T", "3", "39–41", "14–16"],
    ]


def test_an_explained_mask_shows_its_tiles():
    found = svg_of(explain_mask(causal, None, None, 500, 300, "cpu", 100)._repr_html_())
    full, partial, empty = rgb("#0072B2"), rgb("#E69F00"), rgb("#E9E9E6")
    assert found.tolist() == [
        [list(colour) for colour in row]
        for row in (
            (partial, empty, empty),
            (full, partial, empty),
            (full, full, partial),
            (full, full, full),
            (full, full, full),
        )
    ]


def test_layouts_stay_light():
    code = (
        "import sys, flexmask.layout, flexmask.strategy;"
        "sys.exit(' '.join({'torch', 'matplotlib', 'rich', 'numpy'} & sys.modules.keys()))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.stderr.strip() == ""
