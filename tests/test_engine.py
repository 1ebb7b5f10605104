import copy
import dataclasses
import warnings
from typing import Any

import pytest
import torch

from flexmask.encoding.tokenization import RequestTokenizer
from flexmask.engine import Engine
from flexmask.engine.prompt_spans import SpanFinder
from flexmask.engine.sampler import Sampler
from flexmask.errors import FlexMaskWarning, ModelError, OptionError, RequestError
from flexmask.request import Request
from flexmask.sampling import Sampling
from flexmask_strategies.causal import Causal
from flexmask_strategies.ensemble_isolation import EnsembleIsolation
from flexmask_strategies.prefix_segment import PrefixSegment
from oracles import SHAPE, as_on_gpu, make_model
from oracles import random_text_request as request
from oracles import random_words as words

REQUESTS = [request(seed, 1 + seed % 4, 5 + 3 * seed) for seed in range(7)]


def run(engine, requests=REQUESTS, strategy=None, **options):
    options = {"max_new_tokens": 6, "batch_size": 3} | options
    return list(engine.generate(requests, strategy or EnsembleIsolation(), **options))


def test_results_come_in_input_order_whatever_the_batches(engine):
    generations = run(engine)
    assert [g.request for g in generations] == REQUESTS


def test_a_row_does_not_depend_on_what_else_is_in_the_batch(engine):
    whole = run(engine)
    for generation, alone in zip(whole, REQUESTS, strict=True):
        (single,) = run(engine, [alone])
        assert single.token_ids == generation.token_ids


def test_causal_equals_plain_generate_of_transformers(engine, tokenizer):
    model: Any = make_model("llama", "sdpa")
    tokenize = RequestTokenizer(tokenizer)
    generations = run(engine, strategy=Causal(), max_new_tokens=32)
    for generation in generations:
        layout = Causal().layout(tokenize(generation.request))
        prompt = torch.tensor([layout.token_ids])
        output = model.generate(
            input_ids=prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=32,
            do_sample=False, eos_token_id=2, pad_token_id=0,
        )  # fmt: skip
        assert generation.token_ids == tuple(output[0, prompt.shape[1] :].tolist())
        assert generation.prompt_tokens == prompt.shape[1]


def test_fifty_lengths_compile_nothing_after_the_first_batch(engine, device, models, tokenizer):
    if device == "cuda":
        engine = Engine(models("llama", "flexmask", device), tokenizer)
    requests = [request(seed, 1 + seed % 5, 5 + seed) for seed in range(50)]
    results = engine.generate(requests, EnsembleIsolation(), max_new_tokens=2, batch_size=3)
    rows = [len(generation.token_ids) for generation in results]
    assert len(rows) == 50
    assert results.stats.generations == 50
    assert results.stats.generated_tokens == sum(rows)
    assert results.stats.warm_compilations == 0


@pytest.mark.parametrize("strategy", [Causal(), PrefixSegment(), EnsembleIsolation()], ids=str)
def test_a_prefix_that_all_prompts_share_is_computed_once(engine, strategy, monkeypatch):
    prefix = words(77, 30)
    requests = [dataclasses.replace(one, prefix=prefix) for one in REQUESTS]
    shared = engine.generate(requests, strategy, max_new_tokens=6, batch_size=3)
    with_sharing = list(shared)
    monkeypatch.setattr("flexmask.engine.batch_runner.common_prefix_length", lambda layouts: 0)
    monkeypatch.setattr(SpanFinder, "spans_of", lambda _, layouts: [()] * len(layouts))
    plain = engine.generate(requests, strategy, max_new_tokens=6, batch_size=3)
    assert list(plain) == with_sharing
    assert plain.stats.computed_tokens == plain.stats.prompt_tokens - len(requests)
    copies = sum(len(one.segments) for one in requests) if strategy == EnsembleIsolation() else 7
    saved = plain.stats.computed_tokens - shared.stats.computed_tokens
    assert saved >= 31 * (copies - 1)


