"""Figures, read back: pixels of PNG files, paths of SVG files."""

import base64
import io
import re
import sys
from typing import Any, cast

import matplotlib
import numpy as np
import pytest
import torch
from matplotlib.image import imread

from flexmask.block_mask import explain_mask
from flexmask.errors import FlexMaskError
from flexmask.plugins.registry import make_strategy
from flexmask.show.figure import DPI, mask_figure, save_figure
from flexmask.show.mask_picture import Picture, draw_difference, draw_mask
from flexmask.show.palette import rgb
from flexmask.show.plotting import WIDTH_IN
from flexmask.show.tokens import ShownRequest
from oracles import dense_mask
from svg_cells import expected_colours, svg_cells

matplotlib.use("agg")

NAMES = ["causal", "prefix_segment", "ensemble_isolation"]
SHOWN = ShownRequest.of_lengths(prefix=5, segments=(7, 4, 6), suffix=3, new_tokens=2)
MIDDLE = ShownRequest.of_lengths(prefix=20, segments=(40, 50), suffix=6)
"""Too many tokens to be drawn as squares."""


def oracle_of(strategy, shown):
    return dense_mask(strategy, strategy.layout(shown.tokens).extended(shown.new_tokens))


def pixels_at_centres(picture, cells):
    """Render as a PNG and pick the colour in the middle of each cell."""
    figure = mask_figure(picture)
    content = io.BytesIO()
    figure.savefig(content, dpi=DPI)
    pixels = (imread(io.BytesIO(content.getvalue()))[..., :3] * 255).round().astype(np.uint8)
    (ax,) = figure.axes
    side = picture.size / cells if cells * 2 > picture.size else 1
    scale = DPI / figure.dpi
    found = np.zeros((cells, cells, 3), dtype=np.uint8)
    for row in range(cells):
        for column in range(cells):
            x, y = ax.transData.transform(((column + 0.5) * side, (row + 0.5) * side)) * scale
            found[row, column] = pixels[int(len(pixels) - y), int(x)]
    return found


@pytest.mark.parametrize("shown", [SHOWN, MIDDLE], ids=["squares", "image"])
@pytest.mark.parametrize("name", NAMES)
def test_pixels_at_cell_centres_are_the_oracle(name, shown):
    strategy = make_strategy(name, {})
    picture = draw_mask(strategy, shown, tile=8)
    found = pixels_at_centres(picture, picture.size)
    assert np.array_equal(found, expected_colours(strategy, shown, tile=8))


def test_pixels_of_a_difference_are_those_of_its_masks():
    first, second = (make_strategy(name, {}) for name in ("causal", "prefix_segment"))
    picture = draw_difference(first, second, SHOWN)
    found = pixels_at_centres(picture, picture.size)
    one, other = oracle_of(first, SHOWN).numpy(), oracle_of(second, SHOWN).numpy()
    assert np.array_equal((found == rgb("#B4B4B0")).all(-1), one & other)
    assert np.array_equal((found == rgb("#0072B2")).all(-1), one & ~other)
    assert (one & ~other).any()


@pytest.mark.parametrize("name", NAMES)
def test_an_svg_file_draws_the_oracle(name, tmp_path):
    strategy = make_strategy(name, {})
    picture = draw_mask(strategy, SHOWN, tile=8)
    save_figure(picture, tmp_path / "mask.svg")
    found = svg_cells(tmp_path / "mask.svg", picture.size)
    assert np.array_equal(found, expected_colours(strategy, SHOWN, tile=8))


