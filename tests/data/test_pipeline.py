import itertools
import json
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from kforcing_jax.config import DataConfig
from kforcing_jax.data import preparation, shards
from kforcing_jax.data.choices import PACKINGS, SOURCES
from kforcing_jax.data.pipeline import FORMAT
from kforcing_jax.data.preparation import prepare
from kforcing_jax.data.sources import markov_chain
from kforcing_jax.data.units import GivenDocuments, Reader, reader
from kforcing_jax.errors import DataError, RunError

SEED = 3
TRAIN, VALIDATION = (f"{split}-00000-of-00001.arrayrecord" for split in ("train", "validation"))
WORDS = ["cat", "mat", "hat", "rat", "sat", "bat", "fat", "vat"]


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    """40 documents of 40 to 200 characters, all different."""
    rng = np.random.default_rng(0)
    documents = [f"{i}: " + " ".join(rng.choice(WORDS, size=rng.integers(10, 50))) for i in range(40)]
    path = tmp_path_factory.mktemp("text") / "documents.txt"
    path.write_text("\n\n".join(documents))
    return DataConfig(source="text_files", path=str(path), seq_len=16, validation_fraction=0.25)


@pytest.fixture(scope="module")
def corpus(config, tmp_path_factory):
    return prepare(config, SEED, tmp_path_factory.mktemp("run") / "data")


def all_rows(corpus, split):
    source = corpus._source(split)
    return np.stack([corpus._row(source[i])["tokens"] for i in range(len(source))])


def take(batches, count):
    return np.stack([batch.tokens for batch in itertools.islice(batches, count)])


def test_training_rows_end_to_end_are_documents_each_followed_by_eos(config, corpus):
    ids = all_rows(corpus, "train").ravel()
    *documents, cut_short = "".join("\0" if i == corpus.eos_id else corpus.tokenizer.decode([i]) for i in ids).split(
        "\0"
    )
    originals = reader(config, SEED).distinct_documents()
    assert len(documents) >= 29
    assert set(documents) <= set(originals)
    assert any(original.startswith(cut_short) for original in originals)


def test_the_two_splits_share_no_document(corpus):
    """Every document begins with a number of its own, so a line start in one split is not in the other."""

    def numbers(split):
        text = "".join(corpus.tokenizer.decode(row, show_special=True) for row in all_rows(corpus, split))
        return {piece.split(":")[0] for piece in text.split("<eos>")[1:-1]}

    train = numbers("train")
    # Validation rows are in random order; a number that is whole within a row is enough.
    validation = {
        piece.split(":")[0]
        for row in all_rows(corpus, "validation")
        for piece in corpus.tokenizer.decode(row, show_special=True).split("<eos>")[1:]
        if ":" in piece
    }
    assert len(train) > 25 and len(validation) > 3
    assert not train & validation


def test_the_tokenizer_is_trained_on_the_training_split_alone(tmp_path):
    # Each document has a character of its own; those of the validation split are unknown.
    path = tmp_path / "a.txt"
    path.write_text("\n\n".join(character * 40 for character in "abcdefghij"))
    corpus = prepare(
        DataConfig(source="text_files", path=str(path), seq_len=8, validation_fraction=0.3), SEED, tmp_path / "data"
    )
    assert corpus.vocab_size == 7 + 3
    unknown = corpus.tokenizer.backend.token_to_id("<unk>")
    assert set(corpus.validation_rows(100).tokens.ravel()) == {unknown, corpus.eos_id}
    assert unknown not in all_rows(corpus, "train")


def test_a_second_call_loads_and_prepares_nothing(config, tmp_path, monkeypatch):
    first = prepare(config, SEED, tmp_path / "data")
    monkeypatch.setattr(preparation, "_plan", lambda *_: pytest.fail("prepared twice"))
    second = prepare(config, SEED, tmp_path / "data")
    assert (first.num_train_rows, first.dtype) == (second.num_train_rows, np.uint8)
    np.testing.assert_array_equal(all_rows(first, "train"), all_rows(second, "train"))


def test_the_same_config_and_seed_give_the_same_files(config, corpus, tmp_path):
    again = prepare(config, SEED, tmp_path / "data")
    for file in again.directory.iterdir():
        assert file.read_bytes() == (corpus.directory / file.name).read_bytes(), file.name
    other = prepare(config, 2**32 - 1, tmp_path / "other")
    assert not np.array_equal(all_rows(other, "train")[:5], all_rows(again, "train")[:5])
    assert next(other.train_batches(4, 2**32 - 1)).tokens.shape == (4, 16)


