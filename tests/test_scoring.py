"""Scores of given choices, all in one pass, against one dense pass for each choice."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from flexmask.attention.placement import RowPlacement
from flexmask.attention.scaled_part import place_part
from flexmask.choice_scores import ChoiceScore, Score, fused_scores
from flexmask.encoding.tokenization import RequestTokenizer
from flexmask.engine import Engine
from flexmask.engine.choice_prompt import ChoicePrompt, stored_choices
from flexmask.engine.choice_strategy import ChoiceStrategy
from flexmask.engine.output_head import TokenScores
from flexmask.engine.prompt_group import PromptGroup
from flexmask.engine.prompt_planner import PlannedRequest
from flexmask.engine.scoring import ChoiceScorer, ScoringRun
from flexmask.errors import (
    FlexMaskWarning,
    LayoutError,
    ModelError,
    OptionError,
    RequestError,
)
from flexmask.fusion import Fusion
from flexmask.kv_store.options import KVCacheOptions
from flexmask.layout import TAIL, Layout
from flexmask.layout_batch import LayoutBatch, layout_tables
from flexmask.mask_mods import layer_masks
from flexmask.plugins.registry import make_strategy
from flexmask.request import Request, choice_index
from flexmask.strategy import Strategy
from flexmask_strategies.causal import Causal
from flexmask_strategies.prefix_segment import PrefixSegment
from oracles import WINDOW, dense_mask, oracle_logits, random_request, random_words
from plugin_site import BUILT_IN

CPU = torch.device("cpu")
NARROW: dict[str, dict[str, Any]] = {
    "dilated": {"window": 3},
    "global_window": {"window": 4},
    "sliding_window": {"window": 5, "sinks": 1},
    "strided": {"stride": 3},
}
"""Parameters that hide some of the prompt from some of a choice's tokens."""


def choices_of(count: int, longest: int = 5) -> tuple[tuple[int, ...], ...]:
    """Random tokens, 1 to ``longest`` for each choice."""
    return tuple(
        random_request(100 + number, 1 + number % longest, [1], 1).prefix
        for number in range(count)
    )


def with_tokens(layout: Layout, token_ids: tuple[int, ...]) -> Layout:
    """The prompt, continued by some tokens."""
    grown = layout.extended(len(token_ids))
    return Layout((*layout.token_ids, *token_ids), grown.segment_ids, grown.position_ids)


def dense_logprobs(model, strategy: Strategy, layout: Layout) -> Tensor:
    """Log-probabilities ``(S, V)`` of one dense pass in float32 over a layout."""
    batch = LayoutBatch(1, len(layout), CPU)
    batch.load([layout], [len(layout)], [0])
    slots = torch.arange(len(layout))
    config = model.config
    kinds = getattr(config, "layer_types", None) or ["full_attention"]
    windows = {
        kind: getattr(config, "sliding_window", None) if kind != "full_attention" else None
        for kind in kinds
    }
    zero = torch.zeros((), dtype=torch.long)
    masks = {
        kind: mask_mod(zero, zero, slots[:, None], slots)[None, None]
        for kind, mask_mod in layer_masks(strategy, batch, windows).items()
    }
    score_mod = strategy.applied_score_mod(batch)
    part = place_part(strategy.scaled_part(batch), RowPlacement(slots[None]))
    with torch.no_grad():
        output = model(
            input_ids=layout.token_tensor[None],
            position_ids=layout.position_tensor[None],
            attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
            use_cache=False,
            score_mod=score_mod,
            scaled_part=part,
        )
    logprobs: Tensor = output.logits[0].float().log_softmax(-1)
    return logprobs


def one_by_one(model, strategy: Strategy, layout: Layout, choices) -> list[list[float]]:
    """The log-probability of each token of each choice, by a pass for each choice."""
    found = []
    for choice in choices:
        logprobs = dense_logprobs(model, strategy, with_tokens(layout, choice))
        first = len(layout) - 1
        found.append([logprobs[first + n, token].item() for n, token in enumerate(choice)])
    return found


