"""The real vocabularies: ids, round trips, the forms in which they are handed around, and what is refused."""

import json

import pytest
from vocabularies import vocabulary, write_tokenizer

from kforcing_jax.config import DataConfig
from kforcing_jax.data import pretrained
from kforcing_jax.data.choices import KNOWN_TOKENIZERS, KnownTokenizer
from kforcing_jax.data.pretrained import digest, load_configured, load_pretrained
from kforcing_jax.data.tokenizers import Tokenizer
from kforcing_jax.errors import DataError

BERT, GPT2 = "bert-base-uncased", "gpt2"
TEXTS = [
    "The U.S. Postal Service said it can't comment.",
    'Mr. Smith paid $3.50 (about £2) for "it" at 9:30, didn\'t he?',
    "naïve café — Zürich 漢字 😀",
    "  two  spaces\n\nand lines\t",
    "x" * 300 + " antidisestablishmentarianism",
]


@pytest.fixture(autouse=True)
def no_network(monkeypatch, tmp_path):
    """Names are looked for in an empty cache, and the hub cannot be reached."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))

    def unreachable(endpoint):
        raise OSError("Name or service not known")

    monkeypatch.setattr(pretrained, "_reach", unreachable)


@pytest.fixture(scope="module")
def bert():
    return load_pretrained(str(vocabulary(BERT)))


@pytest.fixture(scope="module")
def gpt2():
    return load_pretrained(str(vocabulary(GPT2)))


def test_bert_has_the_ids_of_the_released_models(bert):
    assert (bert.vocab_size, bert.bos_id, bert.eos_id, bert.mask_id) == (30_522, 101, 102, 103)
    # As the released example is tokenised by transformers.
    assert bert.encode_marked("[CLS] the bank also reported that") == [101, 1996, 2924, 2036, 2988, 2008]
    assert bert.encode("Hello, world!") == [7592, 1010, 2088, 999]


def test_gpt2_has_the_ids_of_the_released_models_and_the_mask_after_them(gpt2):
    assert (gpt2.vocab_size, gpt2.bos_id, gpt2.eos_id, gpt2.mask_id) == (50_258, 50_256, 50_256, 50_257)
    assert gpt2.encode("Hello, world!") == [15496, 11, 995, 0]
    assert gpt2.encode_marked("a<|endoftext|>b") == [64, 50_256, 65]


def test_real_vocabularies_give_every_text_back_bert_but_for_case_accents_and_spaces(bert, gpt2, tmp_path):
    for tokenizer in (bert, gpt2):
        tokenizer.save(tmp_path / "tokenizer.json")
        loaded = Tokenizer.load(tmp_path / "tokenizer.json")
        assert loaded.digest == tokenizer.digest
        assert [loaded.encode(text) for text in TEXTS] == [tokenizer.encode(text) for text in TEXTS]
    for text in TEXTS:
        assert gpt2.decode(gpt2.encode(text)) == text
        assert not {50_256, 50_257} & set(gpt2.encode(f"{text}<|endoftext|> <mask>"))
        assert not {101, 102, 103} & set(bert.encode(f"[CLS] [SEP] [MASK] {text}"))
    for text in TEXTS[:2]:
        back = bert.decode(bert.encode(text))
        assert back.replace(" ", "") == text.lower().replace(" ", "")
        assert bert.encode(back) == bert.encode(text)


def test_a_prompt_begins_as_a_row_does(bert, gpt2):
    assert bert.encode_prompt("the bank") == [101, 1996, 2924]
    assert bert.encode_prompt("") == [101]
    assert gpt2.encode_prompt("the bank") == gpt2.encode("the bank")
    assert gpt2.encode_prompt("") == [50_256]


def test_cutting_a_long_document_into_pieces_changes_nothing(bert, gpt2):
    text = "The  cat sat, on the   mat it's 12 the—text\n\n the end " * 2000
    for tokenizer in (bert, gpt2):
        assert tokenizer.encode(text) == tokenizer.backend.encode(text, add_special_tokens=False).ids


def merges_of(*pairs):
    """(vocabulary of letters, special tokens and merges; lines of merges)."""
    tokens = ["<s>", "</s>", "<mask>", "\u0120", *"abcdefgh", *("".join(pair) for pair in pairs)]
    return json.dumps({token: i for i, token in enumerate(tokens)}), "\n".join(map(" ".join, pairs)) + "\n"


@pytest.mark.parametrize("header", ["", "#version: 0.2\n"])
@pytest.mark.parametrize("names", [("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe")])
def test_two_files_go_by_either_names_and_have_a_header_or_none(tmp_path, names, header):
    vocabulary, merges = merges_of("ab", "cd", ("ab", "cd"))
    (tmp_path / names[0]).write_text(vocabulary, "utf-8")
    (tmp_path / names[1]).write_text(header + merges, "utf-8")
    tokenizer = load_pretrained(str(tmp_path))
    assert tokenizer.encode("abcd ab") == [14, 3, 12]
    # Nothing but what the vocabulary has: no <|endoftext|> is invented.
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.mask_id, tokenizer.vocab_size) == (0, 1, 2, 15)
    (tmp_path / "tokenizer_config.json").write_text('{"add_prefix_space": true}')
    assert load_pretrained(str(tmp_path)).encode("ab") == [3, 12]


@pytest.mark.parametrize(
    ("settings", "vocabulary", "expected"),
    [
        (None, "the cat", "the cat"),
        ('{"do_lower_case": false}', "The cat", "The cat"),
        (None, "The cat", "The cat"),
        ("{}", "The cat", "The cat"),
        ('{"do_lower_case": true}', "the cat The", "the cat"),
        ('{"do_lower_case": false}', "the cat", "[UNK] cat"),
        ('{"strip_accents": false}', "thé cat the", "the cat"),
        ('{"do_lower_case": false, "strip_accents": true}', "The cat", "The cat"),
    ],
)
def test_a_list_of_words_is_lower_case_by_its_settings_or_by_its_words(tmp_path, settings, vocabulary, expected):
    words(tmp_path, *vocabulary.split())
    if settings:
        (tmp_path / "tokenizer_config.json").write_text(settings)
    tokenizer = load_pretrained(str(tmp_path))
    assert [tokenizer.backend.id_to_token(i) for i in tokenizer.encode("The cat")] == expected.split()
    accented = tokenizer.backend.id_to_token(tokenizer.encode("thé")[0])
    assert accented == {"thé cat the": "thé", "The cat": "[UNK]"}.get(vocabulary, accented)


def test_chinese_characters_are_words_unless_the_settings_say_otherwise(tmp_path):
    assert words(tmp_path, "漢", "字", "漢字").encode("漢字") == [4, 5]
    (tmp_path / "tokenizer_config.json").write_text('{"tokenize_chinese_chars": false}')
    assert load_pretrained(str(tmp_path)).encode("漢字") == [6]
    (tmp_path / "tokenizer_config.json").write_text("[")
    with pytest.raises(DataError, match=r"tokenizer_config\.json is not a JSON object"):
        load_pretrained(str(tmp_path))


def words(folder, *words):
    """A folder with BERT's special tokens and some words."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.txt").write_text("\n".join(["[UNK]", "[CLS]", "[SEP]", "[MASK]", *words]) + "\n", "utf-8")
    return load_pretrained(str(folder))