def test_digests_say_what_ids_and_rows_are_and_not_where_they_lie(config, corpus, tmp_path):
    text = tmp_path / "copy.txt"
    text.write_bytes(Path(config.path).read_bytes())
    copy = prepare(replace(config, path=str(text)), SEED, tmp_path / "data")
    assert (copy.vocabulary_digest, copy.data_digest) == (corpus.vocabulary_digest, corpus.data_digest)
    other_rows = prepare(config, SEED + 1, tmp_path / "other")
    assert other_rows.data_digest != corpus.data_digest
    # The same letters, which are not equally frequent: as many ids in another order.
    text.write_text(Path(config.path).read_text().translate(str.maketrans("ca", "ac")))
    permuted = prepare(replace(config, path=str(text)), SEED, tmp_path / "permuted")
    assert permuted.vocab_size == corpus.vocab_size and permuted.vocabulary_digest != corpus.vocabulary_digest


def test_another_config_is_refused_by_the_field_that_differs(config, corpus):
    with pytest.raises(RunError, match=r"prepared with data\.seq_len = 16, now it is 8"):
        prepare(replace(config, seq_len=8), SEED, corpus.directory)
    with pytest.raises(RunError, match="prepared with seed = 3, now it is 4"):
        prepare(config, SEED + 1, corpus.directory)


@pytest.mark.parametrize("name", [TRAIN, VALIDATION, "manifest.json", "tokenizer.json"])
def test_a_file_that_was_cut_short_is_named(config, tmp_path, name):
    file = prepare(config, SEED, tmp_path / "data").directory / name
    file.write_bytes(file.read_bytes()[:-10])
    with pytest.raises(RunError, match=f"{name} .*delete "):
        prepare(config, SEED, tmp_path / "data")
    file.unlink()
    said = "holds no prepared data" if name == "manifest.json" else f"{name} .*delete "
    with pytest.raises(RunError, match=said):
        prepare(config, SEED, tmp_path / "data")


def test_an_empty_folder_is_filled(config, tmp_path):
    (tmp_path / "data").mkdir()
    assert prepare(config, SEED, tmp_path / "data").num_train_rows > 0


@pytest.mark.parametrize(
    ("manifest", "says"),
    [
        (None, r"holds no prepared data \(no manifest\.json\) but notes\.txt, so it is left alone"),
        ("[]", "is not of prepared data"),
        (f'{{"format": {FORMAT}}}', "is not of prepared data"),
        (f'{{"format": {FORMAT}, "made_from": {{}}}}', "dtype is missing"),
        ('{"format": 3, "made_from": {}}', f"has format 3, this version reads {FORMAT}"),
    ],
)
def test_a_folder_of_something_else_is_left_alone(config, tmp_path, manifest, says):
    (tmp_path / "notes.txt").write_text("mine")
    if manifest:
        (tmp_path / "manifest.json").write_text(manifest)
    before = sorted(tmp_path.iterdir())
    with pytest.raises(RunError, match=says) as caught:
        prepare(config, SEED, tmp_path)
    assert (manifest and "made_from" in manifest) or "delete" not in str(caught.value)
    assert (tmp_path / "notes.txt").read_text() == "mine" and sorted(tmp_path.iterdir()) == before


def test_a_manifest_that_does_not_describe_its_shards_is_refused(config, tmp_path):
    path = prepare(config, SEED, tmp_path / "data").directory / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["train"]["rows"] += 1
    path.write_text(json.dumps(manifest))
    with pytest.raises(RunError, match=r"manifest\.json is damaged \(\d+ rows, its shards have \d+\)"):
        prepare(config, SEED, tmp_path / "data")
    del manifest["train"]["shards"][0]["sha256"]
    path.write_text(json.dumps(manifest))
    with pytest.raises(RunError, match=r"manifest\.json is damaged \(KeyError: 'sha256'\)"):
        prepare(config, SEED, tmp_path / "data")


def test_a_shard_of_the_right_size_with_a_damaged_index_is_refused(config, tmp_path):
    file = prepare(config, SEED, tmp_path / "data").directory / TRAIN
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(RunError, match=f"{TRAIN} is damaged"):
        prepare(config, SEED, tmp_path / "data")


def test_a_preparation_that_fails_leaves_nothing_behind(config, tmp_path, monkeypatch):
    def fail(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(shards, "write_rows", fail)
    with pytest.raises(KeyboardInterrupt):
        prepare(config, SEED, tmp_path / "data")
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named(config, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(RunError, match=r"data cannot be written: (File exists|Not a directory)"):
        prepare(config, SEED, tmp_path / "file" / "data")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("one document", "holds 1 distinct document"),
        ("short\n\n" + "long " * 20, "split has 6 tokens in 1 documents, fewer than one row of data.seq_len = 16"),
    ],
)
def test_too_little_text_is_an_error_that_leaves_nothing_behind(config, tmp_path, text, message):
    path = tmp_path / "a.txt"
    path.write_text(text)
    with pytest.raises(DataError, match=message):
        prepare(replace(config, path=str(path)), SEED, tmp_path / "data")
    assert list(tmp_path.iterdir()) == [path]