def together(model, strategy: Strategy, layout: Layout, choices) -> list[list[float]]:
    """The same, by a single pass for all choices."""
    prompt = ChoicePrompt(layout.with_choices(stored_choices(choices)), choices)
    logprobs = dense_logprobs(model, ChoiceStrategy(strategy), prompt.layout)
    found = iter([logprobs[slot, token].item() for slot, token in prompt.predictions()])
    return [[next(found) for _ in choice] for choice in choices]


def assert_equal(found: list[list[float]], expected: list[list[float]]) -> None:
    assert [len(one) for one in found] == [len(one) for one in expected]
    for ours, theirs in zip(found, expected, strict=True):
        assert ours == pytest.approx(theirs, abs=1e-5)


@pytest.mark.parametrize("name", BUILT_IN)
def test_all_choices_in_one_pass_score_as_each_alone(models, name):
    strategy = make_strategy(name, NARROW.get(name, {}))
    model = models("llama", "flexmask_dense")
    layout = strategy.layout(random_request(1, 4, [5, 7, 6], 3))
    choices = choices_of(20)
    expected = one_by_one(model, strategy, layout, choices)
    assert_equal(together(model, strategy, layout, choices), expected)
    assert_equal(together(model, strategy, layout, choices[4:5]), expected[4:5])


def test_sliding_layers_count_the_positions_of_each_choice(models):
    model, strategy = models("gemma2", "flexmask_dense"), PrefixSegment()
    layout = strategy.layout(random_request(2, 4, [WINDOW - 8, 7], 3))
    choices = choices_of(6, longest=6)
    expected = one_by_one(model, strategy, layout, choices)
    assert_equal(together(model, strategy, layout, choices), expected)


@dataclass(frozen=True)
class TwoWayTail(Strategy):
    """A mask as a third party may write one: the tail sees itself in both directions."""

    name = "two_way_tail"
    is_causal = False

    def mask_mod(self, batch):
        ids = batch.segment_ids

        def two_way_tail(b, h, q_idx, kv_idx):
            both = (ids[b, q_idx] == TAIL) & (ids[b, kv_idx] == TAIL)
            return (q_idx >= kv_idx) | both

        return two_way_tail


def test_no_token_sees_a_later_one_of_a_choice_under_a_mask_that_would_let_it(models):
    model, strategy = models("llama", "flexmask_dense"), TwoWayTail()
    layout = strategy.layout(random_request(3, 2, [4, 5], 3))
    prompt = dense_logprobs(model, strategy, layout)[-1]
    choices = ((5,), (7, 8, 9), (7, 8, 4), (6, 6))
    found = together(model, strategy, layout, choices)
    # As in generation, where the prompt is computed before anything follows it.
    assert [one[0] for one in found] == pytest.approx([prompt[c[0]].item() for c in choices])
    assert found[1][:2] == pytest.approx(found[2][:2], abs=1e-5)


def test_a_layout_stores_choices_longest_first_behind_a_prompt():
    layout = Causal().layout(random_request(4, 2, [3], 1)).with_choices([(7, 8), (9,), ()])
    assert (layout.prompt_length, layout.choice_lengths) == (6, (2, 1, 0))
    assert layout.choice_array.tolist() == [0] * 6 + [1, 1, 2]
    assert layout.tail_slot_array.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 6]
    assert layout.position_ids[-3:] == (6, 7, 6)
    with pytest.raises(LayoutError, match="longest first"):
        layout.extended(0).with_choices([(7,), (8, 9)])


def text_request(seed: int, num_choices: int) -> Request:
    choices = tuple(random_words(1000 * seed + n, 1 + n % 4) for n in range(num_choices))
    segments = tuple(random_words(100 * seed + n, 12 + n) for n in range(3))
    prefix = random_words(0, 20)
    return Request(segments, prefix, "t9 t10", uuid=f"row{seed}", choices=choices)


@pytest.fixture(scope="module")
def scored(engine):
    """Requests of 2 to 20 choices behind one prefix, scored in batches of three."""
    requests = [text_request(seed, 2 + 3 * seed) for seed in range(7)]
    run = engine.score(requests, PrefixSegment(), batch_size=3)
    return requests, list(run), run.stats