def test_padding_and_truncation_of_a_file_are_left_out(tmp_path):
    # As the tokenizer.json of sentence encoders has them.
    backend = words(tmp_path, "word").backend
    backend.enable_truncation(8)
    backend.enable_padding(length=8)
    backend.save(str(tmp_path / "tokenizer.json"))
    assert load_pretrained(str(tmp_path)).encode("word " * 50) == [4] * 50


def test_a_name_is_found_in_the_users_cache_and_another_vocabulary_there_refused(tmp_path, monkeypatch):
    known = words(tmp_path / "cache" / "kforcing_jax" / "tokenizers" / BERT, "cat", "mat")
    with pytest.raises(DataError, match=r"'bert-base-uncased' as found in .* is another vocabulary"):
        load_pretrained(BERT)
    monkeypatch.setitem(pretrained.KNOWN_TOKENIZERS, BERT, KnownTokenizer("", digest(known.backend)))
    for name in (BERT, f"google-bert/{BERT}"):
        assert load_pretrained(name).encode("the mat") == [0, 5]


@pytest.mark.parametrize("name", [BERT, GPT2, "someone/something"])
def test_offline_the_error_says_which_file_to_put_where(name, tmp_path):
    with pytest.raises(DataError) as raised:
        load_pretrained(name)
    message = str(raised.value)
    assert "\n" not in message and f"tokenizer {name!r}" in message and "Name or service not known" in message
    assert "tokenizer.json" in message and str(tmp_path / "cache" / "kforcing_jax" / "tokenizers" / name) in message


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        (None, None, "no such file or folder"),
        ("other.bin", "", "holds no tokenizer; it should hold one of: tokenizer.json, vocab.txt"),
        ("tokenizer.json", "{}", "is not a tokenizer"),
        ("encoder.json", "{}", "holds no tokenizer"),
        ("vocab.txt", "", "is not a tokenizer"),
    ],
)
def test_a_path_without_a_tokenizer_is_named(tmp_path, file, content, message):
    if file:
        (tmp_path / file).write_text(content)
    with pytest.raises(DataError, match=message) as raised:
        load_pretrained(str(tmp_path if file else tmp_path / "missing"))
    assert str(tmp_path) in str(raised.value) and "\n" not in str(raised.value)


def test_a_vocabulary_of_another_size_than_the_config_says_is_refused(tmp_path):
    words(tmp_path, "cat", "mat")
    with pytest.raises(DataError, match=r"has 6 ids .*data\.vocab_size = 30000; set data\.vocab_size to 6"):
        load_configured(DataConfig(tokenizer=str(tmp_path), vocab_size=30_000))


def test_a_vocabulary_without_an_end_is_refused(tmp_path):
    write_tokenizer(tmp_path, {"type": "WordLevel", "vocab": {"[UNK]": 0, "a": 1}, "unk_token": "[UNK]"})
    with pytest.raises(DataError, match="no token that ends a document"):
        load_configured(DataConfig(tokenizer=str(tmp_path), vocab_size=5))


def test_the_digest_depends_on_the_order_of_the_tokens(bert, gpt2):
    assert len({digest(bert.backend), digest(gpt2.backend)}) == 2
    assert digest(bert.backend) == KNOWN_TOKENIZERS[BERT].digest
