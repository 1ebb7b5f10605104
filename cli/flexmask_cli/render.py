"""What commands print: tables for people, JSON for programs, warnings on stderr."""

from __future__ import annotations

import io
import json
import shutil
import sys
import traceback
import warnings
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flexmask.errors import FlexMaskWarning
from flexmask.fusion import FUSIONS
from flexmask.printable import WORDS, printable, printable_json
from flexmask_cli.streams import write_note, write_styled, write_text

if TYPE_CHECKING:
    from flexmask.bench.attention_timing import AttentionBench, Floor, Timing
    from flexmask.compare.table import CellResult
    from flexmask.doctor import Check
    from flexmask.engine import Engine, GenerationRun, RunStats
    from flexmask.engine.generation_rules import GenerationRules
    from flexmask.fusion import Fusion
    from flexmask.generation import Generation
    from flexmask.request import Request
    from flexmask.results.evaluation import Estimate
    from flexmask.results.result_writer import ResultSummary
    from flexmask.show.mask_picture import Picture
    from flexmask.show.picture_source import Subject
    from flexmask.strategy import Strategy
    from flexmask.tasks.judge import Judge
    from flexmask.tasks.request_source import BadRow

UNLIMITED = 1_000_000
"""A width in characters that no table reaches."""

CHECK_COLUMNS = 26
"""Room for the name of a check."""

ASCII_COLUMNS = 104
"""How wide a picture in plain characters may be: a character is twice as high as wide."""

SHOWN_ANSWERS = 8
"""How many generations `print_answers` is given."""


def print_table(rows: Sequence[Mapping[str, str]], wrapped: Collection[str]) -> None:
    """Print rows as aligned columns.

    A pipe or file gets one plain line a row, whatever its length. A terminal gets the columns
    in ``wrapped`` broken between words to fit; no cell is ever cut short.
    """
    from rich.console import Console  # here, because --help and --json need not wait for it
    from rich.table import Table

    if not rows:
        return
    table = Table(box=None, pad_edge=False)
    for name in rows[0]:
        table.add_column(name, no_wrap=name not in wrapped, overflow="fold")
    for row in rows:
        table.add_row(*(printable(cell, WORDS) for cell in row.values()))

    is_terminal = sys.stdout.isatty()
    written = io.StringIO()
    console = Console(
        file=written,
        force_terminal=is_terminal,
        markup=False,
        emoji=False,
        highlight=False,
    )
    needed = console.measure(table, options=console.options.update(width=UNLIMITED))
    console.width = max(console.width, needed.minimum) if is_terminal else needed.maximum
    console.print(table)
    write_styled(written.getvalue())


def print_json(value: Any) -> None:
    """Print JSON, indented."""
    write_styled(printable_json(json.dumps(value, indent=2)) + "\n")


def print_warnings(lines: Iterable[str]) -> None:
    """Print each line to stderr."""
    for line in lines:
        write_note(f"warning: {line}")


@contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Print each of flexmask's warnings once, in one line."""
    with warnings.catch_warnings():
        warnings.simplefilter("once", FlexMaskWarning)
        show = warnings.showwarning

        def print_or_show(
            message: Warning | str, category: type[Warning], *where: Any, **more: Any
        ) -> None:
            if issubclass(category, FlexMaskWarning):
                print_warnings([str(message)])
            else:
                show(message, category, *where, **more)

        warnings.showwarning = print_or_show
        yield


def print_passing(text: str) -> None:
    """Show on a terminal what is going on, until the next line is printed over it."""
    erase_rest = "\x1b[K"
    if sys.stdout.isatty():
        write_styled(f"{printable(text, WORDS)}{erase_rest}\r")


def print_note(line: str) -> None:
    """Print to stderr what is no warning and no result."""
    write_note(f"note: {line}")


def print_fault() -> None:
    """Print the traceback of the exception that is being handled to stderr."""
    for line in traceback.format_exc().splitlines():
        write_note(line)


def print_line(line: str) -> None:
    """Print a line."""
    write_text(line)


def print_figures(figures: Mapping[str, str | int | float]) -> None:
    """Print named figures, one a line."""
    width = max(map(len, figures))
    for name, value in figures.items():
        formats = {int: ",", float: ".4g", str: ""}
        text = format(value, formats[type(value)])
        write_text(f"{name.replace('_', ' '):{width}}  {text:>14}")


def print_check(check: Check) -> None:
    """Print the outcome of a check in a line; what to do stands in it."""
    state = {"ok": "ok", "warning": "warn", "unavailable": "-", "broken": "BROKEN"}[check.state]
    advice = f"; {check.advice}" if check.advice else ""
    print_line(f"{state:6}  {check.name:<{CHECK_COLUMNS}}  {check.detail}{advice}")