def test_the_engine_scores_as_a_dense_pass_for_each_choice(scored, models, tokenizer):
    requests, scores, _ = scored
    model, tokenize = models("llama", "sdpa"), RequestTokenizer(tokenizer)
    assert [score.request for score in scores] == requests
    for request, score in zip(requests, scores, strict=True):
        layout = PrefixSegment().layout(tokenize(request))
        assert score.prompt_tokens == len(layout)
        for choice, tokens in zip(score.choices, tokenize.choices(request), strict=True):
            grown = with_tokens(layout, tokens)
            dense = dense_mask(PrefixSegment(), grown)
            logits = oracle_logits(model, grown, dense, dense)
            logits = logits[len(layout) - 1 : -1]
            expected = logits.log_softmax(-1).gather(1, torch.tensor(tokens)[:, None])[:, 0]
            assert choice.token_ids == tokens
            assert choice.token_logprobs == pytest.approx(expected.tolist(), abs=1e-5)
            assert choice.logprob == pytest.approx(expected.sum().item(), abs=1e-5)
            assert choice.is_greedy == (logits.argmax(-1).tolist() == list(tokens))


@pytest.fixture
def store(engine, monkeypatch):
    """A store of keys and values in memory, which the engine has during a test."""
    runner = engine.runner
    for name in ("store", "_store_bytes"):
        monkeypatch.setattr(runner, name, getattr(runner, name))
    runner.use_store(KVCacheOptions(host_bytes=2**24), "random", {})


def test_equal_prompts_and_choices_share_tokens_that_predict(engine):
    first = replace(text_request(1, 5), suffix=random_words(7, 24))
    requests = [
        first,
        replace(first, uuid="equal"),
        replace(first, uuid="other choices", choices=text_request(2, 3).choices),
    ]
    computed = []
    for count in (1, 2, 3):
        run = engine.score(requests[:count], PrefixSegment(), batch_size=3)
        scores = list(run)
        computed.append(run.stats.computed_tokens)
        for request, score in zip(requests, scores, strict=False):
            (alone,) = engine.score([request], PrefixSegment(), batch_size=3)
            expected = [choice.logprob for choice in alone.choices]
            assert [choice.logprob for choice in score.choices] == pytest.approx(
                expected, abs=1e-5
            )
    # The second request is shared as a whole, with the tokens that predict, and the prompt of the
    # third.
    tokens = RequestTokenizer(engine.tokenizer).choices(requests[2])
    assert computed[1] == computed[0]
    assert computed[2] == computed[1] + sum(len(choice) - 1 for choice in tokens)


def test_stored_spans_change_no_score(engine, store, scored):
    requests, expected, _ = scored
    for is_again in (False, True):
        run = engine.score(requests[:3], PrefixSegment(), batch_size=3)
        for score, other in zip(run, expected, strict=False):
            found = [choice.logprob for choice in score.choices]
            assert found == pytest.approx([one.logprob for one in other.choices], abs=1e-5)
        assert (run.stats.cached_spans > 0) == is_again


def test_prompts_without_stored_choices_replace_those_with_some():
    with_choices = Layout((1, 2), (TAIL, TAIL), (0, 1)).with_choices([(3, 4), (5,)])
    batch, row = LayoutBatch(1, 8, CPU), torch.tensor([0])
    slots = torch.arange(8)[None]
    assert torch.equal(batch.choices.tail_slots, slots)
    for layout, is_own in (
        (with_choices, False),
        (Layout((1,) * 6, (TAIL,) * 6, tuple(range(6))), True),
    ):
        batch.load_rows(row, layout_tables([layout], [len(layout)], [0], 1, 8))
        assert torch.equal(batch.choices.tail_slots, slots) == is_own
        assert (batch.choices.choice_ids.sum() == 0) == is_own


@pytest.mark.gpu
def test_scores_on_a_gpu_equal_those_on_a_cpu(scored, models, tokenizer):
    torch.set_float32_matmul_precision("highest")
    requests, scores, _ = scored
    on_gpu = Engine(models("llama", "flexmask", "cuda"), tokenizer)
    for one, other in zip(on_gpu.score(requests, PrefixSegment()), scores, strict=True):
        found = [choice.logprob for choice in one.choices]
        assert found == pytest.approx([choice.logprob for choice in other.choices], abs=1e-4)