def test_prompts_that_are_all_the_same_are_computed_once(engine):
    requests = [request(3, 1, 40)] * 8
    results = engine.generate(requests, Causal(), max_new_tokens=4, batch_size=3)
    generations = list(results)
    assert results.stats.computed_tokens == generations[0].prompt_tokens - 1
    alone = engine.generate(requests[:1], Causal(), max_new_tokens=4, batch_size=3)
    assert {one.token_ids for one in generations} == {one.token_ids for one in alone}


def test_copies_at_other_positions_are_not_shared(engine):
    requests = [dataclasses.replace(one, prefix=words(77, 30)) for one in REQUESTS[:3]]
    strategy = EnsembleIsolation(positions="sequential")
    results = engine.generate(requests, strategy, max_new_tokens=2, batch_size=3)
    assert len(list(results)) == 3
    layouts = [strategy.layout(RequestTokenizer(engine.tokenizer)(one)) for one in requests]
    prompt_tokens = sum(map(len, layouts)) - 3
    assert results.stats.computed_tokens == prompt_tokens - 2 * 31


def test_an_end_of_sequence_token_ends_its_row_only(engine, monkeypatch):
    tokens = run(engine)
    ending = tokens[2].token_ids[1]
    config = copy.copy(engine.model.generation_config)
    config.eos_token_id = [2, ending]
    monkeypatch.setattr(engine.model, "generation_config", config)
    ended = run(engine)
    first = tokens[2].token_ids.index(ending)
    assert ended[2].token_ids == tokens[2].token_ids[: first + 1]
    assert ended[2].finish_reason == "eos"
    assert f"t{ending}" not in ended[2].text.split()
    for before, after in zip(tokens, ended, strict=True):
        if ending not in before.token_ids:
            assert after == before


def test_a_stop_string_ends_its_row_and_is_left_out(engine):
    tokens = run(engine)
    word = tokens[1].text.split()[2]
    stopped = run(engine, stop=[word])[1]
    assert stopped.finish_reason == "stop"
    assert word not in stopped.text
    assert tokens[1].text.startswith(stopped.text)


def test_without_an_ending_a_row_stops_at_its_length(engine):
    assert {g.finish_reason for g in run(engine, max_new_tokens=1)} <= {"length", "eos"}
    assert all(len(g.token_ids) == 1 for g in run(engine, max_new_tokens=1))


def test_sampling_depends_on_seed_and_request_alone(engine):
    hot = Sampling(temperature=2.0, top_k=50, top_p=0.9, seed=1)
    whole = run(engine, sampling=hot)
    assert run(engine, list(reversed(REQUESTS)), sampling=hot, batch_size=5)[0] == whole[-1]
    assert run(engine, sampling=Sampling(temperature=2.0, seed=2)) != whole
    assert run(engine) != whole


def test_sampling_follows_the_probabilities():
    logits = torch.tensor([[0.5, 0.3, 0.2]]).log().expand(2000, 3)
    uuids = [str(i) for i in range(2000)]
    sampler = Sampler(Sampling(temperature=1.0, seed=3), 2000, 1, torch.device("cpu"))
    sampler.load(range(2000), uuids)
    shares = (
        torch.bincount(sampler(logits, torch.zeros(2000, 1, dtype=torch.long))[:, 0], minlength=3)
        / 2000
    )
    torch.testing.assert_close(shares, torch.tensor([0.5, 0.3, 0.2]), atol=0.04, rtol=0)


def test_top_k_of_one_is_greedy(engine):
    assert run(engine, sampling=Sampling(temperature=1.5, top_k=1)) == run(engine)