def test_unknown_characters_are_counted_said_and_warned_of(config, tmp_path, caplog):
    def prepared(size):
        return prepare(replace(config, vocab_size=size), SEED, tmp_path / str(size))

    rows_RxN = all_rows(prepared(8), "train")
    share = (rows_RxN == 0).mean()
    assert share > 0.1
    for split, line in zip(("train", "validation"), prepared(8).statistics().split("\n"), strict=True):
        measured = float(re.search(r"\(100\.0%\), ([\d.]+)% of them <unk>", line)[1]) / 100
        assert measured == pytest.approx(share, abs=0.05)
        assert f"of the {split} split are outside the vocabulary" in caplog.text
    assert re.search(r"vocabulary 8, \d\d\.\d% <unk>$", prepared(8).describe())
    caplog.clear()
    assert "0.0% of them <unk>" in prepared(96).statistics() and "<unk>" not in prepared(96).describe()
    assert not caplog.text


@pytest.mark.parametrize("choice", ["source", "packing"])
def test_a_new_source_or_packing_is_one_entry_of_a_table(config, tmp_path, monkeypatch, choice):
    if choice == "source":
        entry = replace(SOURCES["text_files"], fields=("path", "tokenizer", "vocab_size", "packing"))
        monkeypatch.setitem(SOURCES, "letters", replace(entry, reader=f"{__name__}:Letters"))
        corpus = prepare(DataConfig(source="letters", seq_len=4), SEED, tmp_path / "data")
        assert set(all_rows(corpus, "train").ravel()) == {corpus.eos_id, *corpus.tokenizer.encode("a")}
        made_from = json.loads((tmp_path / "data/manifest.json").read_text())["made_from"]
        assert made_from["seed"] == SEED and "data.markov_states" not in made_from
    else:
        monkeypatch.setitem(PACKINGS, "alone", PACKINGS["padded"])
        assert prepare(replace(config, packing="alone"), SEED, tmp_path / "data").segmented


class Letters(Reader):
    """A source of text that only this test knows."""

    def units(self):
        return {split: [GivenDocuments(("aaa", "aa"))] for split in ("train", "validation")}


def test_every_source_of_the_table_has_its_reader():
    for name in SOURCES:
        assert isinstance(reader(DataConfig(source=name, path="x"), SEED), Reader)


def test_one_epoch_holds_every_row_once_and_the_next_one_is_reshuffled(corpus):
    rows = corpus.num_train_rows
    batches = take(corpus.train_batches(1, SEED), 2 * rows)[:, 0]
    first, second = batches[:rows], batches[rows:]

    def as_set(rows_RxN):
        return sorted(map(tuple, rows_RxN))

    assert as_set(first) == as_set(second) == as_set(all_rows(corpus, "train"))
    assert not np.array_equal(first, second)
    assert not np.array_equal(first, all_rows(corpus, "train"))


def test_a_batch_depends_on_the_seed_and_its_number_alone(corpus):
    batches = take(corpus.train_batches(8, SEED), 60)
    assert batches.shape == (60, 8, 16) and batches.dtype == np.int32
    assert 2 * corpus.num_train_rows < 60 * 8
    for start in (7, 50):
        np.testing.assert_array_equal(take(corpus.train_batches(8, SEED, start), 10), batches[start : start + 10])
    assert not np.array_equal(take(corpus.train_batches(8, SEED + 1), 1), batches[:1])


def test_the_shares_of_all_processes_make_up_the_batch(corpus):
    whole = take(corpus.train_batches(8, SEED, 5), 4)
    shares = [take(corpus.train_batches(8, SEED, 5, index, 4), 4) for index in range(4)]
    np.testing.assert_array_equal(np.concatenate(shares, axis=1), whole)
    with pytest.raises(DataError, match="8 rows cannot be shared equally by 3 processes"):
        corpus.train_batches(8, SEED, process_index=0, process_count=3)


def test_validation_rows_are_as_many_as_there_are_and_fewer_are_the_first_of_more(corpus):
    rows_RxN = corpus.validation_rows(10**6).tokens
    assert rows_RxN.shape == (corpus.num_validation_rows, 16) and rows_RxN.dtype == np.int32
    np.testing.assert_array_equal(corpus.validation_rows(3).tokens, rows_RxN[:3])


def test_a_batch_larger_than_the_training_split_is_refused_by_its_name(corpus):
    corpus.check_batch_size("stages.ar.batch_size", corpus.num_train_rows)
    with pytest.raises(DataError, match=r"stages\.ar\.batch_size = 999 is more than the \d+ training rows"):
        corpus.check_batch_size("stages.ar.batch_size", 999)