def test_a_prompt_is_computed_once_however_many_choices_it_has(scored, tokenizer):
    requests, scores, stats = scored
    tokenize = RequestTokenizer(tokenizer)
    stored = sum(len(c) - 1 for request in requests for c in tokenize.choices(request))
    assert stats.computed_tokens + stats.copied_tokens == pytest.approx(
        sum(score.prompt_tokens for score in scores) + stored, abs=21
    )
    assert stats.copied_tokens > 0  # the prefix that all prompts begin with
    assert stats.generations == len(requests)


def test_generations_before_and_after_are_as_without_scores(engine):
    requests = [text_request(seed, 4) for seed in range(2)]
    alone = [g.token_ids for g in engine.generate(requests, PrefixSegment(), batch_size=3)]
    run = engine.generate(requests, PrefixSegment(), batch_size=3, max_new_tokens=20)
    assert len(list(engine.score(requests, PrefixSegment(), batch_size=3))) == 2
    assert [g.token_ids for g in run] == alone


def test_fused_scores_are_means_over_the_prompts(engine):
    request = text_request(1, 3)
    (mean,) = engine.score([request], PrefixSegment(), fusion="mean", batch_size=3)
    (mixed,) = engine.score([request], PrefixSegment(), fusion="mean_prob", batch_size=3)
    each = list(engine.score([request], PrefixSegment(), fusion="each", batch_size=3))
    assert [one.request.segment for one in each] == [1, 2, 3]
    for number in range(3):
        alone = torch.tensor([one.choices[number].logprob for one in each])
        assert mean.choices[number].logprob == pytest.approx(alone.mean().item())
        expected = alone.logsumexp(0).item() - torch.tensor(3.0).log().item()
        assert mixed.choices[number].logprob == pytest.approx(expected, rel=1e-5)
        assert mixed.choices[number].is_greedy is None
    assert mean.prompt_tokens == sum(one.prompt_tokens for one in each)


def test_a_choice_that_no_prompt_allows_has_probability_zero():
    impossible = ChoiceScore("a b", (3, 4), (float("-inf"), -1.0), False)
    possible = ChoiceScore("a b", (3, 4), (-1.0, -1.0), True)
    (none,) = fused_scores([[impossible], [impossible]], "mean_prob")
    (half,) = fused_scores([[impossible], [possible]], "mean_prob")
    assert none.logprob == float("-inf")
    assert half.logprob == pytest.approx(-2 - torch.tensor(2.0).log().item())


def test_choices_are_compared_by_sum_by_token_or_by_byte():
    short, long = (
        ChoiceScore(" no", (3,), (-1.5,), False),
        ChoiceScore(" Überall", (3, 4), (-1.0, -1.0), False),
    )
    score = Score(Request(("q",), choices=(" no", " Überall")), (short, long), 1)
    assert [score.chosen(by) for by in ("none", "tokens", "bytes")] == [0, 1, 1]
    assert long.value("bytes") == -2.0 / 9
    assert not score.is_tie()
    assert Score(score.request, (short, short), 1).is_tie()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"choices": (" a",)}, "choices must be at least two, got only ' a'"),
        ({"choices": (" a", "")}, "choice 2 is empty"),
        ({"choices": (" a", " b"), "answer": 2}, "index of one of 2 choices, 0 to 1, or its text"),
    ],
)
def test_choices_that_cannot_be_scored_are_refused(options, message):
    with pytest.raises(RequestError, match=message):
        Request(("q",), **options)


@pytest.mark.parametrize(("answer", "index"), [(1, 1), (" b", 1), ("b", 1), ("1", 1), ("3", 2)])
def test_an_answer_is_an_index_or_a_text(answer, index):
    assert choice_index(answer, (" a", " b", " 3")) == index


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ("c", "the answer 'c' is none of the choices: ' a', 'b', ' b'"),
        (-1, "index of one of 3 choices, 0 to 2, or its text, got -1"),
        ("7", "index of one of 3 choices, 0 to 2, or its text, got '7'"),
        ("  b", "the answer '  b' is none of the choices"),
    ],
)
def test_an_answer_that_is_none_of_the_choices_is_refused(answer, message):
    with pytest.raises(RequestError, match=message):
        choice_index(answer, (" a", "b", " b"))


def test_the_text_of_the_right_choice_is_the_accepted_answer():
    assert Request(("q",), choices=(" a", " b"), answer=1).answers == ("b",)
    assert Request(("q",), choices=(" a", " b"), answer=1, answers=("c",)).answers == ("c",)