def test_no_requests_give_no_results(engine):
    assert run(engine, []) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_new_tokens": 0}, "max_new_tokens must be positive, got 0"),
        ({"batch_size": 0}, "batch_size must be positive, got 0"),
        ({"stop": [""]}, "a stop string must not be empty"),
    ],
)
def test_an_impossible_option_is_named(engine, options, message):
    with pytest.raises(OptionError, match=message):
        run(engine, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stop": "END"}, "stop must be a list of texts, got the text 'END'; put it into one"),
        ({"sampling": 0.7}, "sampling must be a Sampling, got 0.7; write Sampling"),
        ({"requests": ["hello"]}, "requests must be a list of Request, got 'hello' in it; write"),
        ({"requests": REQUESTS[0]}, "requests must be a list of Request, got a single one"),
    ],
)
def test_an_argument_of_another_type_is_a_type_error_of_one_sentence(engine, options, message):
    with pytest.raises(TypeError, match=message):
        run(engine, **options)


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ({"temperature": -1.0}, "temperature must not be negative, got -1.0"),
        ({"top_k": -2}, "top_k must not be negative, got -2"),
        ({"top_p": 0.0}, "top_p must be above 0 and at most 1, got 0.0"),
    ],
)
def test_impossible_sampling_is_named(option, message):
    with pytest.raises(OptionError, match=message):
        Sampling(**option)


def test_a_prompt_beyond_the_context_names_its_request(engine):
    long = Request((words(1, 252),), uuid="long")
    with pytest.raises(RequestError, match=r"request 'long': needs positions up to 259.*256"):
        run(engine, [long])


def test_segments_together_may_exceed_the_context_when_positions_restart(engine):
    wide = Request(tuple(words(i, 80) for i in range(5)), suffix="t9", uuid="wide")
    (generation,) = run(engine, [wide], max_new_tokens=2)
    assert generation.prompt_tokens > SHAPE["max_position_embeddings"]


def test_a_missing_chat_template_is_an_error(engine):
    with pytest.raises(ModelError, match="no chat template"):
        run(engine, chat_template=True)


def test_a_chat_template_wraps_prefix_and_suffix(tokenizer):
    chat = copy.deepcopy(tokenizer)
    chat.chat_template = (
        "<bos> t50 {% for m in messages %}{{ m['content'] }}{% endfor %} t51"
        "{% if add_generation_prompt %} t52{% endif %}"
    )
    plain = Request(("t7 t8", "t6"), prefix="t4 ", suffix=" t9", uuid="a")
    tokenized = RequestTokenizer(chat, chat_template=True)(plain)
    assert tokenized.prefix == (1, 50, 4)
    assert tokenized.segments == ((7, 8), (6,))
    assert tokenized.tail == (9, 51, 52)


def test_the_prefix_begins_with_the_beginning_of_sequence_token(tokenizer):
    tokenized = RequestTokenizer(tokenizer)(Request(("t7 t8",), uuid="a"))
    assert tokenized.prefix == (1,)


MARKED = [
    Request(("t4 <eos> t5", "t6"), suffix="t9", uuid="a"),
    Request(("t4 t5", "t6 t7"), suffix="t9", uuid="b"),
    Request(("t4", "t6 <pad>"), prefix="<bos>", suffix="t9", uuid="c"),
]


@pytest.mark.parametrize("fusion", ["attention", "each", "mean"])
def test_a_warning_counts_the_requests_that_hold_the_text_of_a_special_token(engine, fusion):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        run(engine, MARKED, fusion=fusion)
    (line,) = [str(each.message) for each in caught if each.category is FlexMaskWarning]
    assert line.startswith("2 requests hold the text of a special token, such as '<eos>', which")
    with warnings.catch_warnings():
        warnings.simplefilter("error", FlexMaskWarning)
        run(engine, MARKED, fusion=fusion, allow_special_tokens=True)
        run(engine, MARKED[1:2], fusion=fusion)


def test_a_request_with_tokens_beyond_the_embeddings_is_refused_alone(tokenizer):
    larger = copy.deepcopy(tokenizer)
    larger.add_tokens(["<think>"])
    engine = Engine(make_model("llama", "flexmask"), larger)
    bad = Request(("t4 t5", "t6 <think>"), suffix="t9", uuid="bad")
    message = "request 'bad': segment 2 has token 211 .'<think>'., but the model knows tokens 0"
    with pytest.raises(RequestError, match=message):
        engine.generate([bad], "causal")
    refused = []
    results = engine.generate(
        [bad, *MARKED[1:2]], "causal", on_refused=lambda request, error: refused.append(request)
    )
    assert refused == [bad]
    assert results.stats.batch_size == 1