def test_ids_that_need_two_bytes_survive(config, tmp_path):
    corpus = prepare(replace(config, tokenizer="bpe", vocab_size=300), SEED, tmp_path / "data")
    assert corpus.dtype == np.uint16
    assert all_rows(corpus, "train").max() >= 256
    assert all_rows(corpus, "train").max() < corpus.mask_id == corpus.vocab_size - 1


def test_a_markov_corpus_has_rows_of_states_without_eos(tmp_path):
    config = DataConfig(source="markov", markov_states=5, markov_rows=100, seq_len=12)
    corpus = prepare(config, SEED, tmp_path / "data")
    assert (corpus.num_train_rows, corpus.num_validation_rows) == (95, 5)
    assert (corpus.vocab_size, corpus.eos_id, corpus.mask_id) == (6, None, 5)
    assert set(all_rows(corpus, "train").ravel()) == set(range(5))
    transitions_SxS = markov_chain(config, SEED)
    rows_RxN = all_rows(corpus, "train")
    # Steps are likelier under the chain that made them than they would be at random.
    assert np.log(transitions_SxS[rows_RxN[:, :-1], rows_RxN[:, 1:]]).mean() > np.log(1 / 5)


@pytest.fixture(scope="module", params=["segments", "padded"])
def segmented(request, config, tmp_path_factory):
    """A corpus of short documents, the longest of which do not fit into a row."""
    path = tmp_path_factory.mktemp("sentences") / "sentences.txt"
    rng = np.random.default_rng(1)
    path.write_text("\n".join(f"{i}:" + "ab" * rng.integers(1, 9) for i in range(200)))
    config = replace(config, path=str(path), packing=request.param, document_separator="\n")
    return config, prepare(config, SEED, tmp_path_factory.mktemp("packed") / "data")


def test_every_document_is_one_whole_segment_cut_to_a_row(segmented):
    config, corpus = segmented
    found = []
    for split in ("train", "validation"):
        source = corpus._source(split)
        for tokens_N, segments_N in (corpus._row(source[i]).values() for i in range(len(source))):
            assert (tokens_N[segments_N == 0] == corpus.eos_id).all()
            for segment in range(1, segments_N.max() + 1):
                found.append(corpus.tokenizer.decode(tokens_N[segments_N == segment]))
    assert sorted(found) == sorted(document[: config.seq_len] for document in reader(config, SEED).distinct_documents())


def test_a_segmented_corpus_says_how_full_its_rows_are(segmented):
    config, corpus = segmented
    lengths = [min(len(document) + 1, 16) for document in reader(config, SEED).distinct_documents()]
    assert corpus.tokens_per_document == pytest.approx(np.mean(lengths), abs=0.5)
    if config.packing == "padded":
        assert corpus.useful_tokens_per_row == corpus.tokens_per_document
    assert f"{corpus.useful_tokens_per_row:.1f} useful tokens each" in corpus.describe()
    assert f"one document a row: {corpus.tokens_per_document:.1f}" in corpus.describe()


def test_segments_travel_with_their_tokens(segmented):
    _, corpus = segmented
    source = corpus._source("train")
    rows = {
        tuple(tokens_N): tuple(segments_N)
        for tokens_N, segments_N in (corpus._row(record).values() for record in source)
    }
    batch = next(corpus.train_batches(8, SEED))
    assert batch.tokens.shape == batch.segments.shape == (8, 16) and batch.segments.dtype == np.int32
    assert all(rows[tuple(t)] == tuple(s) for t, s in zip(batch.tokens, batch.segments, strict=True))
    validation = corpus.validation_batches(4, 2)
    assert validation.tokens.shape == validation.segments.shape == (2, 2, 16)


def test_rows_of_one_text_have_no_segments(corpus):
    assert next(corpus.train_batches(2, SEED)).segments is None
    assert corpus.validation_batches(4, 2).segments is None
    assert corpus.describe() == f"{corpus.num_train_rows} training rows of 16, vocabulary {corpus.vocab_size}"


def test_beginnings_are_those_of_documents_that_go_on(segmented):
    config, corpus = segmented
    documents = reader(config, SEED).distinct_documents()
    found = corpus.beginnings(5, 6)
    assert 1 <= len(found) <= 5
    for text_M in found:
        start = corpus.tokenizer.decode(text_M[:6])
        assert len(text_M) > 6 and len(start) == 6 and any(document.startswith(start) for document in documents)
    with pytest.raises(DataError, match=r"evaluation\.prompt_length = 16: no validation document is longer"):
        corpus.beginnings(5, 16)


def test_beginnings_of_wrapped_text_are_rows(corpus):
    np.testing.assert_array_equal(corpus.beginnings(3, 4), corpus.validation_rows(3).tokens)