def print_pictures(subject: Subject, pictures: Sequence[Picture], *, is_ascii: bool) -> None:
    """Print a request and its masks, to fit the window; into a pipe, in plain characters."""
    from rich.console import Console
    from rich.text import Text

    from flexmask.show.answer_text import answer_text
    from flexmask.show.prompt_text import prompt_text
    from flexmask.show.terminal import ascii_picture, block_picture

    is_ascii = is_ascii or not sys.stdout.isatty() or "utf" not in sys.stdout.encoding.lower()
    columns, lines = shutil.get_terminal_size()
    written = io.StringIO()
    console = Console(
        file=written,
        force_terminal=sys.stdout.isatty(),
        width=columns if sys.stdout.isatty() else UNLIMITED,
        color_system=None if is_ascii else "auto",
        soft_wrap=True,
        markup=False,
        emoji=False,
        highlight=False,
    )
    console.print(Text(printable(subject.heading, WORDS), "bold"))
    if subject.answer is not None:
        console.print(answer_text(subject.answer))
    for picture in pictures:
        console.print(Text(printable(picture.title, WORDS), "bold"))
        console.print(prompt_text(picture.tokens, columns))
        console.print(printable(picture.summary, WORDS))
        if is_ascii:
            console.print(ascii_picture(picture, min(columns, ASCII_COLUMNS)))
        else:
            is_coloured = console.color_system is not None and not console.no_color
            console.print(block_picture(picture, columns, lines, is_coloured=is_coloured))
    write_styled(written.getvalue())


def print_notes(engine: Engine, strategy: Strategy, fusion: Fusion, run: GenerationRun) -> None:
    """Say on stderr what is about to run, and how."""
    model, kinds, stats = engine.model, engine.runner.layer_windows, run.stats
    layers = ", ".join(
        kind if window is None else f"{kind} (window {window})" for kind, window in kinds.items()
    )
    for line in (
        f"strategy: {strategy}",
        f"fusion: {fusion}, {FUSIONS[fusion.name]}",
        f"model: {type(model).__name__}, {model.dtype}, on {model.device}",
        f"attention: compiled FlexAttention; layers: {layers}",
        f"batches: {stats.batch_size} prompts of up to {stats.capacity} slots",
        *_rules_of_generation(run.rules),
    ):
        write_note(line)


def _rules_of_generation(rules: GenerationRules) -> Iterator[str]:
    """Effects of the model's generation config on this run."""
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


def print_kernels(engine: Engine) -> None:
    """Say on stderr what computed attention."""
    runner = engine.runner
    prefill = f"FlexAttention, {runner.prefill_kernel or 'C++'} kernel"
    decode = ", ".join(f"{kind}: {kernel}" for kind, kernel in runner.decode_kernels.items())
    if "decode_attention" in runner.decode_kernels.values() and runner.bound.key_table:
        decode += "; copies of what prompts begin with are read once"
    write_note(f"prefill: {prefill}")
    write_note(f"decode: {decode}")


def print_answers(generations: Sequence[Generation], judge: Judge) -> None:
    """Print what was answered, beside what is accepted."""
    from flexmask.tasks.judge import is_exact_match

    rows = []
    for generation in generations:
        request = generation.request
        prediction = judge.prediction(generation)
        row = {"question": request.segments[0], "prediction": prediction}
        if request.answers:
            is_right = is_exact_match(prediction, request.answers)
            row |= {"accepted": ", ".join(request.answers), "": "✓" if is_right else "✗"}
        rows.append({name: " ".join(text.split()) for name, text in row.items()})
    columns = list(dict.fromkeys(name for row in rows for name in row))
    rows = [{name: row.get(name, "") for name in columns} for row in rows]
    print_table(rows, wrapped=["question", "prediction", "accepted"])


def print_prompt(request: Request | BadRow, weight: float | None = None) -> None:
    """Print the texts of a prompt, each between tags; control characters show as escapes."""
    from flexmask.tasks.request_source import BadRow

    uuid = printable(request.uuid, WORDS)
    if isinstance(request, BadRow):
        write_text(f"== {uuid}\nfailed: {printable(request.error, WORDS)}\n")
        return
    alone = "" if request.segment is None else f", segment {request.segment}"
    weighted = "" if weight is None else f", weight {weight:g}"
    lines = [f"== {uuid}{alone}{weighted} ({printable(request.source, WORDS)})"]
    parts = [("prefix", request.prefix), ("suffix", request.suffix)]
    segments = enumerate(request.segments, start=request.segment or 1)
    parts[1:1] = [(f"segment {number}", text) for number, text in segments]
    lines += [f"<{name}>{text}</{name}>" for name, text in parts]
    if request.answers:
        lines.append(f"accepted: {' | '.join(request.answers)}")
    write_text("\n".join([*lines, ""]))


def print_stats(stats: RunStats, fusion: Fusion) -> None:
    """Print what the run did and how fast."""
    lines = [
        f"fusion: {fusion}",
        f"rows: {stats.generations} generated",
        f"tokens: {stats.generated_tokens} generated after {stats.prompt_tokens} of prompts "
        f"({stats.computed_tokens} computed, the others copied), "
        f"{stats.tokens_per_s:.1f} tokens/s",
        f"time: prefill {stats.prefill_s:.2f} s, decode {stats.decode_s:.2f} s",
        f"compilations: {stats.compilations}, of them {stats.warm_compilations} after the "
        "first batch",
        f"block masks: {stats.mask_hits} found in the cache, {stats.mask_misses} built",
    ]
    if stats.decode_peak_bytes:
        prefill, decode = stats.prefill_peak_bytes / 1e9, stats.decode_peak_bytes / 1e9
        lines.append(f"peak memory: prefill {prefill:.1f} GB, decode {decode:.1f} GB")
    if stats.halvings:
        lines.append(f"out of memory: batches halved {stats.halvings} times, no row lost")
    write_text("\n".join(["", *lines]))