def test_out_of_memory_halves_the_batch_and_loses_no_row(engine, monkeypatch):
    expected = run(engine)
    prefill, sizes = engine.runner.prefill, []

    def prefill_with_little_memory(plan):
        sizes.append(len(plan.rows))
        if len(plan.rows) > 3:
            raise torch.cuda.OutOfMemoryError("out of memory")
        return prefill(plan)

    monkeypatch.setattr(engine.runner, "prefill", prefill_with_little_memory)
    results = engine.generate(REQUESTS, EnsembleIsolation(), max_new_tokens=6, batch_size=6)
    with pytest.warns(FlexMaskWarning, match="out of memory: 6 rows at a time become 3"):
        assert list(results) == expected
    assert sizes == [6, 3, 3, 1]
    assert (results.stats.batch_size, results.stats.halvings) == (3, 1)


@pytest.fixture
def set_free(engine, monkeypatch):
    """Says how much memory is free, in rows of 640 slots."""

    def set_free(rows):
        free = int(rows * engine.runner.bytes_per_row(640))
        monkeypatch.setattr("flexmask.engine.ranks.free_bytes", lambda device: free)
        engine.release()

    return set_free


BEYOND = {"max_new_tokens": 6, "batch_size": 2**31 - 1}


def test_a_batch_beyond_the_memory_of_the_host_is_halved_before_it_is_made(engine, set_free):
    expected = run(engine)
    set_free(3.5)
    read = []

    def requests():
        for number in range(1000):
            read.append(number)
            yield dataclasses.replace(REQUESTS[number % 7], uuid=f"row{number}")

    results = engine.generate(requests(), EnsembleIsolation(), **BEYOND)
    with pytest.warns(FlexMaskWarning, match="out of memory: 2147483647 rows at a time become 3"):
        assert [next(results) for _ in REQUESTS] == expected
    assert (results.stats.batch_size, results.stats.halvings) == (3, 29)
    assert len(read) <= 2 * 3 * 16


def test_a_row_beyond_the_memory_of_the_host_is_refused(engine, set_free):
    set_free(0.1)
    with (
        pytest.warns(FlexMaskWarning, match="2147483647 rows at a time become 1"),
        pytest.raises(ModelError, match="not enough memory for one row of 640 slots; shorten"),
    ):
        run(engine, **BEYOND)
    with pytest.raises(ModelError, match="one row of 2176 slots; lower prompt_tokens"):
        engine.warm_up(Causal(), prompt_tokens=2000)


def test_a_cpu_that_cannot_allocate_halves_the_batch(engine, monkeypatch):
    """Without Linux nothing tells what is available; then the allocator does."""
    monkeypatch.setattr("flexmask.engine.ranks.free_bytes", lambda device: None)
    prefill = engine.runner.prefill

    def prefill_with_little_memory(plan):
        if len(plan.rows) > 3:
            torch.empty(2**60, dtype=torch.uint8)
        return prefill(plan)

    expected = run(engine)
    monkeypatch.setattr(engine.runner, "prefill", prefill_with_little_memory)
    with pytest.warns(FlexMaskWarning, match="out of memory: 6 rows at a time become 3"):
        assert run(engine, batch_size=6) == expected


def test_warming_up_makes_no_more_rows_than_fit(engine, set_free):
    engine.warm_up(Causal(), prompt_tokens=100, max_new_tokens=6, batch_size=3)
    set_free(3.5)
    with pytest.warns(FlexMaskWarning, match="2147483647 rows at a time become 3"):
        stats = engine.warm_up(Causal(), prompt_tokens=100, **BEYOND)
    assert (stats.batch_size, stats.generations) == (3, 3)


def test_warming_up_stays_in_the_context(engine):
    message = "a prompt of 9999 tokens needs positions up to .* but the model's context is"
    with pytest.raises(OptionError, match=message):
        engine.warm_up(Causal(), prompt_tokens=9999, num_segments=1)


