import math

import numpy as np
import pytest

from kforcing_jax.evaluation.text_metrics import distinct_n, repetition, token_entropy


def test_distinct_n_counts_over_the_whole_sample():
    # Bigrams: 12, 23 | 12, 24: three distinct of four.
    assert distinct_n([[1, 2, 3], [1, 2, 4]], 2) == 0.75


def test_ngrams_do_not_cross_rows():
    assert distinct_n([[1, 2], [1, 2]], 2) == 0.5
    assert distinct_n([[1, 2, 1, 2]], 2) == pytest.approx(2 / 3)


def test_distinct_n_matches_sets_of_tuples():
    rng = np.random.default_rng(0)
    rows = [rng.integers(0, 5, length) for length in (1, 2, 7, 30)]
    for n in (1, 2, 3, 4):
        ngrams = [tuple(row[i : i + n]) for row in rows for i in range(len(row) - n + 1)]
        assert distinct_n(rows, n) == len(set(ngrams)) / len(ngrams)


def test_token_entropy_is_the_mean_over_samples_and_not_the_pooled_entropy():
    constant_rows = [[1] * 8, [2] * 8]  # pooled, they have log 2
    assert token_entropy(constant_rows) == 0
    assert token_entropy([[1, 2, 3, 4], [5, 5, 6, 6]]) == pytest.approx((math.log(4) + math.log(2)) / 2)


def test_repetition_is_within_a_row():
    assert repetition([[1, 2, 3, 4, 5]] * 3) == 0
    # Five 4-grams of the constant row, one distinct.
    assert repetition([[7] * 8]) == pytest.approx(0.8)
    assert repetition([[7] * 8, list(range(8))]) == pytest.approx(0.4)


@pytest.mark.parametrize("rows", [[], [[]], [[1], np.array([], int)]])
def test_samples_too_short_to_measure_give_zero(rows):
    assert distinct_n(rows, 2) == repetition(rows) == token_entropy(rows) == 0


def test_short_rows_are_left_out_of_the_mean():
    long = [7] * 8
    assert repetition([long, [1, 2], []]) == repetition([long])
    assert token_entropy([[1, 2], []]) == pytest.approx(math.log(2))
