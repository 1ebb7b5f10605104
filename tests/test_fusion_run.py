"""Result files of runs whose prompts are fused after the model, or not at all."""

import json
from typing import Any

import pytest

from flexmask.fusion import FUSIONS, Fusion
from flexmask.inputs.input_files import open_input
from flexmask.results.dataset_run import DatasetRun
from flexmask.results.result_writer import ResultWriter, read_finished_rows
from flexmask.results.run_config import RunConfig
from flexmask.sampling import Sampling
from flexmask.tasks.judge import Judge
from flexmask.tasks.request_source import PlainRequests, RequestSource
from flexmask_strategies.ensemble_isolation import EnsembleIsolation
from oracles import SHAPE, random_text_request, random_words

CONFIG = RunConfig(run={"fusion": "of this test"})
SIZES = (3, 1, 4, 2, 4, 3)


@pytest.fixture
def source_of(tmp_path):
    path = tmp_path / "requests.jsonl"

    def get(fusion, texts=()):
        rows = []
        for seed, size in enumerate(SIZES):
            request = random_text_request(seed, size, length=5 + 3 * seed)
            segments = (
                [*request.segments[:-1], *texts] if texts and seed == 2 else request.segments
            )
            more = {"weights": range(1, len(segments) + 1), "answers": ["t5"]}
            rows.append({**vars(request), "segments": segments, **more})
        path.write_text("".join(json.dumps(row, default=list) + "\n" for row in rows))
        make = PlainRequests(reads_weights=fusion.weights == "column")
        return RequestSource(open_input(str(path)), make, on_error="skip", fusion=fusion)

    return get


def write(engine, source, output, mode="new", batches=None, **options):
    """Generate for what is left; ``batches`` is after how many the run is interrupted."""
    with ResultWriter.open(
        output, config=CONFIG, requests=source, fusion=source.fusion, mode=mode
    ) as writer:
        options = {"max_new_tokens": 4, "batch_size": 5} | options
        run = DatasetRun.generating(
            engine, EnsembleIsolation(), writer, on_error="skip", **options
        )
        for number, _ in enumerate(run.batches(lambda: False), start=1):
            if number == batches:
                raise KeyboardInterrupt
    return read_finished_rows(output)


@pytest.mark.parametrize(
    "fusion",
    [
        *(
            Fusion(name, "column" if name.startswith("weighted") else None)
            for name in FUSIONS
            if name not in ("attention", "self_consistency")
        ),
        *(Fusion(name, samples=3) for name in ("attention", "self_consistency")),
    ],
    ids=str,
)
def test_an_interrupted_run_is_completed_to_the_file_of_an_undisturbed_one(
    engine, source_of, tmp_path, fusion
):
    source = source_of(fusion)
    sampling = Sampling(temperature=float(fusion.samples > 1))
    whole = write(engine, source, tmp_path / "whole.feather", sampling=sampling)
    output = tmp_path / "out.feather"
    with pytest.raises(KeyboardInterrupt):
        write(engine, source, output, batches=1, sampling=sampling)
    kept = read_finished_rows(output.with_name("out.feather.partial"))
    assert 0 < kept.num_rows < whole.num_rows
    assert write(engine, source, output, "resume", sampling=sampling).equals(whole)
    samples = fusion.samples if fusion.has_sample_rows else 1
    counts = [samples * size for size in (SIZES if fusion.name == "each" else (1,) * len(SIZES))]
    if fusion.has_sample_rows:
        assert whole["sample"].to_pylist() == [*range(samples)] * (len(whole) // samples)
        assert len(set(whole["generation"].to_pylist())) > len(whole) // samples
    else:
        assert "sample" not in whole.column_names
    uuids = [f"row{n}" for n, count in enumerate(counts) for _ in range(count)]
    assert whole["uuid"].to_pylist() == uuids


def test_a_prompt_too_long_fails_its_own_row_or_its_request_where_they_are_fused(
    engine, source_of, tmp_path
):
    long = random_words(9, SHAPE["max_position_embeddings"])
    each = write(engine, source_of(Fusion("each"), [long]), tmp_path / "each.feather")
    failed = [row for row in each.to_pylist() if row["error"]]
    assert [(row["uuid"], row["segment"], row["correct"]) for row in failed] == [
        ("row2", 4, False)
    ]
    assert "requests.jsonl:3, segment 4: needs positions up to" in failed[0]["error"]
    mean = write(engine, source_of(Fusion("mean"), [long]), tmp_path / "mean.feather")
    failed = [row for row in mean.to_pylist() if row["error"]]
    assert [(row["uuid"], row["segment"]) for row in failed] == [("row2", None)]
    assert len(failed[0]["paraphrases"]) == 4
    again = write(engine, source_of(Fusion("each"), ["t4 t5"]), tmp_path / "again.feather")
    resumed = source_of(Fusion("each"), ["t4 t5"])
    assert again["error"].null_count == again.num_rows
    assert write(engine, resumed, tmp_path / "again.feather", "resume").equals(again)


def test_a_vote_counts_answers_as_the_judge_cuts_them(engine, source_of, tmp_path):
    source = source_of(Fusion("vote"))
    seen = []

    class Recording(Judge):
        def prediction(self, generation):
            seen.append(generation.request.uuid)
            return super().prediction(generation)

    output = tmp_path / "out.feather"
    with ResultWriter.open(
        output, config=CONFIG, requests=source, fusion=source.fusion, judge=Recording()
    ) as writer:
        options: dict[str, Any] = {"max_new_tokens": 1, "batch_size": 5}
        for _ in DatasetRun.generating(engine, EnsembleIsolation(), writer, **options).batches(
            lambda: False
        ):
            pass
    rows_of = {f"row{n}": size + 1 for n, size in enumerate(SIZES)}  # the votes, and the row
    assert {uuid: seen.count(uuid) for uuid in seen} == rows_of