@pytest.fixture
def overlapping(engine, monkeypatch):
    """A run as on a GPU, which works on prompts while the host hands out those before them."""
    prefill, events = engine.runner.prefill, []

    def noted_prefill(plan):
        events.append("prefill")
        return prefill(plan)

    monkeypatch.setattr(engine.runner, "prefill", noted_prefill)
    results = engine.generate(REQUESTS, EnsembleIsolation(), max_new_tokens=6, batch_size=3)
    return as_on_gpu(results), events


def test_generations_are_handed_out_when_the_next_prompts_have_started(engine, overlapping):
    results, events = overlapping
    for batch in results.batches():
        events.append(len(batch))
    assert events == ["prefill", "prefill", "prefill", 3, 3, 1]


def test_prompts_that_are_started_ahead_give_the_same(engine, overlapping):
    results, _ = overlapping
    assert list(results) == run(engine)


def test_a_start_that_fails_takes_no_finished_generation_with_it(engine, overlapping, monkeypatch):
    results, _ = overlapping
    batches = results.batches()
    runner, calls = results._scheduler._runner, []
    runner._steps_ahead, start = 0, runner.start

    def fail_at_the_third(groups):
        calls.append(groups)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return start(groups)

    monkeypatch.setattr(runner, "start", fail_at_the_third)
    assert len(next(batches)) == 3
    with pytest.raises(KeyboardInterrupt):
        next(batches)


def test_a_row_too_large_for_the_memory_says_so(engine, monkeypatch):
    def prefill_without_memory(plan):
        raise torch.cuda.OutOfMemoryError("out of memory")

    monkeypatch.setattr(engine.runner, "prefill", prefill_without_memory)
    with pytest.raises(ModelError, match="not enough memory for one row of 640 slots"):
        run(engine, batch_size=1)


def test_the_longest_prompts_run_first_and_rows_finish_by_batch(engine):
    results = engine.generate(REQUESTS, EnsembleIsolation(), max_new_tokens=2, batch_size=3)
    batches = [[g.prompt_tokens for g in batch] for batch in results.batches()]
    assert [len(batch) for batch in batches] == [3, 3, 1]
    assert min(batches[0]) >= max(batches[1])
    assert min(batches[1]) >= batches[2][0]


@pytest.mark.usefixtures("without_inductor")
def test_a_longer_prompt_later_on_gets_a_larger_cache(engine, monkeypatch):
    monkeypatch.setattr("flexmask.engine.engine.LOOKAHEAD_BATCHES", 1)
    long = Request(tuple(words(i, 110) for i in range(5)), suffix="t9", uuid="long")
    results = engine.generate([REQUESTS[0], long], EnsembleIsolation(), batch_size=1)
    assert results.stats.capacity == 640
    assert [g.request.uuid for g in results] == ["row0", "long"]
    assert results.stats.capacity == 1152


def test_requests_are_read_some_batches_ahead_and_no_further(engine, monkeypatch):
    monkeypatch.setattr("flexmask.engine.engine.LOOKAHEAD_BATCHES", 1)
    read = []

    def requests():
        for number in range(1000):
            read.append(number)
            yield dataclasses.replace(REQUESTS[1], uuid=str(number))

    results = engine.generate(requests(), "causal", max_new_tokens=1, batch_size=3)
    assert next(results).request.uuid == "0"
    assert len(read) <= 6


@pytest.mark.gpu
def test_memory_that_the_cache_holds_counts_as_free_for_the_next_run(models, tokenizer):
    engine = Engine(models("llama", "flexmask", "cuda"), tokenizer)
    cache = engine.runner.cache
    free, _ = torch.cuda.mem_get_info()
    capacity = free // (2 * 40 * cache.bytes_per_row(1))
    assert engine.executor.auto_batch_size(100, capacity) == 32
    cache.bind(32, capacity)
    assert engine.executor.auto_batch_size(100, capacity) == 32
    cache.bind(0, 0)  # torch keeps the memory
    assert engine.executor.auto_batch_size(100, capacity) == 32
    torch.cuda.empty_cache()
