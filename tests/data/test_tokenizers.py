import pytest
from vocabularies import write_tokenizer

from kforcing_jax.config import DataConfig
from kforcing_jax.data.pretrained import load_configured, load_pretrained
from kforcing_jax.data.tokenizers import Tokenizer, _pieces, markov_tokenizer, train_tokenizer
from kforcing_jax.errors import ConfigError, DataError, RunError

DOCUMENTS = ["the cat sat on the mat\nand said <mask> or <eos>", "Zürich, 1 2 3", "the end — of the 漢字 text\r\n"]
CHARACTERS = DataConfig(vocab_size=64)
BPE = DataConfig(tokenizer="bpe", vocab_size=300)
LETTERS = "abcdefghijklmnopqrstuvwxyz"

either = pytest.mark.parametrize("config", [CHARACTERS, BPE], ids=["characters", "bpe"])


@either
def test_decoding_gives_the_text_back_also_after_saving_and_training_again(config, tmp_path):
    tokenizer = train_tokenizer(config, DOCUMENTS)
    assert tokenizer.backend.to_str() == train_tokenizer(config, DOCUMENTS).backend.to_str()
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert loaded.digest == tokenizer.digest
    for text in [*DOCUMENTS, " ", "\n\n  a  ", ""]:
        assert tokenizer.decode(tokenizer.encode(text)) == text
        assert loaded.encode(text) == tokenizer.encode(text)


@either
def test_the_mask_is_the_last_id_and_the_vocabulary_keeps_to_its_limit(config):
    tokenizer = train_tokenizer(config, DOCUMENTS)
    assert tokenizer.mask_id == tokenizer.vocab_size - 1
    assert tokenizer.vocab_size <= config.vocab_size
    assert tokenizer.eos_id not in (None, tokenizer.mask_id)
    assert not {tokenizer.mask_id, tokenizer.eos_id} & set(tokenizer.encode(DOCUMENTS[0]))


def test_the_most_frequent_characters_stay_when_the_vocabulary_is_small():
    tokenizer = train_tokenizer(DataConfig(vocab_size=6), ["aaaa bbb ccc", "dd", "e"])
    assert tokenizer.vocab_size == 6
    assert tokenizer.encode("a b c d e").count(tokenizer.unknown_id) == 6
    assert tokenizer.unknown_id not in tokenizer.encode("abc")


@either
def test_documents_encode_as_one_by_one_also_when_there_are_more_than_a_batch(config):
    tokenizer = train_tokenizer(config, DOCUMENTS)
    documents = [DOCUMENTS[i % 3] * (i % 5) for i in range(150)]
    assert list(tokenizer.encode_documents(documents)) == [tokenizer.encode(text) for text in documents]


def unigram(**parts):
    """A model with the special tokens among its pieces, as sentencepiece has them."""
    pieces = ["<unk>", "<s>", "</s>", "▁", *LETTERS, "<", ">", "/", "▁the"]
    return {"type": "Unigram", "unk_id": 0, "vocab": [[piece, -3.0 * (i > 2)] for i, piece in enumerate(pieces)]}


