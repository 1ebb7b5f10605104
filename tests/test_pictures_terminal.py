from rich.console import Console
from transformers import AutoTokenizer

from flexmask.demo import model_path
from flexmask.encoding.tokenization import RequestTokenizer
from flexmask.layout import TokenizedRequest
from flexmask.plugins.registry import make_strategy
from flexmask.show.answer_text import answer_text, marked_pieces
from flexmask.show.mask_picture import draw_difference, draw_mask
from flexmask.show.palette import part_colour
from flexmask.show.picture_source import Answer
from flexmask.show.prompt_text import prompt_text
from flexmask.show.terminal import MARGIN, ascii_picture, block_picture
from flexmask.show.tokens import ShownRequest
from oracles import dense_mask

SHOWN = ShownRequest.of_lengths(prefix=5, segments=(7, 4, 6), suffix=3, new_tokens=2)
STRATEGY = make_strategy("prefix_segment", {})
ORACLE = dense_mask(STRATEGY, STRATEGY.layout(SHOWN.tokens).extended(2))


def upper_and_lower(line):
    """Which cells a line of half blocks darkens, in its two rows."""
    return [c in "▀█" for c in line], [c in "▄█" for c in line]


def test_half_blocks_are_the_oracle_without_colours():
    picture = draw_mask(STRATEGY, SHOWN)
    lines = block_picture(picture, 80, 24, is_coloured=False).plain.splitlines()[1:-1]
    rows = [row for line in lines for row in upper_and_lower(line[MARGIN:])]
    assert rows[: picture.size] == ORACLE.tolist()


def test_half_blocks_carry_the_colour_of_what_is_seen():
    picture = draw_mask(STRATEGY, SHOWN)
    text = block_picture(picture, 80, 24, is_coloured=True)
    segments = [s for s in text.render(Console(color_system="truecolor", width=200))]
    colours = {s.style.color.name for s in segments if s.style and s.style.color}
    assert {part_colour(n).lower() for n in (0, 1, 2, 3, -1)} <= colours
    lines = text.plain.splitlines()
    assert lines[0] == "    P    S1     S2  S3    T  G "


def test_the_picture_fits_the_window():
    shown = ShownRequest.of_lengths(1000, (4000, 3000), 100)
    picture = draw_mask(make_strategy("causal", {}), shown)
    for columns, lines in ((80, 24), (200, 30), (40, 60)):
        drawn = block_picture(picture, columns, lines, is_coloured=True).plain.splitlines()
        assert len(drawn) <= lines
        assert max(map(len, drawn[:-1])) <= columns
    assert max(map(len, ascii_picture(picture, 60).splitlines()[:-1])) <= 60


def test_plain_characters_stay_ascii():
    for picture in (
        draw_mask(STRATEGY, SHOWN),
        draw_difference(make_strategy("causal", {}), STRATEGY, SHOWN),
    ):
        assert ascii_picture(picture, 80).isascii()
        assert prompt_text(picture.tokens, 80).plain.isascii()


def test_differences_show_which_mask_allows_more():
    drawn = ascii_picture(draw_difference(make_strategy("causal", {}), STRATEGY, SHOWN), 80)
    rows = [line[3:] for line in drawn.splitlines()[1:-1]]
    assert rows[12] == "=====<<<<<<<=" + "." * 14
    assert "< only causal" in drawn


def test_the_prompt_has_positions_under_tokens_and_says_where_the_tail_starts():
    texts = {1: "Q:", 2: " Where", 3: "\n", 4: "A:"}
    request = TokenizedRequest((), ((1, 2), (2, 2, 3)), (4,))
    shown = ShownRequest(request, 0, texts.__getitem__)
    tokens = draw_mask(make_strategy("ensemble_isolation", {}), shown).tokens
    assert prompt_text(tokens, 60).plain.splitlines() == [
        "S1  2 tokens, slots from 0, positions 0 to 1",
        "    Q:  Where ",
        "    0  1      ",
        "S2  3 tokens, slots from 2, positions 0 to 2",
        "     Where  Where \\n ",
        "    0      1      2  ",
        "T   1 token, slots from 5, position 3; the fusion tail starts here",
        "    A: ",
        "    3  ",
    ]


def test_long_parts_leave_out_their_middle():
    shown = ShownRequest(TokenizedRequest((), ((1,) * 500,), (1,)), 0, lambda token: "word")
    lines = prompt_text(draw_mask(STRATEGY, shown).tokens, 60).plain.splitlines()
    assert len(lines) < 12
    (left_out,) = [line for line in lines if "tokens more" in line]
    shown_tokens = sum(line.count("word") for line in lines) - 1  # one is the tail's
    assert int(left_out.split()[1]) == 500 - shown_tokens


def test_control_sequences_of_a_text_do_not_reach_the_terminal():
    attack = "\x1b]0;title\x07\r"
    shown = ShownRequest(TokenizedRequest((), ((1,),), (1,)), 0, lambda token: attack)
    answer = Answer(attack, attack, (attack,), True, "eos", "m", lambda: STRATEGY)
    texts = (prompt_text(draw_mask(STRATEGY, shown).tokens, 80), answer_text(answer))
    for text in texts:
        assert "\\x1b]0;title\\x07\\r" in text.plain
        assert all(character.isprintable() or character == "\n" for character in text.plain)


def test_accepted_answers_are_marked_in_what_was_generated():
    answer = Answer(
        "the UK", "the UK, or Britain\n", ("uk", "Britain"), None, "eos", "m", lambda: STRATEGY
    )
    assert "the [UK], or [Britain]\\n" in answer_text(answer).plain
    assert list(marked_pieces("Ukraine", ("uk",))) == [("Ukraine", False)]
    assert list(marked_pieces("New York", ("york", "new york"))) == [("New York", True)]
    assert list(marked_pieces("nothing", ())) == [("nothing", False)]


def test_the_texts_of_tokens_join_to_the_text():
    tokenize = RequestTokenizer(AutoTokenizer.from_pretrained(model_path()))
    text = "Q: Where was  Rispo Dror born?\nA: in Fumholm, 1873."
    pieces = tokenize.token_texts(text)
    assert len(pieces) > 8
    assert "".join(pieces) == text
