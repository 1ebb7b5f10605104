"""Which ways are one cell, what is measured of it, and how cells are compared."""

from dataclasses import replace
from typing import cast

import pytest

from flexmask.compare.cell import ATTENTION, Contender, plan_ways
from flexmask.compare.comparison_run import cut_to_counts
from flexmask.compare.lone_prompt import tells_parts_apart, with_plain_prompts
from flexmask.compare.measurement import Measurement, Stopwatch
from flexmask.compare.sameness import Sameness
from flexmask.demo import model_path
from flexmask.encoding.tokenization import RequestTokenizer, load_tokenizer
from flexmask.engine import RunStats
from flexmask.errors import OptionError, OutputError, RequestError
from flexmask.fusion import Fusion
from flexmask.mask_mods import causal
from flexmask.plugins.registry import load_registry, make_strategy
from flexmask.request import Request
from flexmask.strategy_function import mask_strategy
from flexmask.tasks.request_source import BadRow

BUILT_IN = ["causal", "prefix_segment", "ensemble_isolation"]
REQUESTS = [
    Request(
        segments=("Q: Where was Rispo Dror born?", "Q: Which town bore Dror?", "Q: Dror, from?"),
        prefix="Q: Who?\nA: I\n\n",
        suffix="\nA:",
        uuid=str(number),
    )
    for number in range(2)
]


def contender(name, **parameters):
    return Contender(name, make_strategy(name, parameters))


def names_of_cells(contenders, fusions, counts, requests=REQUESTS, **options):
    ways = plan_ways(contenders, fusions, counts)
    tokenizer = RequestTokenizer(load_tokenizer(str(model_path())))
    new_tokens = 0 if requests[0].choices else 4
    sameness = Sameness(cut_to_counts(requests, counts), tokenizer, new_tokens, **options)
    return [(cell.title, cell.same) for cell in sameness.cells(ways)]


def test_a_contender_is_named_as_the_command_line_takes_it():
    assert contender("causal").name == "causal"
    assert contender("prefix_segment", positions="restart").name == "prefix_segment"
    sequential = contender("prefix_segment", positions="sequential")
    assert sequential.name == "prefix_segment:positions=sequential"


def test_the_strategies_stand_first_in_the_plan_whatever_the_fusions():
    contenders = [contender(name) for name in BUILT_IN[:2]]
    ways = plan_ways(contenders, [Fusion("mean"), ATTENTION], [1, 3])
    assert [(way.name, way.segments) for way in ways] == [
        *(("causal", "1"), ("prefix_segment", "1")),
        *(("mean of causal", "1"), ("mean of prefix_segment", "1")),
        *(("causal", "3"), ("prefix_segment", "3")),
        *(("mean of causal", "3"), ("mean of prefix_segment", "3")),
    ]


def test_what_stands_twice_is_refused():
    causal = contender("causal")
    with pytest.raises(OptionError, match="strategy causal is given twice"):
        plan_ways([causal, causal], [], [None])
    with pytest.raises(OptionError, match="fusion mean is given twice"):
        plan_ways([causal], [Fusion("mean"), Fusion("mean")], [None])
    with pytest.raises(OptionError, match="number of segments 3 is given twice"):
        plan_ways([causal], [], [3, 3])


def test_one_segment_is_one_cell_and_prompts_alone_are_one_for_all_strategies():
    contenders = [contender(name) for name in BUILT_IN]
    fusions = [Fusion("none"), Fusion("mean")]
    assert names_of_cells(contenders, fusions, [1, 3]) == [
        ("any strategy (1)", ("none (1)", "mean (1)", "none (3)")),
        ("causal (3)", ()),
        ("prefix_segment (3)", ()),
        ("ensemble_isolation (3)", ()),
        ("mean (3)", ()),
    ]


def test_ways_that_draw_with_other_seeds_are_not_the_same():
    fusions = [Fusion("none"), Fusion("mean"), Fusion("vote")]
    assert names_of_cells([contender("causal")], fusions, [1], is_greedy=False) == [
        ("causal (1)", ("mean of causal (1)",)),
        ("none of causal (1)", ("vote of causal (1)",)),
    ]


