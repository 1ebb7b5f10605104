r"""Makes the training data of the demo model: its tokenizer, and rows of packed pairs.

A pair is ``("Q: …\nA:", " answer\n\n")``. A row is ``<bos>``, as many whole pairs as fit, and
padding::

    <bos> Q: … A: answer Q: … A: answer <pad> <pad>
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import tokenizers
import torch
from numpy.typing import NDArray
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from demo_model.train_config import TrainConfig

BOS, EOS, PAD = "<bos>", "<eos>", "<pad>"
# Newlines and digits are always separate tokens, so that the pieces of a prompt, encoded apart,
# have the tokens of the whole.
SPLIT_PATTERN = r"\n|\p{N}|'s| ?\p{L}+| ?[^\s\p{L}\p{N}]+|[^\S\n]+(?!\S)|[^\S\n]"


@dataclass(frozen=True)
class EncodedPairs:
    """Concatenated tokens of all pairs.

    Example: pairs of 3 and 2 tokens have ``lengths`` ``[3, 2]``; ``token_ids`` holds 5.
    """

    token_ids: NDArray[np.int64]
    is_answer: NDArray[np.bool_]
    lengths: NDArray[np.int64]


def train_tokenizer(
    texts: Iterator[str], vocab_size: int, max_length: int
) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE that encodes any text and puts ``<bos>`` before it."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(tokenizers.Regex(SPLIT_PATTERN), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    bpe.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[BOS, EOS, PAD],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A",
        pair=f"{BOS} $A {BOS} $B",
        special_tokens=[(BOS, bpe.token_to_id(BOS))],
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
    )


def encode(tokenizer: PreTrainedTokenizerFast, text: str) -> list[int]:
    """Return the token ids of ``text`` without ``<bos>``."""
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def encode_pairs(
    tokenizer: PreTrainedTokenizerFast, pairs: Sequence[tuple[str, str]]
) -> EncodedPairs:
    """Encode ``(question, answer)`` pairs, each part separately (with the same tokens)."""
    texts = [text for pair in pairs for text in pair]
    encoded = tokenizer(texts, add_special_tokens=False, return_attention_mask=False)["input_ids"]
    part_lengths = np.fromiter(map(len, encoded), np.int64, len(encoded))
    token_ids = np.fromiter((i for part in encoded for i in part), np.int64, part_lengths.sum())
    is_answer = np.repeat(np.arange(len(encoded)) % 2 == 1, part_lengths)
    return EncodedPairs(token_ids, is_answer, part_lengths.reshape(-1, 2).sum(1))


def pack_rows(
    pairs: EncodedPairs,
    order: NDArray[np.int64],
    config: TrainConfig,
    bos_id: int,
    pad_id: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Fill rows with ``<bos>`` and whole pairs, in ``order``.

    Returns:
        Token ids and loss weights, each ``(rows, row_tokens)``; padding has weight 0.
    """
    lengths = pairs.lengths[order]
    rows, columns = _assign_rows(lengths.tolist(), config.row_tokens)
    offset = np.arange(lengths.sum()) - np.repeat(np.cumsum(lengths) - lengths, lengths)
    starts = np.cumsum(pairs.lengths) - pairs.lengths
    source = np.repeat(starts[order], lengths) + offset
    target = np.repeat(rows, lengths), np.repeat(columns, lengths) + offset
    token_ids = np.full((rows[-1] + 1, config.row_tokens), pad_id, np.int64)
    token_ids[:, 0] = bos_id
    token_ids[target] = pairs.token_ids[source]
    weights = np.zeros(token_ids.shape, np.float32)
    weights[target] = np.where(pairs.is_answer[source], 1.0, config.question_loss_weight)
    return torch.from_numpy(token_ids), torch.from_numpy(weights)


def _assign_rows(
    lengths: list[int], row_tokens: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return row and first column of each pair; column 0 is for ``<bos>``."""
    starts = np.empty((len(lengths), 2), np.int64)
    row, column = 0, 1
    for index, length in enumerate(lengths):
        if column + length > row_tokens:
            row, column = row + 1, 1
        starts[index] = row, column
        column += length
    return starts[:, 0], starts[:, 1]


def make_batches(
    pairs: EncodedPairs, config: TrainConfig, bos_id: int, pad_id: int
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield batches ``(rows_per_step, row_tokens)`` indefinitely; each epoch has a new order."""
    rng = np.random.default_rng(config.seed)
    while True:
        order = rng.permutation(len(pairs.lengths))
        token_ids, weights = pack_rows(pairs, order, config, bos_id, pad_id)
        count = len(token_ids) // config.rows_per_step * config.rows_per_step
        if count == 0:
            raise ValueError(f"{config.pairs} pairs do not fill a batch; raise pairs")
        for start in range(0, count, config.rows_per_step):
            batch = slice(start, start + config.rows_per_step)
            yield token_ids[batch], weights[batch]
