"""A byte-level unigram tokenizer, trained so that the same texts give the same bytes in every process.

The trainer of the `tokenizers` library sums in the order of a hash map that each process seeds anew, and scores that
differ in the last bit can change which of two pieces is pruned. Here the candidates are the pieces of a BPE of twice
the size; pieces are counted on the best segmentation of the texts (whole numbers, so that no order matters), scored by
the logarithm of their share, and those that are missed least are dropped, as in Kudo, "Subword Regularization", ACL
2018, section 3.2, with the best segmentation in place of the expectation over all.

Owns this training. Knows nothing of files.
"""

import json
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import chain, islice

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

__all__ = ["byte_level", "train_bpe", "train_unigram"]

_CANDIDATES = 2
"""Candidates for each entry of the vocabulary."""
_KEEP = 0.75
"""Share of the pieces that a round of pruning keeps, as in SentencePiece's trainer."""
_BATCH_TEXTS = 1000
_DIGITS = 6
_UNSEEN = 0.1
"""Occurrences that a byte without any is scored with."""


def byte_level(model: models.Model) -> Tokenizer:
    """A tokenizer over GPT-2's 256 characters for bytes, words apart; whatever is encoded decodes to itself."""
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def train_bpe(texts: Iterable[str], vocab_size: int, min_frequency: int, specials: Sequence[str]) -> Tokenizer:
    """A byte-level BPE; the special tokens come first in its vocabulary."""
    tokenizer = byte_level(models.BPE())
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=list(specials),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def train_unigram(texts: Callable[[], Iterable[str]], vocab_size: int, specials: Sequence[str]) -> Tokenizer:
    """A byte-level unigram tokenizer; the special tokens come last in its vocabulary.

    Args:
        texts: the same texts at each call; they are read some seven times.
        vocab_size: entries, the 256 bytes and the special tokens included; fewer come out where the texts are few.
        specials: texts of the special tokens.
    """
    alphabet = set(pre_tokenizers.ByteLevel.alphabet())
    wanted = vocab_size - len(specials)
    seed = train_bpe(texts(), _CANDIDATES * wanted, 2, ())
    counts = _counts(seed, texts())
    scores = _scores(counts, alphabet)
    while True:
        counts = _counts(_model(scores), texts())
        if len(counts) <= wanted:
            break
        scores = _scores(counts, alphabet)
        size = max(wanted, int(len(counts) * _KEEP))
        scores = _scores({piece: counts[piece] for piece in _missed_most(counts, scores, alphabet, size)}, alphabet)
    tokenizer = _model(_scores(counts, alphabet))
    tokenizer.add_special_tokens(list(specials))
    return tokenizer


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    rest = iter(texts)
    while batch := list(islice(rest, _BATCH_TEXTS)):
        yield batch


def _counts(tokenizer: Tokenizer, texts: Iterable[str]) -> dict[str, int]:
    """How often each piece of the vocabulary occurs in the texts."""
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    counts: npt.NDArray[np.int64] = np.zeros(max(vocabulary.values()) + 1, dtype=np.int64)
    for batch in _batches(texts):
        encodings = tokenizer.encode_batch_fast(batch, add_special_tokens=False)
        ids = np.fromiter(chain.from_iterable(encoding.ids for encoding in encodings), dtype=np.int64)
        counts += np.bincount(ids, minlength=counts.size)
    return {piece: int(counts[index]) for piece, index in vocabulary.items()}


def _scores(counts: Mapping[str, int], alphabet: set[str]) -> dict[str, float]:
    """Logarithms of the shares; single bytes always have one, other pieces where they occur."""
    kept = {piece: float(count) for piece, count in counts.items() if count}
    kept |= {piece: kept.get(piece, _UNSEEN) for piece in alphabet}
    total = math.fsum(kept.values())
    return {piece: round(math.log(count / total), _DIGITS) for piece, count in kept.items()}


def _model(scores: Mapping[str, float]) -> Tokenizer:
    """The tokenizer of these scores, likeliest pieces first."""
    vocabulary = sorted(scores.items(), key=lambda item: (-item[1], item[0]))
    model = {"type": "Unigram", "unk_id": None, "vocab": vocabulary, "byte_fallback": False}
    tokenizer = json.loads(byte_level(models.Unigram()).to_str())
    return Tokenizer.from_str(json.dumps({**tokenizer, "model": model}))


def _missed_most(counts: Mapping[str, int], scores: Mapping[str, float], alphabet: set[str], size: int) -> list[str]:
    """The single bytes, and those pieces without which the texts would lose most of their likelihood."""
    losses = {
        piece: counts[piece] * (scores[piece] - _without(piece, scores)) for piece in scores if piece not in alphabet
    }
    ranked = sorted(losses, key=lambda piece: (-round(losses[piece], _DIGITS), piece))
    return [*sorted(alphabet), *ranked[: max(0, size - len(alphabet))]]


def _without(piece: str, scores: Mapping[str, float]) -> float:
    """The score of the best segmentation of a piece into others."""
    best = [0.0] + [-math.inf] * len(piece)
    for end in range(1, len(piece) + 1):
        for begin in range(end):
            if (begin or end < len(piece)) and (score := scores.get(piece[begin:end])) is not None:
                best[end] = max(best[end], best[begin] + score)
    return best[-1]