def test_positions_tell_ways_apart_where_there_are_several_segments():
    contenders = [
        contender("ensemble_isolation"),
        contender("ensemble_isolation", positions="sequential"),
    ]
    titles = [title for title, _ in names_of_cells(contenders, [], [1, 2])]
    sequential = "ensemble_isolation:positions=sequential (2)"
    assert titles == ["any strategy (1)", "ensemble_isolation (2)", sequential]


def test_a_mask_that_differs_in_one_pair_is_a_cell_of_its_own():
    @mask_strategy
    def nearly_causal(batch):
        """All but one pair of causal attention."""

        def mask_mod(b, h, q_idx, kv_idx):
            return (q_idx >= kv_idx) & ~((q_idx == 9) & (kv_idx == 0))

        return mask_mod

    contenders = [contender("causal"), Contender("nearly_causal", nearly_causal())]
    assert names_of_cells(contenders, [Fusion("mean")], [1, 2]) == [
        ("causal (1)", ("mean of causal (1)",)),
        ("nearly_causal (1)", ("mean of nearly_causal (1)",)),
        ("causal (2)", ()),
        ("nearly_causal (2)", ()),
        ("mean of causal (2)", ()),
        ("mean of nearly_causal (2)", ()),
    ]


def test_masks_that_differ_for_the_tokens_of_a_choice_are_told_apart():
    @mask_strategy
    def forgets_late(batch):
        """Causal, but tokens from slot 25 on do not see the first."""
        return lambda b, h, q_idx, kv_idx: (q_idx >= kv_idx) & ((q_idx < 25) | (kv_idx > 0))

    contenders = [contender("causal"), Contender("forgets_late", forgets_late())]
    short = [replace(request, choices=(" yes", " no")) for request in REQUESTS]
    long = [replace(request, choices=(" yes", " no" * 20)) for request in REQUESTS]
    (_, (same,)), *others = names_of_cells(contenders, [Fusion("mean")], [1], short)
    assert (same, others) == ("mean (1)", [])
    assert len(names_of_cells(contenders, [], [1], long)) == 2


def test_strategies_that_tell_parts_of_a_lone_prompt_apart_are_found_by_what_they_do():
    built_in = [one.cls() for one in load_registry().strategies()]
    apart = {strategy.name for strategy in built_in if tells_parts_apart(strategy)}
    assert apart == {
        *("adaptive_parallel", "block_attention"),  # of segments among others
        *("global_window", "prefix_lm"),  # of a prefix unlike the rest
    }


def test_a_bias_by_distance_reads_a_lone_prompt_as_any_text():
    @mask_strategy
    def biased(batch):
        """Causal, with scores that fall by distance."""
        return causal

    def score_mod(self, batch):
        return lambda score, b, h, q_idx, kv_idx: score - 0.5 * (q_idx - kv_idx)

    assert not tells_parts_apart(type("Biased", (biased,), {"score_mod": score_mod})())


def test_fusions_run_under_the_plain_prompt_where_a_strategy_is_made_for_several_segments():
    contenders = [contender("adaptive_parallel"), contender("block_attention")]
    ways = with_plain_prompts(plan_ways(contenders, [Fusion("mean"), Fusion("none")], [1, 2]))
    assert [(way.name, way.segments) for way in ways] == [
        *(("adaptive_parallel", "1"), ("block_attention", "1")),
        *(("mean of causal", "1"), ("none of causal", "1")),
        *(("adaptive_parallel", "2"), ("block_attention", "2")),
        *(("mean of causal", "2"), ("none of causal", "2")),
    ]


def test_fusions_of_a_strategy_that_reads_a_lone_prompt_as_text_stay_its_own():
    ways = plan_ways([contender("sliding_window", window=4)], [Fusion("mean")], [2])
    assert with_plain_prompts(ways) == ways


def test_a_strategy_that_fails_is_a_cell_of_its_own():
    @mask_strategy
    def broken(batch):
        """No mask."""
        raise ValueError("no mask")

    contenders = [contender("causal"), Contender("broken", broken())]
    assert [title for title, _ in names_of_cells(contenders, [], [1])] == [
        "causal (1)",
        "broken (1)",
    ]