def test_a_large_svg_file_embeds_an_image_of_the_oracle(tmp_path):
    strategy = make_strategy("prefix_segment", {})
    picture = draw_mask(strategy, MIDDLE, tile=8)
    save_figure(picture, tmp_path / "mask.svg")
    embedded = re.search(r"base64,([\w+/=\s]+)", (tmp_path / "mask.svg").read_text())
    assert embedded is not None
    image = imread(io.BytesIO(base64.b64decode(embedded[1])))
    step = len(image) // picture.size
    colours = (image[step // 2 :: step, step // 2 :: step, :3] * 255).round().astype(np.uint8)
    assert np.array_equal(colours, expected_colours(strategy, MIDDLE, tile=8))


def test_tiles_are_drawn_where_there_are_many_tokens():
    shown = ShownRequest.of_lengths(prefix=200, segments=(700, 600), suffix=100)
    picture = draw_mask(make_strategy("causal", {}), shown)
    figure = mask_figure(picture)
    figure.savefig(io.BytesIO(), dpi=DPI)
    (ax,) = figure.axes
    legend = ax.get_legend()
    assert legend is not None
    labels = [text.get_text() for text in legend.get_texts()]
    assert labels == ["full tile", "partial tile", "empty tile, skipped"]
    assert legend.get_title().get_text().startswith("50.0% of pairs allowed")


def test_the_same_picture_makes_the_same_file(tmp_path):
    picture = draw_mask(make_strategy("causal", {}), SHOWN)
    for name in ("first.svg", "second.svg"):
        save_figure(picture, tmp_path / name)
    assert (tmp_path / "first.svg").read_bytes() == (tmp_path / "second.svg").read_bytes()


def test_a_figure_is_one_column_wide_and_names_what_it_shows(tmp_path):
    strategy = make_strategy("prefix_segment", {"positions": "sequential"})
    figure = mask_figure(draw_mask(strategy, SHOWN))
    save_figure(draw_mask(strategy, SHOWN), tmp_path / "mask.pdf")
    assert (tmp_path / "mask.pdf").read_bytes().startswith(b"%PDF")
    assert figure.get_size_inches()[0] == WIDTH_IN
    (ax,) = figure.axes
    assert ax.get_title() == "prefix_segment (positions=sequential)"
    texts = [text.get_text() for text in ax.texts]
    assert sorted(set(texts)) == ["G", "P", "S1", "S2", "S3", "T"]


LONG = ShownRequest.of_lengths(60, (14_000, 12_000, 9_000, 15_000), 40)


MANY = ShownRequest.of_lengths(30, (12, 20, 9, 15) * 6, 8, new_tokens=6)


@pytest.mark.parametrize("shown", [SHOWN, LONG, MANY], ids=["short", "long", "many"])
def test_no_text_of_a_figure_lies_on_another_or_outside(shown):
    strategies = [make_strategy(name, {}) for name in (*NAMES, "few_shot_isolation")]
    pictures: list[Picture] = [draw_mask(strategy, shown) for strategy in strategies]
    pictures.append(draw_difference(strategies[2], strategies[3], shown))
    for picture in pictures:
        figure = mask_figure(picture)
        figure.set_dpi(DPI)
        figure.draw_without_rendering()
        (ax,) = figure.axes
        legend = ax.get_legend()
        assert legend is not None
        texts = [ax.title, ax.xaxis.label, *ax.texts, legend.get_title(), *legend.get_texts()]
        boxes = [text.get_window_extent() for text in texts]
        whole = figure.bbox
        for number, box in enumerate(boxes):
            text = texts[number].get_text()
            assert whole.x0 <= box.x0 <= box.x1 <= whole.x1, text
            assert whole.y0 <= box.y0 <= box.y1 <= whole.y1, text
            assert not any(box.overlaps(other) for other in boxes[:number])


def test_layouts_strategies_and_reports_plot_themselves_into_a_given_axis():
    strategy = make_strategy("prefix_segment", {})
    layout = strategy.layout(SHOWN.tokens)
    report = explain_mask(lambda b, h, q, kv: q >= kv, 2, 3, 300, 500, "cpu", (64, 128))
    figure = matplotlib.figure.Figure()
    plotted: tuple[Any, ...] = (layout, strategy, report)
    for number, drawn in enumerate(plotted):
        ax = figure.add_subplot(1, 3, number + 1)
        assert drawn.plot(ax) is ax
        assert ax.has_data()
    heights = {tuple(cast(Any, line.get_ydata())) for line in figure.axes[0].lines}
    assert (5, 6, 7, 8) in heights  # the second segment's positions restart after the prefix
    image = figure.axes[2].images[0].get_array()
    assert image is not None
    assert image.shape == (5, 4, 3)


def test_report_pictures_join_tiles_that_are_too_many():
    report = explain_mask(lambda b, h, q, kv: q >= kv, None, None, 520, 520, "cpu", 1)
    (image,) = report.plot(matplotlib.figure.Figure().add_subplot()).images
    colours = torch.from_numpy(np.asarray(image.get_array()))
    assert colours.shape == (260, 260, 3)
    assert tuple(colours[7, 7].tolist()) == rgb("#E69F00")
    assert tuple(colours[7, 6].tolist()) == rgb("#0072B2")


def test_without_matplotlib_a_message_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(FlexMaskError, match=r"pip install 'flexmask\[plot\]'"):
        make_strategy("causal", {}).plot()
