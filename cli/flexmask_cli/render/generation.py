"""Prints what `generate` shows: prompts, answers, counts and figures of a run."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexmask.printable import WORDS, printable
from flexmask_cli.option_names import OPTION_NAMES
from flexmask_cli.render.table import percent, print_table
from flexmask_cli.streams import write_note, write_text

if TYPE_CHECKING:
    from flexmask.engine import Engine, RunStats
    from flexmask.engine.generation_rules import GenerationRules
    from flexmask.fusion import Fusion
    from flexmask.generation import Generation
    from flexmask.request import Request
    from flexmask.results.evaluation import Estimate
    from flexmask.results.result_writer import ResultSummary
    from flexmask.strategy import Strategy
    from flexmask.tasks.judge import ChoiceJudge, Judge
    from flexmask.tasks.request_source import BadRow

SHOWN_ANSWERS = 8
"""Number of generations that are shown."""


def print_notes(engine: Engine, strategy: Strategy, fusion: str | None = None) -> None:
    """Print strategy, model, attention and cache of a run to stderr."""
    model, kinds = engine.model, engine.runner.layer_windows
    layers = ", ".join(
        kind if window is None else f"{kind} (window {window})" for kind, window in kinds.items()
    )
    for line in (
        f"strategy: {strategy}",
        *([] if fusion is None else [f"fusion: {fusion}"]),
        f"model: {type(model).__name__}, {model.dtype}, on {model.device}",
        f"attention: compiled FlexAttention; layers: {layers}",
        f"projections: {_projections(engine)}",
        *_notes_on_spans(engine),
    ):
        write_note(line)


def _notes_on_spans(engine: Engine) -> Iterator[str]:
    """Yield where keys and values can be reused, if the engine keeps any."""
    runner = engine.runner
    if runner.store is None:
        return
    where = "any position"
    if runner.fixed_position_reason is not None:
        where = f"the position of their first use only: {runner.fixed_position_reason}"
    yield f"keys and values of spans: reused at {where}"


def _projections(engine: Engine) -> str:
    """Return how many linear layers are fused on a GPU, and which are not, by their weights."""
    from flexmask.kernels.linear_weights import DENSE, ROUNDED, kinds_of_projections

    is_on_gpu = engine.model.device.type == "cuda"
    parts = []
    for (kind, is_readable), count in kinds_of_projections(engine.model).items():
        if kind == DENSE:
            parts.append(f"{count} fused" if is_on_gpu else f"{count} with dense weights")
        elif is_on_gpu and is_readable:
            parts.append(f"{count} fused, with weights in 8 bits ({kind}; prompts unpack them)")
        elif kind.startswith(ROUNDED):
            parts.append(f"{count} with weights in 8 bits ({kind}), unpacked for every product")
        else:
            parts.append(f"{count} not fused, since their weights are {kind}")
    return ", ".join(parts)


def print_rules(rules: GenerationRules, stats: RunStats) -> None:
    """Print batches, and the effects of the model's generation config on a run, to stderr."""
    write_note(f"batches: {stats.batch_size} prompts of up to {stats.capacity} slots")
    for line in _rules_of_generation(rules):
        write_note(line)


def _rules_of_generation(rules: GenerationRules) -> Iterator[str]:
    """Yield the effects of the model's generation config on this run."""
    endings = [*map(str, sorted(rules.eos_token_ids)), *map(repr, rules.stop_strings)]
    yield f"the model's generation config ends rows with: {', '.join(endings) or 'nothing'}"
    if rules.applied:
        yield f"the model's generation config applies: {', '.join(rules.applied)}"
    if rules.sampling is not None:
        values = ", ".join(f"{name}={value}" for name, value in rules.sampling.items())
        yield (
            f"the model's generation config would sample ({values or 'with its defaults'}); "
            "this run does as --temperature, --top-k and --top-p say"
        )


def print_kernels(engine: Engine, stats: RunStats) -> None:
    """Print the attention kernels that ran, and the shares of the floor, to stderr."""
    runner = engine.runner
    prefill = f"FlexAttention, {runner.prefill_kernel or 'C++'} kernel"
    decode = ", ".join(f"{kind}: {kernel}" for kind, kernel in runner.decode_kernels.items())
    if "decode_attention" in runner.decode_kernels.values() and runner.bound.key_table:
        decode += "; the shared prefix is read once"
    write_note(f"prefill: {prefill}")
    write_note(f"decode: {decode}")
    print_floor(engine, stats)


