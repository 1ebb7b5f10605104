"""Prints what `score` shows: the chosen choices, and figures of a run."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from flexmask_cli.render.generation import questions_of, span_lines
from flexmask_cli.render.table import print_table
from flexmask_cli.streams import write_note, write_text

if TYPE_CHECKING:
    from flexmask.choice_scores import Score
    from flexmask.engine import Engine, RunStats
    from flexmask.fusion import Fusion
    from flexmask.tasks.judge import ChoiceJudge


def print_scores(scores: Sequence[Score], judge: ChoiceJudge) -> None:
    """Print questions, the chosen choices with their values and those after them, and answers."""
    rows = []
    has_answers = any(score.request.answer is not None for score in scores)
    questions = questions_of([score.request for score in scores])
    for score, question in zip(scores, questions, strict=True):
        values = [choice.value(judge.normalize) for choice in score.choices]
        chosen = score.chosen(judge.normalize)
        second = max(value for index, value in enumerate(values) if index != chosen)
        row = {
            "question": question,
            "chosen": score.request.choices[chosen],
            "value": f"{values[chosen]:.3f}",
            "next": f"{second:.3f}",
        }
        if has_answers:
            answer = score.request.answer
            mark = "" if answer is None else "✓" if chosen == answer else "✗"
            row |= {"right": "" if answer is None else score.request.choices[answer], "": mark}
        rows.append({name: " ".join(text.split()) for name, text in row.items()})
    print_table(rows, wrapped=["question", "chosen", "right"])


def print_score_stats(stats: RunStats, fusion: Fusion) -> None:
    """Print counts and times of a run."""
    rate = stats.computed_tokens / stats.prefill_s if stats.prefill_s else 0.0
    lines = [
        f"fusion: {fusion}",
        f"rows: {stats.generations} scored",
        f"tokens: {stats.prompt_tokens} of prompts; {stats.computed_tokens} computed with their "
        f"choices, {stats.copied_tokens} copied, {rate:.1f} computed/s",
        f"time: {stats.prefill_s:.2f} s in {stats.prefills} batches of up to {stats.batch_size} "
        "prompts",
        f"compilations: {stats.compilations}",
        f"block masks: {stats.mask_hits} found in the cache, {stats.mask_misses} built",
    ]
    lines += span_lines(stats)
    if stats.halvings:
        lines.append(f"out of memory: batches halved {stats.halvings} times, no row lost")
    write_text("\n".join(["", *lines]))


def print_prefill_kernel(engine: Engine) -> None:
    """Print the attention kernel that ran to stderr."""
    write_note(f"prefill: FlexAttention, {engine.runner.prefill_kernel or 'C++'} kernel")