def test_a_request_that_cannot_be_scored_is_refused_by_name(engine, tokenizer):
    def refused(request, **options):
        with pytest.raises(RequestError) as caught:
            list(engine.score([request], Causal(), **options))
        return str(caught.value)

    assert refused(Request(("t3",), suffix="t4", uuid="x")) == (
        "request 'x': it has no choices to score"
    )
    blank = Request(("t3",), suffix="t4", uuid="x", choices=("t5", " "))
    assert refused(blank) == "request 'x': choice 2 (' ') has no tokens"
    long = Request((random_words(1, 250),), uuid="x", choices=("t5", random_words(2, 9)))
    assert "needs positions up to 259 (8 of them for the longest choice)" in refused(long)
    with pytest.raises(OptionError, match=r"attention, none, each, mean, mean_prob, got 'vote'"):
        engine.score([blank], Causal(), fusion="vote")


def planned(number: int) -> PlannedRequest:
    """A planned request of two choices, as the prompt planner makes it."""
    request = Request(("q",), uuid=f"row{number}", choices=(" a", " b c"))
    choices = ((3,), (4, 5))
    layout = Causal().layout(random_request(number, 2, [3], 2))
    layouts = (layout.with_choices(stored_choices(choices)),)
    return PlannedRequest(request, PromptGroup(number, layouts, ("",), (1.0,), (choices,)))


def token_scores(*logprobs: float) -> TokenScores:
    return TokenScores(torch.tensor(logprobs), torch.tensor([True] * len(logprobs)))


class SpoiltScorer(ChoiceScorer):
    """Gives every second prompt a log-probability that is NaN."""

    def results(self, prompts):
        for index in reversed(range(len(prompts))):
            spoilt = float("nan") if index % 2 else -1.0
            yield [(index, [token_scores(-0.5), token_scores(-1.0, spoilt)])]


def test_a_request_whose_logits_are_nan_is_refused_and_the_others_are_kept(engine):
    def run(on_refused=None):
        scorer = SpoiltScorer(engine.executor, Causal(), 4)
        return ScoringRun(scorer, iter([[planned(n) for n in range(4)]]), Fusion(), on_refused)

    refused = []
    scores = list(run(lambda request, error: refused.append((request.uuid, str(error)))))
    assert [score.request.uuid for score in scores] == ["row0", "row2"]
    assert [uuid for uuid, _ in refused] == ["row3", "row1"]
    assert "request 'row3': the model's logits hold NaN" in refused[0][1]
    with pytest.raises(RequestError, match="request 'row3': the model's logits hold NaN"):
        list(run())


def test_batches_are_halved_where_memory_runs_out_and_no_prompt_is_lost(engine, monkeypatch):
    tried = []

    def batch(self, prompts, rows, capacity, upcoming):
        tried.append((rows, len(prompts)))
        if rows > 2:
            raise torch.OutOfMemoryError("no room")
        return [[token_scores(-0.5), token_scores(-1.0, -1.0)] for _ in prompts]

    monkeypatch.setattr(ChoiceScorer, "_batch", batch)
    monkeypatch.setattr(engine.executor, "release", lambda: None)
    scorer = ChoiceScorer(engine.executor, Causal(), 8)
    run = ScoringRun(scorer, iter([[planned(n) for n in range(5)]]), Fusion())
    with pytest.warns(FlexMaskWarning, match="out of memory: . rows at a time become"):
        scores = list(run)
    assert [score.request.uuid for score in scores] == [f"row{n}" for n in range(5)]
    assert tried == [(8, 5), (4, 4), (2, 2), (2, 2), (2, 1)]
    list(scorer.results([ChoicePrompt(planned(0).prompts.layouts[0], ((3,), (4, 5)))] * 3))
    assert tried[5:] == [(2, 2), (2, 1)]
    assert run.stats.halvings == 2
    monkeypatch.setattr(scorer, "_batch_size", 1)
    monkeypatch.setattr(ChoiceScorer, "_batch", lambda *_: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(ModelError, match="not enough memory for one row of"):
        list(scorer.results([ChoicePrompt(planned(0).prompts.layouts[0], ((3,), (4, 5)))]))