def print_floor(engine: Engine, stats: RunStats) -> None:
    """Measure the rates of this machine, and print the floor of a run at them to stderr."""
    from flexmask.bench.floors import ModelCost, Rates

    if not ModelCost.is_known(engine.model):
        write_note("floor: not known, as weights are packed, or a token uses some of them only")
        return
    ranks = engine.ranks.size
    cost = ModelCost.of(engine.model, ranks)
    engine.release()
    rates = Rates.measure(engine.model.device, engine.model.dtype)
    shares = cost.shares_of(stats, rates)
    times = {"prefill": stats.prefill_s, "decode": stats.decode_s}
    parts = [f"{share:.0%} of {times[name]:.2f} s of {name}" for name, share in shares.items()]
    compiling = " (graphs were compiled in it)" if stats.compilations else ""
    where = "" if ranks == 1 else f" of each of {ranks} ranks"
    write_note(
        f"floor: {', '.join(parts)}{compiling}; at {rates}{where}, attention's products left out"
    )


def print_answers(generations: Sequence[Generation], judge: Judge) -> None:
    """Print questions, predictions and accepted answers."""
    rows = []
    questions = questions_of([generation.request for generation in generations])
    for generation, question in zip(generations, questions, strict=True):
        request = generation.request
        prediction = judge.prediction(generation)
        row = {"question": question, "prediction": prediction}
        if request.answers:
            is_right = judge.score(prediction, request.answers) == 1
            row |= {"accepted": ", ".join(request.answers), "": "✓" if is_right else "✗"}
        rows.append({name: " ".join(text.split()) for name, text in row.items()})
    columns = list(dict.fromkeys(name for row in rows for name in row))
    rows = [{name: row.get(name, "") for name in columns} for row in rows]
    print_table(rows, wrapped=["question", "prediction", "accepted"])


def questions_of(requests: Sequence[Request]) -> list[str]:
    """Return the question of each request: its first segment, or its suffix.

    If segments are paraphrases of a question, all requests have the same suffix, such as ``A:``.
    If segments are documents, the question follows them, and suffixes differ. For a single
    request, a suffix with a question mark is the question.
    """
    suffixes = {request.suffix for request in requests}
    if len(suffixes) > 1 or any(mark in suffix for suffix in suffixes for mark in "?？؟"):
        return [request.suffix.strip() or request.segments[0] for request in requests]
    return [request.segments[0] for request in requests]


def print_prompt(request: Request | BadRow, weight: float | None = None) -> None:
    """Print the texts of a prompt, each between tags; control characters show as escapes."""
    from flexmask.tasks.request_source import BadRow

    uuid = printable(request.uuid, WORDS)
    if isinstance(request, BadRow):
        write_text(f"== {uuid}\nfailed: {printable(OPTION_NAMES.shown(request.error), WORDS)}\n")
        return
    alone = "" if request.segment is None else f", segment {request.segment}"
    weighted = "" if weight is None else f", weight {weight:g}"
    lines = [f"== {uuid}{alone}{weighted} ({printable(request.source, WORDS)})"]
    parts = [("prefix", request.prefix), ("suffix", request.suffix)]
    segments = enumerate(request.segments, start=request.segment or 1)
    parts[1:1] = [(f"segment {number}", text) for number, text in segments]
    lines += [f"<{name}>{text}</{name}>" for name, text in parts]
    choices = enumerate(request.choices)
    lines += [f"<choice {number}>{text}</choice {number}>" for number, text in choices]
    if request.answers:
        lines.append(f"accepted: {' | '.join(request.answers)}")
    write_text("\n".join([*lines, ""]))


