"""What each stride keeps, by hand."""

import jax.numpy as jnp
import numpy as np
import pytest

from kforcing_jax.decoding import strides


def test_the_fixed_stride_keeps_all():
    assert strides.fixed(jnp.array([1, 4])).tolist() == [1, 4]


@pytest.mark.parametrize(
    ("probabilities", "confidence", "k", "keeps"),
    [
        ([0.9, 0.9, 0.9, 0.9], 0.0, 4, 4),
        ([0.0, 0.0, 0.0, 0.0], 0.0, 4, 4),  # 0 keeps all, however unlikely
        ([0.9, 0.9, 0.9, 0.9], 0.7, 4, 3),  # .9 .81 .729 .656
        ([0.9, 0.5, 0.9, 0.9], 0.46, 4, 1),
        ([0.1, 0.9, 0.9, 0.9], 0.5, 4, 1),  # the first is always kept
        ([1.0, 1.0, 1.0, 1.0], 1.0, 4, 4),
        ([1.0, 1.0, 1.0, 1.0], 0.5, 2, 2),  # no more than the request's k
        ([0.5, 1.0, 1.0, 1.0], 0.5, 4, 4),  # at least
    ],
)
def test_the_confident_stride_keeps_what_is_likely_together(probabilities, confidence, k, keeps):
    kept = strides.confident(jnp.array([probabilities]), jnp.array([confidence]), jnp.array([k]))
    assert kept.tolist() == [keeps]


@pytest.mark.parametrize(
    ("draft", "teacher", "k", "keeps"),
    [
        ([1, 2, 3], [1, 2, 3, 4], 3, 4),  # all, and the one after them
        ([1, 2, 3], [1, 9, 3, 4], 3, 2),  # the teacher's version of the first that differs
        ([1, 2, 3], [9, 2, 3, 4], 3, 1),
        ([1, 2, 3], [1, 2, 3, 4], 1, 2),  # a request with a smaller window
    ],
)
def test_the_exact_stride_keeps_the_teachers_tokens_after_equal_drafts(draft, teacher, k, keeps):
    assert strides.exact(jnp.array([draft]), jnp.array([teacher]), jnp.array([k])).tolist() == [keeps]


def test_rows_have_strides_of_their_own():
    probabilities = jnp.array([[0.9, 0.9], [0.9, 0.1]])
    kept = strides.confident(probabilities, jnp.array([0.5, 0.5]), jnp.array([2, 2]))
    assert np.array_equal(kept, [2, 1])


@pytest.mark.parametrize(
    ("odds", "k", "count", "ends"),
    [
        ([0.0, 0.0, 0.0], 4, 1, [0]),  # no draft is there
        ([0.9, 0.9, 0.9], 4, 1, [3]),  # .1 .09 .081 .729
        ([0.9, 0.1, 0.9], 4, 2, [0, 1]),  # .1 .81 .009 .081
        ([0.9, 0.1, 0.9], 4, 3, [0, 1, 3]),
        ([0.9, 0.9, 0.9], 2, 1, [1]),  # a request with a smaller window
        ([0.5, 0.5, 0.5], 4, 4, [0, 1, 2, 3]),
    ],
)
def test_windows_hang_where_drafts_most_likely_stop_being_right(odds, k, count, ends):
    assert strides.likely_ends(jnp.array([odds]), jnp.array([k]), count).tolist() == [ends]
