import pytest

from kforcing_jax.config import DataConfig
from kforcing_jax.data.tokenizers import Tokenizer, check_vocabulary, markov_tokenizer, train_tokenizer
from kforcing_jax.errors import ConfigError, DataError, RunError

DOCUMENTS = ["the cat sat on the mat\nand said <mask> or <eos>", "Zürich, 1 2 3", "the end — of the 漢字 text\r\n"]
CHARACTERS = DataConfig(vocab_size=64)
BPE = DataConfig(tokenizer="bpe", vocab_size=300)

either = pytest.mark.parametrize("config", [CHARACTERS, BPE], ids=["characters", "bpe"])


@either
def test_decoding_gives_the_text_back(config):
    tokenizer = train_tokenizer(config, DOCUMENTS)
    for text in [*DOCUMENTS, " ", "\n\n  a  ", ""]:
        assert tokenizer.decode(tokenizer.encode(text)) == text


@either
def test_text_that_spells_a_special_token_never_becomes_one(config, tmp_path):
    train_tokenizer(config, DOCUMENTS).save(tmp_path / "tokenizer.json")
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    assert not {tokenizer.mask_id, tokenizer.eos_id} & set(tokenizer.encode(DOCUMENTS[0]))


@either
def test_the_mask_is_the_last_id_and_the_vocabulary_keeps_to_its_limit(config):
    tokenizer = train_tokenizer(config, DOCUMENTS)
    assert tokenizer.mask_id == tokenizer.vocab_size - 1
    assert tokenizer.vocab_size <= config.vocab_size
    assert tokenizer.eos_id not in (None, tokenizer.mask_id)


def test_the_most_frequent_characters_stay_when_the_vocabulary_is_small():
    tokenizer = train_tokenizer(DataConfig(vocab_size=6), ["aaaa bbb ccc", "dd", "e"])
    assert tokenizer.vocab_size == 6
    assert tokenizer.decode(tokenizer.encode("a b c d e"), show_special=True).count("<unk>") == 6
    assert "<unk>" not in tokenizer.decode(tokenizer.encode("abc"), show_special=True)


@either
def test_training_is_deterministic(config):
    first, second = (train_tokenizer(config, DOCUMENTS).backend.to_str() for _ in range(2))
    assert first == second


@either
def test_a_saved_tokenizer_is_the_same_when_loaded(config, tmp_path):
    tokenizer = train_tokenizer(config, DOCUMENTS)
    tokenizer.save(tmp_path / "tokenizer.json")
    loaded = Tokenizer.load(tmp_path / "tokenizer.json")
    assert (loaded.vocab_size, loaded.eos_id, loaded.mask_id) == (
        tokenizer.vocab_size,
        tokenizer.eos_id,
        tokenizer.mask_id,
    )
    for text in DOCUMENTS:
        assert loaded.encode(text) == tokenizer.encode(text)


@either
def test_documents_encode_as_one_by_one_also_when_there_are_more_than_a_batch(config):
    tokenizer = train_tokenizer(config, DOCUMENTS)
    documents = [DOCUMENTS[i % 3] * (i % 5) for i in range(150)]
    assert list(tokenizer.encode_documents(documents)) == [tokenizer.encode(text) for text in documents]


@either
def test_cutting_a_long_document_into_pieces_changes_nothing(config):
    tokenizer = train_tokenizer(config, DOCUMENTS)
    text = "the cat  sat, on the   mat it's 12 the—text\n\n the end " * 2000
    assert tokenizer.encode(text) == tokenizer.backend.encode(text).ids


def test_decoding_leaves_special_tokens_out_and_goes_on_after_them():
    tokenizer = train_tokenizer(CHARACTERS, DOCUMENTS)
    ids = [*tokenizer.encode("cat"), tokenizer.eos_id, tokenizer.mask_id, *tokenizer.encode("mat")]
    assert tokenizer.decode(ids) == "catmat"
    assert tokenizer.decode(ids, show_special=True) == "cat<eos><mask>mat"


def test_a_prompt_outside_the_vocabulary_is_refused_by_its_first_bad_character():
    tokenizer = train_tokenizer(CHARACTERS, DOCUMENTS)
    assert tokenizer.encode_prompt("the cat") == tokenizer.encode("the cat")
    with pytest.raises(DataError, match=r"'é' \(U\+00E9\) at character 2"):
        tokenizer.encode_prompt("caéñ")


@either
def test_a_prompt_with_bytes_that_are_not_text_is_refused(config):
    with pytest.raises(DataError, match="U\\+DC80"):
        train_tokenizer(config, DOCUMENTS).encode_prompt("a\udc80")


@either
def test_an_empty_prompt_is_the_start_of_a_document(config):
    tokenizer = train_tokenizer(config, DOCUMENTS)
    assert tokenizer.encode_prompt("") == [tokenizer.eos_id]


def test_every_prompt_is_in_the_vocabulary_of_bytes():
    tokenizer = train_tokenizer(BPE, DOCUMENTS)
    assert tokenizer.decode(tokenizer.encode_prompt("😀 é")) == "😀 é"


def test_markov_states_are_their_own_ids_and_the_mask_follows(tmp_path):
    markov_tokenizer(62).save(tmp_path / "tokenizer.json")
    tokenizer = Tokenizer.load(tmp_path / "tokenizer.json")
    assert tokenizer.encode_prompt("09azAZ") == [0, 9, 10, 35, 36, 61]
    assert (tokenizer.vocab_size, tokenizer.mask_id, tokenizer.eos_id) == (63, 62, None)
    assert tokenizer.decode(range(12)) == "0123456789ab"


def test_a_markov_prompt_holds_states_only():
    tokenizer = markov_tokenizer(3)
    with pytest.raises(DataError, match=r"'3' .* known characters: '012'"):
        tokenizer.encode_prompt("0123")
    with pytest.raises(DataError, match="the prompt is empty; give at least one state"):
        tokenizer.encode_prompt("")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (DataConfig(source="markov", markov_states=63), "data.markov_states = 63 is above 62"),
        (DataConfig(tokenizer="bpe", vocab_size=257), "data.vocab_size = 257 should be at least 258"),
    ],
)
def test_an_impossible_vocabulary_is_a_configuration_error(config, message):
    with pytest.raises(ConfigError, match=message):
        check_vocabulary(config)


def test_the_smallest_byte_vocabulary_has_no_merges():
    config = DataConfig(tokenizer="bpe", vocab_size=258)
    check_vocabulary(config)
    tokenizer = train_tokenizer(config, DOCUMENTS)
    assert tokenizer.vocab_size == 258
    assert len(tokenizer.encode("Zürich")) == 7


@pytest.mark.parametrize("content", ["", "{}", '{"model": '])
def test_a_damaged_tokenizer_file_is_a_run_error(tmp_path, content):
    (tmp_path / "tokenizer.json").write_text(content)
    with pytest.raises(RunError, match=r"tokenizer\.json cannot be read"):
        Tokenizer.load(tmp_path / "tokenizer.json")


def test_a_tokenizer_of_another_library_is_refused(tmp_path):
    backend = train_tokenizer(CHARACTERS, DOCUMENTS).backend
    backend.add_tokens(["extra"])
    (tmp_path / "tokenizer.json").write_text(backend.to_str(), encoding="utf-8")
    with pytest.raises(RunError, match="does not have <mask> as its last id"):
        Tokenizer.load(tmp_path / "tokenizer.json")