SENTENCEPIECE = {"<unk>": 0, "<s>": 1, "</s>": 2}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always", "split": True}
LLAMA = {
    "type": "Sequence",
    "normalizers": [
        {"type": "Prepend", "prepend": "▁"},
        {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
    ],
}
AT_SPACES = {"type": "Split", "pattern": {"String": "▁"}, "behavior": "MergedWithNext", "invert": False}


def letters(*first):
    return {token: i for i, token in enumerate([*first, "▁", *LETTERS])}


def bpe(*first):
    return {"type": "BPE", "unk_token": "<unk>", "vocab": letters(*first), "merges": []}


@pytest.mark.parametrize(
    "parts",
    [
        {"pre_tokenizer": METASPACE},
        {"pre_tokenizer": METASPACE | {"prepend_scheme": "first"}},
        {"normalizer": LLAMA},
        {"normalizer": LLAMA, "pre_tokenizer": AT_SPACES},
        {"normalizer": {"type": "Strip", "strip_left": True, "strip_right": True}},
        {"normalizer": LLAMA["normalizers"][1]},
    ],
    ids=["always", "first", "prepended", "prepended and split", "stripped", "replaced"],
)
def test_a_long_document_has_the_tokens_of_the_whole_whatever_a_vocabulary_does_at_a_beginning(tmp_path, parts):
    tokenizer = load_pretrained(write_tokenizer(tmp_path, bpe("<unk>", "</s>"), {"<unk>": 0, "</s>": 1}, **parts))
    for text in ("abcdefgh " * 6000, "the cat  sat, 漢字\n\n it " * 2000, "漢" * 40_000):
        assert tokenizer.encode(text) == tokenizer.backend.encode(text, add_special_tokens=False).ids


@either
def test_a_long_document_has_the_tokens_of_the_whole_in_our_own_vocabularies(config):
    tokenizer = train_tokenizer(config, DOCUMENTS)
    for text in ("the cat  sat, on the   mat it's 12 the—text\n\n the end " * 2000, "漢字" * 20_000):
        assert tokenizer.encode(text) == tokenizer.backend.encode(text).ids
    assert max(map(len, _pieces("the cat " * 5000, tokenizer._may_cut))) < 17_000


def words(*tokens, **changes):
    return {"type": "WordLevel", "vocab": dict(zip(tokens, range(len(tokens)), strict=True))} | changes


BETWEEN_SPACES = {"pre_tokenizer": {"type": "WhitespaceSplit"}}


@pytest.mark.parametrize(
    ("model", "special", "parts"),
    [
        (unigram(), SENTENCEPIECE, {"pre_tokenizer": METASPACE}),
        (unigram(), {}, {"pre_tokenizer": METASPACE}),
        (unigram(), SENTENCEPIECE, {"normalizer": {"type": "Lowercase"}}),
        (words("[UNK]", "</s>", "<mask>", "old", unk_token="[UNK]"), {"[UNK]": 0, "</s>": 1}, BETWEEN_SPACES),
        (bpe("<unk>", "<s>", "</s>") | {"ignore_merges": True}, SENTENCEPIECE, BETWEEN_SPACES),
    ],
    ids=["sentencepiece", "not marked as special", "lower-cased", "words", "bpe that looks words up"],
)
def test_text_that_spells_a_special_token_does_not_become_it(tmp_path, model, special, parts):
    tokenizer = load_pretrained(write_tokenizer(tmp_path, model, special, **parts))
    ids = tokenizer.encode("old </s> <s> </S> <mask> the<s>")
    assert not {tokenizer.eos_id, tokenizer.bos_id, tokenizer.mask_id} & set(ids)
    # What stands around it is as ever.
    assert ids[: len(tokenizer.encode("old"))] == tokenizer.encode("old")
    if model["type"] == "Unigram":
        assert "".join(map(tokenizer.backend.id_to_token, tokenizer.encode("old </s>"))).endswith(
            ("old▁</s>", "old<unk></s>")
        )


def test_what_is_unknown_does_not_become_the_end(tmp_path):
    folder = write_tokenizer(tmp_path, words("</s>", "cat", unk_token="</s>"), {"</s>": 0}, **BETWEEN_SPACES)
    with pytest.raises(DataError, match="outside the vocabulary, which would become </s>"):
        load_pretrained(folder).encode("cat dog")
    folder = write_tokenizer(tmp_path, words("</s>", "cat", unk_token="<unk>"), **BETWEEN_SPACES)
    with pytest.raises(DataError, match="the text is not one of this vocabulary"):
        load_pretrained(folder).encode("cat dog")


def test_a_vocabulary_that_drops_what_it_does_not_know_is_warned_of(tmp_path, caplog):
    for unknown in (None, "<unk>"):
        folder = write_tokenizer(tmp_path, bpe("<unk>", "</s>") | {"unk_token": unknown}, {"</s>": 1})
        load_configured(DataConfig(tokenizer=folder, vocab_size=30))
        assert ("leaves out what is outside its vocabulary without a trace" in caplog.text) == (unknown is None)
        caplog.clear()


@pytest.mark.parametrize("hole", [{"</s>": 8, "now": 7}, {"</s>": 1, "now": 2}], ids=["a gap", "twice"])
def test_a_vocabulary_whose_ids_have_gaps_is_refused(tmp_path, hole):
    model = words("cat", "dog", unk_token="cat")
    model["vocab"] |= hole
    with pytest.raises(DataError, match=r"has 4 tokens and ids up to \d, but not each id from 0 on once: see id 2"):
        load_pretrained(write_tokenizer(tmp_path, model))


@pytest.mark.parametrize("special", [{"</s>": 7}, {"</s>": 1}, {"</s>": 3, "<mask>": 2}])
def test_added_tokens_that_would_get_other_ids_are_refused(tmp_path, special):
    folder = write_tokenizer(tmp_path, words("cat", "dog", unk_token="cat"), special)
    with pytest.raises(DataError, match=r"tokenizer\.json: \S+ has id \d and would be read as \d"):
        load_pretrained(folder)


def test_a_mask_and_a_beginning_of_any_id_are_taken_as_they_are(tmp_path):
    gemma = ("<pad>", "<eos>", "<bos>", "<unk>", "<mask>")
    folder = write_tokenizer(tmp_path, bpe(*gemma), {name: i for i, name in enumerate(gemma)})
    tokenizer = load_configured(DataConfig(tokenizer=folder, vocab_size=32))
    tokenizer.save(tmp_path / "tokenizer.json")
    for same in (tokenizer, Tokenizer.load(tmp_path / "tokenizer.json")):
        assert (same.bos_id, same.eos_id, same.mask_id, same.vocab_size, same.begins_documents) == (2, 1, 4, 32, True)


def test_decoding_leaves_special_tokens_out_and_goes_on_after_them():
    tokenizer = train_tokenizer(CHARACTERS, DOCUMENTS)
    ids = [*tokenizer.encode("cat"), tokenizer.eos_id, tokenizer.mask_id, *tokenizer.encode("mat")]
    assert tokenizer.decode(ids) == "catmat"
    assert tokenizer.decode(ids, show_special=True) == "cat<eos><mask>mat"


@either
def test_a_prompt_is_text_of_the_vocabulary_and_an_empty_one_the_start_of_a_document(config):
    tokenizer = train_tokenizer(config, DOCUMENTS)
    assert tokenizer.encode_prompt("the cat") == tokenizer.encode("the cat")
    assert tokenizer.encode_prompt("") == [tokenizer.eos_id]
    with pytest.raises(DataError, match="U\\+DC80"):
        tokenizer.encode_prompt("a\udc80")
    if config is BPE:
        assert tokenizer.decode(tokenizer.encode_prompt("😀 é")) == "😀 é"
    else:
        with pytest.raises(DataError, match=r"'é' \(U\+00E9\) at character 2"):
            tokenizer.encode_prompt("caéñ")


def test_markov_states_are_their_own_ids_and_the_mask_follows(tmp_path):
    markov_tokenizer(62).save(tmp_path / "tokenizer.json")
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    assert tokenizer.encode_prompt("09azAZ") == [0, 9, 10, 35, 36, 61]
    assert (tokenizer.vocab_size, tokenizer.mask_id, tokenizer.eos_id) == (63, 62, None)
    assert tokenizer.decode(range(12)) == "0123456789ab"
    with pytest.raises(DataError, match=r"'3' .* known characters: '012'"):
        markov_tokenizer(3).encode_prompt("0123")
    with pytest.raises(DataError, match="the prompt is empty; give at least one state"):
        tokenizer.encode_prompt("")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"source": "markov", "markov_states": 63}, "data.markov_states = 63 is above 62"),
        ({"tokenizer": "bpe", "vocab_size": 257}, "data.vocab_size = 257 should be at least 258"),
    ],
)
def test_an_impossible_vocabulary_is_a_configuration_error(fields, message):
    with pytest.raises(ConfigError, match=message):
        DataConfig(**fields)


def test_the_smallest_byte_vocabulary_has_no_merges():
    tokenizer = train_tokenizer(DataConfig(tokenizer="bpe", vocab_size=258), DOCUMENTS)
    assert tokenizer.vocab_size == 258
    assert len(tokenizer.encode("Zürich")) == 7


@pytest.mark.parametrize("content", ["", "{}", '{"model": '])
def test_a_damaged_tokenizer_file_is_a_run_error(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(RunError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.load(tmp_path / "tokenizer.json")


def test_a_tokenizer_without_a_mask_is_not_of_prepared_data(tmp_path):
    write_tokenizer(tmp_path, bpe("<unk>", "</s>"))
    with pytest.raises(RunError, match="has no <mask>; it was not written by this library"):
        Tokenizer.load(tmp_path / "tokenizer.json")