def print_outcome(path: Path, results: ResultSummary, judge: Judge) -> None:
    """Print what the result file holds, and how right it is."""
    from flexmask.results.evaluation import estimate_mean, scores_by_question
    from flexmask.results.result_writer import read_finished_rows

    if results.judged:
        rows = read_finished_rows(path).select(["uuid", "correct", "score"]).drop_null()
        uuids, correct, scores = rows.to_pydict().values()
        exact = estimate_mean(scores_by_question(uuids, correct).values())
        of = "" if len(uuids) == len(set(uuids)) else ", each question counted once"
        write_text(f"accuracy: {percent(exact)} ({results.correct} of {results.judged} exact{of})")
        if judge.metric != "exact":
            estimate = estimate_mean(scores_by_question(uuids, scores).values())
            write_text(f"{judge.metric}: {percent(estimate)}")
    if results.failed:
        write_text(
            f"failed: {results.failed} rows; the column 'error' says why, --resume tries again"
        )
    write_text(f"{results.rows} rows in {path}")


def print_comparison(results: Sequence[CellResult]) -> None:
    """Print what came of each cell of a comparison."""
    rows = [_comparison_row(result) for result in results]
    used = [name for name in rows[0] if any(row[name] for row in rows)]
    print_table([{name: row[name] for name in used} for row in rows], wrapped=["what"])
    for result in results:
        if result.cell.same:
            write_text(f"{result.cell.title} is also {', '.join(result.cell.same)}")
    for result in results:
        if result.error:
            print_warnings([f"{result.cell.title} failed: {result.error}"])


def _comparison_row(result: CellResult) -> dict[str, str]:
    figures = result.figures()

    def number(name: str, form: str, factor: float = 1.0) -> str:
        return "" if figures[name] is None else format(figures[name] * factor, form)

    against = result.against_first
    return {
        "what": result.cell.name,
        "segments": result.cell.way.segments,
        "accuracy": percent(result.score) if result.score else "failed" if result.error else "",
        "against the first": percent(against.difference, sign="+") if against else "",
        "tokens/s": number("tokens_per_s", ",.0f"),
        "ms/question": number("ms_per_question", ",.1f"),
        "first token ms": number("first_token_ms", ",.1f"),
        "prompt tokens": number("prompt_tokens", ",.0f"),
        "computed": number("computed_tokens", ",.0f"),
        "peak GB": number("peak_bytes", ".2f", 1e-9),
    }


def print_attention_case(subject: Subject, strategy: Strategy, case: AttentionBench) -> None:
    """Print what `flexmask bench` measures."""
    from flexmask.show.mask_picture import strategy_title

    figures = case.figures()
    heads = figures["heads"]
    write_text(
        f"{strategy_title(strategy)}: {subject.heading}\n"
        f"{figures['tokens']:,} tokens, {figures['density']:.1%} of pairs allowed; "
        f"{heads['query']} query and {heads['key']} key heads of {heads['dim']}, "
        f"{figures['dtype']} on {figures['device']}\n",
    )


def print_attention_timings(timings: Sequence[Timing], floor: Floor) -> None:
    """Print what `flexmask bench` found."""
    rows = [_timing_row(timing, floor) for timing in timings]
    bound = "operations" if floor.compute_ms >= floor.read_ms else "memory"
    last = {
        "way": "floor",
        "ms": f"{floor.ms:.3f}",
        "note": f"{bound}; measured {floor.flops_per_s / 1e12:.3g} TFLOP/s, "
        f"{floor.bytes_per_s / 1e9:.3g} GB/s",
    }
    print_table([*rows, {name: last.get(name, "") for name in rows[0]}], wrapped=["note"])


def _timing_row(timing: Timing, floor: Floor) -> dict[str, str]:
    ms, error = timing.ms, timing.relative_error
    return {
        "way": timing.way,
        "ms": f"{ms.median:.3f}" if ms else "",
        "quartiles": f"{ms.low:.3f} to {ms.high:.3f}" if ms else "",
        "TFLOP/s": "" if timing.tflops is None else f"{timing.tflops:.3g}",
        "of the floor": f"{floor.ms / ms.median:.0%}" if ms else "",
        "relative error": "" if error is None else f"{error:.0e}",
        "note": timing.note,
    }


def percent(estimate: Estimate, sign: str = "") -> str:
    """A mean and its 95% interval, as ``81.0% [75.5, 86.5]``; ``sign`` may be ``+``."""
    low, high = (f"{100 * end:{sign}.1f}" for end in (estimate.low, estimate.high))
    return f"{100 * estimate.mean:{sign}.1f}% [{low}, {high}]"
