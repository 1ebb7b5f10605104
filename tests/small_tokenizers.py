"""Small tokenizers of each kind that people's models have, trained on a few sentences."""

from __future__ import annotations

from collections.abc import Callable

from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from oracles import SHAPE

CORPUS = [
    "Answer in one word. Q: Where was Ada born? A: London",
    "Q: Ada's birthplace?\nA: London\nQ: x\nA:",
    "Only a < b > c | d / s _ im end eos user UNK SEP [INST] system 0 1 2 3",
] * 20

SPECIAL = ["<unk>", "<s>", "</s>", "<|im_start|>", "<|im_end|>"]


def _wrapped(backend: Tokenizer) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        clean_up_tokenization_spaces=False,
    )


def _sentencepiece_bpe(*, legacy: bool) -> PreTrainedTokenizerFast:
    """As converted from Llama 2 (legacy), or as Llama and Mistral have it since."""
    backend = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    if legacy:
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    special = [*SPECIAL, *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=620, special_tokens=special)
    backend.train_from_iterator(CORPUS, trainer)
    return _wrapped(backend)


def llama() -> PreTrainedTokenizerFast:
    """A ``Prepend`` normalizer; the decoder takes one space off."""
    return _sentencepiece_bpe(legacy=True)


def mistral() -> PreTrainedTokenizerFast:
    """A ``Metaspace`` pre-tokenizer that acts at the beginning alone."""
    return _sentencepiece_bpe(legacy=False)


def unigram() -> PreTrainedTokenizerFast:
    """A Unigram model, in whose vocabulary the special tokens stand, under ``Metaspace``."""
    backend = Tokenizer(models.Unigram())
    backend.pre_tokenizer = pre_tokenizers.Metaspace()
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=140,
        special_tokens=SPECIAL,
        unk_token="<unk>",
        initial_alphabet=[chr(code) for code in range(33, 127)] + ["\n", "▁"],
    )
    backend.train_from_iterator(CORPUS, trainer)
    return _wrapped(backend)


def words_with_spaces() -> PreTrainedTokenizerFast:
    """Words cut at spaces and given one each, the ends of a text stripped, as XLM-R has it."""
    backend = Tokenizer(models.Unigram())
    backend.normalizer = normalizers.Strip(left=False, right=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Metaspace()]
    )
    backend.decoder = decoders.Metaspace()
    trainer = trainers.UnigramTrainer(
        vocab_size=140, special_tokens=SPECIAL, unk_token="<unk>", initial_alphabet=["▁"]
    )
    backend.train_from_iterator(CORPUS, trainer)
    return _wrapped(backend)


def byte_level(*, add_prefix_space: bool = False) -> PreTrainedTokenizerFast:
    """As GPT-2, Llama 3 and Qwen have it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=330,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    backend.train_from_iterator(CORPUS, trainer)
    return _wrapped(backend)


def word_piece() -> PreTrainedTokenizerFast:
    """Words cut at punctuation, as BERT has it."""
    backend = Tokenizer(models.WordPiece(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    backend.decoder = decoders.WordPiece(cleanup=False)
    backend.train_from_iterator(
        CORPUS, trainers.WordPieceTrainer(vocab_size=200, special_tokens=SPECIAL)
    )
    return _wrapped(backend)


def word_level() -> PreTrainedTokenizerFast:
    """Words between spaces, and special tokens among the words."""
    backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.train_from_iterator(CORPUS, trainers.WordLevelTrainer(special_tokens=SPECIAL))
    return _wrapped(backend)


def numbered_words() -> PreTrainedTokenizerFast:
    """Words t3, t4, … are the tokens 3, 4, … of the small models (`oracles.SHAPE`)."""
    vocabulary = {"<pad>": 0, "<bos>": 1, "<eos>": 2}
    vocabulary |= {f"t{i}": i for i in range(3, SHAPE["vocab_size"])}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="t3"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 1)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>"
    )


SPACED: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "llama": llama,
    "mistral": mistral,
    "unigram": unigram,
}
"""Those that put a space before each text."""

KINDS = {**SPACED, "byte_level": byte_level, "word_piece": word_piece, "word_level": word_level}
