"""Evaluates the demo model on one paraphrase of a question, and on several in one prompt.

Prompts, dense masks and decoding are implemented here and share no code with the engine.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from demo_model.corpus import encode
from demo_model.world import Question

# Segment ids of tokens that belong to no segment.
TAIL = -1
PADDING = -2


@dataclass(frozen=True)
class Arrangement:
    """A way to put several paraphrases into one prompt.

    Attributes:
        name: Name in the table.
        segments: Number of paraphrases.
        is_isolated: Whether each has its own copy of the prefix and sees nothing else; otherwise
            the prefix comes first and the mask is causal.
        restarts_positions: Whether the positions of each isolated segment start at 0.
    """

    name: str
    segments: int
    is_isolated: bool
    restarts_positions: bool


SINGLE = Arrangement("1 paraphrase", 1, True, True)
ARRANGEMENTS = (
    Arrangement("3 isolated, positions restart", 3, True, True),
    Arrangement("5 isolated, positions restart", 5, True, True),
    Arrangement("5 isolated, positions consecutive", 5, True, False),
    Arrangement("5 concatenated", 5, False, False),
)


@dataclass(frozen=True)
class Prompt:
    """Tokens of a prompt with the segment (or ``TAIL``) and the position of each."""

    token_ids: tuple[int, ...]
    segment_ids: tuple[int, ...]
    position_ids: tuple[int, ...]


def arrange(
    question: Question, arrangement: Arrangement, tokenizer: PreTrainedTokenizerFast
) -> Prompt:
    """Lay out a question's prefix, first segments and suffix.

    Example: prefix ``p``, segments of 2 and 1 tokens and a suffix of 1, isolated with restarted
    positions::

        token_ids     p a a p b t
        segment_ids   0 0 0 1 1 TAIL
        position_ids  0 1 2 0 1 3
    """
    prefix = [tokenizer.bos_token_id, *encode(tokenizer, question.prefix)]
    texts = question.segments[: arrangement.segments]
    if arrangement.is_isolated:
        segments = [prefix + encode(tokenizer, text) for text in texts]
    else:
        segments = [prefix + encode(tokenizer, "\n".join(texts))]
    suffix = encode(tokenizer, question.suffix)
    token_ids = [token for segment in segments for token in segment]
    if arrangement.restarts_positions:
        positions = [position for segment in segments for position in range(len(segment))]
    else:
        positions = list(range(len(token_ids)))
    tail_start = max(positions) + 1
    segment_ids = [index for index, segment in enumerate(segments) for _ in segment]
    return Prompt(
        (*token_ids, *suffix),
        (*segment_ids, *(TAIL for _ in suffix)),
        (*positions, *range(tail_start, tail_start + len(suffix))),
    )


def dense_mask(segment_ids: torch.Tensor) -> torch.Tensor:
    """Return an additive mask ``(B, 1, S, S)``: causal within a segment; the tail sees all."""
    index = torch.arange(segment_ids.shape[1], device=segment_ids.device)
    query, key = segment_ids[:, :, None], segment_ids[:, None, :]
    is_allowed = (query == key) | ((query == TAIL) & (key != PADDING))
    is_allowed = is_allowed & (index[:, None] >= index)
    lowest = torch.finfo(torch.float32).min
    mask = torch.zeros(is_allowed.shape, device=segment_ids.device)
    return mask.masked_fill(~is_allowed, lowest)[:, None]


@torch.no_grad()
def generate_greedily(
    model: LlamaForCausalLM, prompts: Sequence[Prompt], stop_id: int, max_new_tokens: int
) -> list[list[int]]:
    """Continue each prompt until ``stop_id``, without a cache: each token recomputes the row.

    Rows are padded on the right; generated tokens overwrite the padding.
    """
    lengths = torch.tensor([len(prompt.token_ids) for prompt in prompts])
    width = int(lengths.max()) + max_new_tokens
    token_ids = _pad((prompt.token_ids for prompt in prompts), width, 0)
    segment_ids = _pad((prompt.segment_ids for prompt in prompts), width, PADDING)
    position_ids = _pad((prompt.position_ids for prompt in prompts), width, 0)
    rows = torch.arange(len(prompts))
    is_running = torch.ones(len(prompts), dtype=torch.bool)
    for _ in range(max_new_tokens):
        used = int(lengths.max())
        hidden = model.model(
            input_ids=token_ids[:, :used].to(model.device),
            position_ids=position_ids[:, :used].to(model.device),
            attention_mask=dense_mask(segment_ids[:, :used].to(model.device)).to(model.dtype),
            use_cache=False,
        ).last_hidden_state
        last = hidden[rows.to(model.device), (lengths - 1).to(model.device)]
        token = model.lm_head(last).argmax(-1).cpu()
        is_running &= token != stop_id
        if not is_running.any():
            break
        token_ids[rows, lengths] = token
        segment_ids[rows, lengths] = TAIL
        position_ids[rows, lengths] = position_ids[rows, lengths - 1] + 1
        lengths += is_running
    starts = [len(prompt.token_ids) for prompt in prompts]
    return [
        row[start:end].tolist()
        for row, start, end in zip(token_ids, starts, lengths.tolist(), strict=True)
    ]


def _pad(rows: Iterable[tuple[int, ...]], width: int, value: int) -> torch.Tensor:
    return torch.tensor([[*row, *(value for _ in range(width - len(row)))] for row in rows])


def accuracy(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[Question],
    arrangement: Arrangement,
    batch_size: int = 40,
    max_new_tokens: int = 12,
) -> float:
    """Return the share of questions whose first generated line is an accepted answer."""
    (newline_id,) = encode(tokenizer, "\n")
    correct = 0
    for start in range(0, len(questions), batch_size):
        batch = questions[start : start + batch_size]
        prompts = [arrange(question, arrangement, tokenizer) for question in batch]
        generated = generate_greedily(model, prompts, newline_id, max_new_tokens)
        lines = [str(tokenizer.decode(token_ids)).strip() for token_ids in generated]
        correct += sum(
            line in question.answers for line, question in zip(lines, batch, strict=True)
        )
    return correct / len(questions)


def single_paraphrases(questions: Iterable[Question]) -> list[Question]:
    """Return each paraphrase of each question as a question of its own."""
    return [
        replace(question, segments=(segment,))
        for question in questions
        for segment in question.segments
    ]


def evaluate(
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    questions: Sequence[Question],
    clean_questions: Sequence[Question],
) -> dict[str, float]:
    """Return the accuracy of single paraphrases, without and with noise, and of several."""

    def measure(questions: Sequence[Question], arrangement: Arrangement) -> float:
        return accuracy(model, tokenizer, questions, arrangement)

    table = {
        "1 paraphrase without noise": measure(single_paraphrases(clean_questions), SINGLE),
        "1 paraphrase": measure(single_paraphrases(questions), SINGLE),
    }
    return table | {
        arrangement.name: measure(questions, arrangement) for arrangement in ARRANGEMENTS
    }
