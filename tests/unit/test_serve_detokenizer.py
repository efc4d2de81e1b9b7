import random

import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from serve.engine.detokenizer import StopFinder, Vocabulary
from tests.helpers.tiny_model import CORPUS, END, train_tokenizer


@pytest.fixture(scope="module")
def vocabulary() -> Vocabulary:
    return Vocabulary(train_tokenizer())


@pytest.mark.parametrize("text", CORPUS)
def test_pieces_are_whole_characters_and_concatenate_to_the_text(vocabulary: Vocabulary, text: str) -> None:
    decoder = vocabulary.decoder()
    pieces = [decoder.feed(token) for token in vocabulary.tokenizer.encode(text).ids]
    assert "".join(pieces) == text
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in pieces)


def test_random_tokens_decode_as_the_tokenizer_decodes_them(vocabulary: Vocabulary) -> None:
    rng = random.Random(0)
    size = vocabulary.tokenizer.get_vocab_size()
    for _ in range(300):
        tokens = [rng.randrange(size) for _ in range(rng.randint(1, 30))]
        decoder = vocabulary.decoder()
        text = "".join(decoder.feed(token) for token in tokens)
        whole = vocabulary.tokenizer.decode(tokens, skip_special_tokens=True)
        # an unfinished last character is left out, where decoding at once replaces it
        assert whole in (text, text + "\N{REPLACEMENT CHARACTER}")


def test_unfinished_character_is_left_out(vocabulary: Vocabulary) -> None:
    tokens = [vocabulary.tokenizer.token_to_id(piece) for piece in ("è", "¿")]  # two of the three bytes of 这
    decoder = vocabulary.decoder()
    assert "".join(decoder.feed(token) for token in tokens) == ""
    assert vocabulary.token_text(tokens[0]) == "bytes:\\xe8"


def test_special_tokens_are_not_text(vocabulary: Vocabulary) -> None:
    end = vocabulary.tokenizer.token_to_id(END)
    assert vocabulary.decoder().feed(end) == ""
    assert vocabulary.is_special(end)
    assert vocabulary.token_text(end) == END


def test_other_decoders_give_the_same_text_piece_by_piece() -> None:
    words = {"▁the": 0, "▁sail": 1, "s": 2, "▁down": 3, "<0xE8>": 4, "<0xBF>": 5, "<0x99>": 6, "<unk>": 7}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    decoder = Vocabulary(tokenizer).decoder()
    tokens = [0, 1, 2, 4, 5, 6, 3]
    pieces = [decoder.feed(token) for token in tokens]
    assert "".join(pieces) == tokenizer.decode(tokens) == "the sails这 down"


@pytest.mark.parametrize("size", [1, 2, 3, 7])
def test_stop_is_found_across_pieces_and_never_shown(size: int) -> None:
    text = "one two STO STOP three"
    finder = StopFinder(("STOP", "never"))
    shown = ""
    for at in range(0, len(text), size):
        shown += finder.feed(text[at : at + size])
        if finder.found:
            break
    assert finder.found
    assert shown == "one two STO "


def test_beginning_of_a_stop_is_shown_when_nothing_follows() -> None:
    finder = StopFinder(("\n\n",))
    assert finder.feed("a\n") == "a"
    assert finder.flush() == "\n"
    assert not finder.found
