"""What a fusion makes of a request, and what a vote decides."""

import pytest

from flexmask.errors import OptionError, RequestError
from flexmask.fusion import FUSIONS, Fusion, majority
from flexmask.request import Request

REQUEST = Request(
    ("one", "two", "three"), prefix="P ", suffix=" A:", uuid="a", weights=(0.5, 0.0, 2.0)
)


def fusion(name, weights=None):
    return Fusion(name, weights or ("column" if name.startswith("weighted") else None))


@pytest.mark.parametrize("name", ["attention", "self_consistency"])
def test_under_attention_and_self_consistency_a_request_stays_one_prompt(name):
    assert Fusion(name).expand(REQUEST) == [REQUEST]
    assert Fusion(name).prompts(REQUEST) == [(REQUEST, [REQUEST])]


OF_ONE_PROMPT = ("attention", "self_consistency")


@pytest.mark.parametrize("name", [name for name in FUSIONS if name not in OF_ONE_PROMPT])
def test_under_other_fusions_every_prompt_is_one_segment_between_prefix_and_suffix(name):
    chosen = fusion(name)
    prompts = [prompt for _, prompts in chosen.prompts(REQUEST) for prompt in prompts]
    assert {(p.prefix, p.suffix, p.uuid) for p in prompts} == {("P ", " A:", "a")}
    texts = [("one",)] if name == "none" else [("one",), ("two",), ("three",)]
    assert [p.segments for p in prompts] == texts
    assert [p.segment for p in prompts] == [1, 2, 3][: len(texts)]


@pytest.mark.parametrize("name", FUSIONS)
def test_only_none_and_each_generate_for_segments_and_every_other_fusion_for_requests(name):
    expanded = fusion(name).expand(REQUEST)
    segments = {"none": [1], "each": [1, 2, 3]}.get(name, [None])
    assert [(one.uuid, one.segment) for one in expanded] == [("a", number) for number in segments]


@pytest.mark.parametrize("name", FUSIONS)
def test_an_expanded_request_has_the_prompts_that_the_request_had_for_it(name):
    chosen = fusion(name)
    later = chosen.after_expansion
    assert [pair for one in chosen.expand(REQUEST) for pair in later.prompts(one)] == (
        chosen.prompts(REQUEST)
    )
    assert chosen.after_expansion == (Fusion() if name in ("none", "each") else chosen)


def test_samples_are_requests_of_their_own_unless_they_vote():
    for name, segments in (("attention", [None]), ("none", [1]), ("each", [1, 2, 3])):
        sampled = Fusion(name, samples=2)
        expanded = sampled.expand(REQUEST)
        assert [one.key for one in expanded] == [("a", s, n) for s in segments for n in (0, 1)]
        assert expanded[::2] == Fusion(name).expand(REQUEST)
        assert sampled.after_expansion == Fusion()
        assert [one for each in expanded for one in Fusion().expand(each)] == expanded
    for name in ("vote", "self_consistency"):
        sampled = Fusion(name, samples=2)
        assert sampled.expand(REQUEST) == [REQUEST]
        assert sampled.after_expansion == sampled


def test_samples_change_the_name_and_the_record_of_a_fusion():
    assert str(Fusion("vote", samples=5)) == "vote-5-samples"
    assert str(Fusion("weighted_max", "column", 2)) == "weighted_max-column-2-samples"
    assert Fusion("each").record() == {"name": "each", "weights": None}
    assert Fusion(samples=2).record() == {"name": "attention", "weights": None, "samples": 2}


def test_weights_are_those_of_the_column_or_equal():
    assert fusion("weighted_max").weights_of(REQUEST, 3) == (0.5, 0.0, 2.0)
    assert fusion("weighted_mean", "confidence").weights_of(REQUEST, 3) == (1.0, 1.0, 1.0)
    assert fusion("mean").weights_of(REQUEST, 3) == (1.0, 1.0, 1.0)
    assert Fusion().weights_of(REQUEST, 1) == (1.0,)


def test_missing_weights_are_refused():
    with pytest.raises(RequestError, match="fusion 'weighted_max' by column needs weights"):
        fusion("weighted_max").check(Request(("one",)))
    fusion("weighted_max").check(REQUEST)
    fusion("weighted_max", "confidence").check(Request(("one",)))


@pytest.mark.parametrize(
    ("name", "weights", "message"),
    [
        ("average", None, "fusion must be one of attention, none, each, .*, got 'average'"),
        ("mean", "column", "fusion 'mean' takes no weights; weighted_mean and weighted_max do"),
        ("weighted_mean", None, "fusion 'weighted_mean' needs weights: column .* or confidence"),
        ("weighted_max", "best", "fusion weights must be one of column, confidence, got 'best'"),
    ],
)
def test_an_impossible_fusion_is_named(name, weights, message):
    with pytest.raises(OptionError, match=message):
        Fusion(name, weights)


@pytest.mark.parametrize(
    ("answers", "winner"),
    [
        (["Oslo", "Bergen", "bergen."], 1),
        (["Oslo", "Bergen"], 0),  # a tie
        (["Bergen", "Oslo", "oslo", "The Bergen"], 0),  # a tie once normalized
        (["", "", "Oslo"], 2),  # an empty answer has no vote
        (["", " "], 0),
        (["..."], 0),
    ],
)
def test_the_majority_of_normalized_answers_wins_and_the_first_of_a_tie(answers, winner):
    assert majority(answers) == winner
