"""Text that grows equals text that is decoded at once."""

import random

import pytest
from vocabularies import vocabulary

from kforcing_jax.config import DataConfig
from kforcing_jax.data.pretrained import load_pretrained
from kforcing_jax.data.tokenizers import train_tokenizer
from kforcing_jax.serving.text import IdStream, TextStream

TEXTS = (
    "Hello, world! Don't stop -- it's \"quoted\", 3.14 and two  spaces.\n\nA new line",
    "naïve café, 你好世界。日本語のテキスト 😀👩‍👩‍👧🏽 é مرحبا",
    "unbelievable antidisestablishmentarianism, co-operate; e.g. this",
)


def _tokenizer(name):
    if name in ("bpe", "characters"):
        return train_tokenizer(DataConfig(tokenizer=name, vocab_size=400), TEXTS)
    return load_pretrained(str(vocabulary(name)))


@pytest.fixture(scope="module", params=["bert-base-uncased", "gpt2", "bpe", "characters"])
def tokenizer(request):
    return _tokenizer(request.param)


def _streamed(tokenizer, prompt, new):
    stream = TextStream(tokenizer, prompt)
    pieces = [stream.push(token) for token in new]
    return pieces, "".join(pieces) + stream.finish()


@pytest.mark.parametrize("text", TEXTS)
def test_pieces_join_to_the_whole_text_for_every_split_into_prompt_and_new_tokens(tokenizer, text):
    ids = tokenizer.encode(text)
    for split in range(len(ids)):
        before, whole = tokenizer.decode(ids[:split]).rstrip("\ufffd"), tokenizer.decode(ids)
        assert before + _streamed(tokenizer, ids[:split], ids[split:])[1] == whole


def test_pieces_of_ids_that_no_text_has_join_to_what_they_decode_to(tokenizer):
    numbers = random.Random(3)
    for _ in range(300):
        ids = [numbers.randrange(tokenizer.vocab_size) for _ in range(numbers.randrange(1, 12))]
        split = numbers.randrange(len(ids))
        before, whole = tokenizer.decode(ids[:split]).rstrip("\ufffd"), tokenizer.decode(ids)
        assert before + _streamed(tokenizer, ids[:split], ids[split:])[1] == whole, ids


def test_half_a_character_is_held_until_it_is_whole():
    tokenizer = _tokenizer("gpt2")
    ids = tokenizer.encode("😀")
    assert len(ids) > 1
    pieces, text = _streamed(tokenizer, (), ids)
    assert pieces == [""] * (len(ids) - 1) + ["😀"] and text == "😀"
    assert _streamed(tokenizer, (), ids[:-1])[1] == "\ufffd"


def test_a_word_piece_after_a_prompt_continues_its_word():
    tokenizer = _tokenizer("bert-base-uncased")
    ids = tokenizer.encode("unbelievably so")
    first, *rest = ids
    assert tokenizer.decode([first]) + _streamed(tokenizer, [first], rest)[1] == tokenizer.decode(ids)


def test_ids_without_a_tokenizer_are_separated_by_spaces():
    stream = IdStream(())
    assert "".join([*map(stream.push, (5, 6, 7)), stream.finish()]) == "5 6 7"
    stream = IdStream([1])
    assert "".join(map(stream.push, (5, 6))) == " 5 6"
