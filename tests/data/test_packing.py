"""Documents into rows."""

import numpy as np
import pytest

from kforcing_jax.data.packing import best_fit, pack

DOCUMENTS = [np.arange(1, n + 1) for n in (3, 7, 2, 5, 1, 12)]


def test_wrapped_documents_lie_end_to_end_and_the_remainder_is_dropped():
    rows = pack(DOCUMENTS, "wrapped", 8, padding=0)
    np.testing.assert_array_equal(rows.tokens_RxN.ravel(), np.concatenate(DOCUMENTS)[:24])
    assert rows.segments_RxN is None and rows.useful_tokens == 24 and rows.documents == 6


def test_padded_documents_have_a_row_each():
    rows = pack(DOCUMENTS, "padded", 8, padding=0)
    for row, document in enumerate(DOCUMENTS):
        np.testing.assert_array_equal(rows.tokens_RxN[row], np.pad(document[:8], (0, 8 - min(len(document), 8))))
    np.testing.assert_array_equal(rows.segments_RxN, rows.tokens_RxN > 0)


def test_segments_count_up_in_a_row_and_padding_is_at_its_end():
    rows = pack(DOCUMENTS, "segments", 8, padding=0)
    assert len(rows.tokens_RxN) < len(DOCUMENTS)
    for tokens_N, segments_N in zip(rows.tokens_RxN, rows.segments_RxN, strict=True):
        used = int((segments_N > 0).sum())
        assert (segments_N[used:] == 0).all() and (tokens_N[used:] == 0).all()
        assert segments_N[0] == 1 and set(np.diff(segments_N[:used].astype(int))) <= {0, 1}
        # Every document counts from 1 here, so a new one begins exactly where the id changes.
        np.testing.assert_array_equal(tokens_N[1:used] == 1, np.diff(segments_N[:used].astype(int)) == 1)
    assert rows.useful_tokens == sum(min(len(document), 8) for document in DOCUMENTS)


def test_the_same_documents_give_the_same_rows():
    first, second = (pack(DOCUMENTS, "segments", 8, padding=0) for _ in range(2))
    np.testing.assert_array_equal(first.tokens_RxN, second.tokens_RxN)


@pytest.mark.parametrize("mean_length", [10, 30])
def test_rows_of_sentences_are_nearly_full(mean_length):
    lengths = np.clip(np.random.default_rng(0).gamma(4, mean_length / 4, 20_000).astype(int), 1, 128)
    rows = best_fit(lengths, 128)
    assert np.bincount(rows, weights=lengths).max() <= 128
    assert lengths.sum() / (128 * (max(rows) + 1)) > 0.97


def test_framed_documents_lie_end_to_end_between_two_ids():
    wrapped = pack(DOCUMENTS, "wrapped", 6, padding=0).tokens_RxN
    framed = pack(DOCUMENTS, "framed", 8, padding=0, frame=(101, 102)).tokens_RxN
    np.testing.assert_array_equal(framed[:, 1:-1], wrapped)
    assert set(framed[:, 0]) == {101} and set(framed[:, -1]) == {102}


@pytest.mark.parametrize("packing", ["wrapped", "framed", "segments", "padded"])
def test_no_documents_make_no_rows(packing):
    rows = pack([], packing, 8, padding=0, frame=(1, 2) if packing == "framed" else None)
    assert rows.tokens_RxN.shape == (0, 8) and rows.useful_tokens == rows.documents == 0