def print_stats(stats: RunStats, fusion: Fusion) -> None:
    """Print counts, times and memory of a run."""
    lines = [
        f"fusion: {fusion}",
        f"rows: {stats.generations} generated",
        f"tokens: {stats.generated_tokens} generated after {stats.prompt_tokens} of prompts "
        f"({stats.computed_tokens} computed, {stats.copied_tokens} copied), "
        f"{stats.tokens_per_s:.1f} tokens/s",
        f"time: prefill {stats.prefill_s:.2f} s, decode {stats.decode_s:.2f} s, first token "
        f"{stats.first_token_s / max(1, stats.prefills):.2f} s after a prefill starts",
        f"batch: {stats.batch_size} rows, {stats.row_utilization:.0%} of them in use over "
        f"{stats.decode_steps} decode steps; {stats.prefills} prefills",
        f"compilations: {stats.compilations}, of them {stats.warm_compilations} after the "
        "first rows",
        f"block masks: {stats.mask_hits} found in the cache, {stats.mask_misses} built",
    ]
    lines += span_lines(stats)
    if stats.decode_peak_bytes:
        prefill, decode = stats.prefill_peak_bytes / 1e9, stats.decode_peak_bytes / 1e9
        lines.append(f"peak memory: prefill {prefill:.1f} GB, decode {decode:.1f} GB")
    if stats.halvings:
        lines.append(f"out of memory: batches halved {stats.halvings} times, no row lost")
    write_text("\n".join(["", *lines]))


def span_lines(stats: RunStats) -> list[str]:
    """Return the line on keys and values of spans, if a run kept or found some."""
    if not (stats.cached_spans or stats.kept_spans):
        return []
    found, kept = stats.cached_spans, stats.kept_spans
    return [f"keys and values of spans: {found} found, {kept} computed and kept"]


def print_outcome(path: Path, results: ResultSummary, judge: Judge | ChoiceJudge) -> None:
    """Print the number of rows in the result file, and its accuracy."""
    if results.judged:
        questions, estimates = _accuracy(path, judge)
        of = "" if questions == results.judged else ", each question counted once"
        exact = percent(estimates.pop("exact"))
        write_text(f"accuracy: {exact} ({results.correct} of {results.judged} exact{of})")
        for metric, estimate in estimates.items():
            write_text(f"{metric}: {percent(estimate)}")
    if results.failed:
        write_text(
            f"failed: {results.failed} rows; the column 'error' says why, --resume tries again"
        )
    write_text(f"{results.rows} rows in {path}")


def print_counts(path: Path, results: ResultSummary) -> None:
    """Print the number of rows in a merged file, of those that failed and of correct ones."""
    if results.judged:
        write_text(f"exact: {results.correct} of {results.judged}")
    if results.failed:
        write_text(f"failed: {results.failed} rows; the column 'error' says why")
    write_text(f"{results.rows} rows in {path}")


def outcome_figures(
    path: Path, results: ResultSummary, judge: Judge | ChoiceJudge, stats: RunStats | None
) -> dict[str, Any]:
    """Return what `print_outcome` and `print_stats` print, as JSON values.

    Args:
        path: The result file.
        results: Counts over its rows.
        judge: The judge that scored its answers.
        stats: Statistics of the run; None if there was nothing to generate.
    """
    _, estimates = _accuracy(path, judge) if results.judged else (0, {})
    run = None
    if stats is not None:
        rates = {name: getattr(stats, name) for name in ("tokens_per_s", "row_utilization")}
        run = {**vars(stats), **rates}
    return {
        "output": str(path),
        **asdict(results),
        "metrics": {name: asdict(estimate) for name, estimate in estimates.items()},
        "run": run,
    }


def _accuracy(path: Path, judge: Judge | ChoiceJudge) -> tuple[int, dict[str, Estimate]]:
    """Return the number of judged questions, and by metric the mean of their scores."""
    from flexmask.results.evaluation import estimate_mean, scores_by_question
    from flexmask.results.formats import open_rows

    found: dict[str, list[Any]] = {"uuid": [], "correct": [], "score": []}
    for batch in open_rows(path):
        judged = batch.filter(batch["correct"].is_valid())
        for name, values in found.items():
            values += judged[name].to_pylist()
    uuids, correct, scores = found.values()
    columns = {"exact": correct}
    if judge.metric != "exact":
        columns[judge.metric] = scores
    estimates = {
        name: estimate_mean(scores_by_question(uuids, values).values())
        for name, values in columns.items()
    }
    return len(set(uuids)), estimates