def test_requests_with_too_few_segments_stop_the_run_or_become_rows():
    short = replace(REQUESTS[0], segments=REQUESTS[0].segments[:1], uuid="short", source="f:3")
    with pytest.raises(RequestError, match="f:3: 2 segments asked for, got 1; lower `num_seg"):
        cut_to_counts([*REQUESTS, short], [1, 2])
    cut = cut_to_counts([*REQUESTS, short], [1, 2], "skip")
    assert [len(request.segments) for request in cast(list[Request], cut[1])] == [1, 1, 1]
    assert cut[2][2] == BadRow("short", "f:3: 2 segments asked for, got 1", short)


def stats(batches, compilations, batch_size=8, **more):
    """After so many prefills of two rows, a second of prefill and two of decode each."""
    return RunStats(
        batch_size,
        512,
        generations=2 * batches,
        prompt_tokens=200 * batches,
        computed_tokens=50 * batches,
        generated_tokens=6 * batches,
        prefill_s=1.0 * batches,
        decode_s=2.0 * batches,
        prefills=batches,
        first_token_s=1.5 * batches,
        compilations=compilations,
        decode_peak_bytes=10 * batches,
        **more,
    )


def measured(states, **options):
    stopwatch = Stopwatch({"device": "cpu"}, **options)
    for state in states:
        stopwatch.note(state)
    return stopwatch.measurement


def test_rows_during_which_something_compiles_are_counted_and_not_timed():
    found = measured([stats(1, 2), stats(2, 2), stats(3, 4), stats(4, 4)])
    assert (found.rows, found.prompt_tokens, found.computed_tokens) == (8, 800, 200)
    assert (found.timed_rows, found.timed_tokens, found.timed_s) == (4, 12, 6.0)
    assert found.compiling_s == 6.0
    assert (found.tokens_per_s, found.ms_per_row, found.first_token_ms) == (2.0, 1500.0, 1500.0)
    assert found.peak_bytes == 40


def test_rows_that_were_in_flight_at_a_compilation_are_not_timed_either():
    found = measured([stats(1, 2, cold_groups=1), stats(2, 2), stats(3, 2)])
    assert (found.rows, found.timed_rows, found.timed_s, found.compiling_s) == (6, 2, 3.0, 6.0)
    again = measured([stats(1, 0, cold_groups=1), stats(2, 0)], is_warm=True)
    assert (again.timed_rows, again.timed_s) == (4, 6.0)


def test_scored_rows_have_no_times_of_generated_tokens():
    states = [replace(stats(n, 2), generated_tokens=0, first_token_s=0.0) for n in (1, 2, 3)]
    found = measured(states)
    assert (found.timed_rows, found.ms_per_row) == (4, 1500.0)
    assert found.tokens_per_s is found.first_token_ms is None


def test_a_single_batch_is_timed_by_a_second_run():
    first = measured([stats(1, 2)])
    assert first.tokens_per_s is first.ms_per_row is first.first_token_ms is None
    again = measured([stats(1, 0)], is_warm=True).without_counts()
    both = first.plus(again)
    assert (both.rows, both.generated_tokens, both.timed_rows, both.timed_s) == (2, 6, 2, 3.0)


def test_times_of_an_interrupted_cell_are_added_if_taken_the_same_way(tmp_path):
    path = tmp_path / "cell.times.json"
    assert Measurement.read(path) is None
    first = measured([stats(1, 2), stats(2, 2)])
    first.write(path)
    assert Measurement.read(path) == first
    both = first.plus(measured([stats(1, 2), stats(2, 2), stats(3, 2)]))
    assert (both.rows, both.timed_rows, len(both.first_token_s)) == (10, 6, 3)
    larger = measured([stats(1, 2, batch_size=16), stats(2, 2, batch_size=16)])
    apart = first.plus(larger)
    assert (apart.rows, apart.timed_rows, apart.batch_size) == (8, 2, 16)
    path.write_text("{}")
    with pytest.raises(OutputError, match="not the times of a cell"):
        Measurement.read(path)
