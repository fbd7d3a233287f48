"""Truncation against sorting, in f64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from step_by_step import truncated as by_sorting

from kforcing_jax.models.truncation import truncated


def cut(logits_xV, top_k_x, top_p_x):
    logits_xV = logits_xV - logits_xV.max(axis=-1, keepdims=True)
    return np.asarray(jax.jit(truncated)(jnp.float32(logits_xV), jnp.int32(top_k_x), jnp.float32(top_p_x)))


@pytest.mark.parametrize("vocab_size", [1, 13, 2000])
@pytest.mark.parametrize("unit", [None, 0.5], ids=["", "ties"])
def test_what_stays_is_what_sorting_leaves(vocab_size, unit):
    rng = np.random.default_rng(vocab_size)
    logits_BxV = np.float32(3 * rng.normal(size=(200, vocab_size)))
    if unit is not None:
        logits_BxV = np.round(logits_BxV / unit) * unit
    logits_BxV[rng.random(logits_BxV.shape) < 0.1] = -np.inf
    logits_BxV[:, 0] = 1.0
    logits_BxV -= logits_BxV.max(axis=1, keepdims=True)
    top_k_B = rng.choice([0, 1, 2, 7, vocab_size, 2**31 - 1], 200)
    top_p_B = np.where(rng.random(200) < 0.3, 1.0, rng.random(200) * 0.999 + 1e-4)
    expected = [by_sorting(*row) for row in zip(np.float64(logits_BxV), top_k_B, top_p_B, strict=True)]
    np.testing.assert_array_equal(cut(logits_BxV, top_k_B, top_p_B), np.float32(expected))


@pytest.mark.parametrize(
    ("top_k", "top_p", "stay"),
    [
        (0, 1.0, [0, 1, 2, 3, 4]),
        (1, 1.0, [1]),
        (0, 1e-6, [1]),
        (0, 0.51, [0, 1, 2]),  # half, a sixth, a sixth: equally likely tokens stay together
        (2, 1.0, [0, 1, 2]),
        (2, 0.55, [1]),  # of what top_k leaves 0.6 is the first one's
        (4, 0.999, [0, 1, 2, 3]),
    ],
)
def test_tokens_stay_by_hand(top_k, top_p, stay):
    logits_V = np.log(np.array([1 / 6, 1 / 2, 1 / 6, 1 / 10, 1 / 15]))
    found = cut(logits_V[None], [top_k], [top_p])[0]
    assert np.flatnonzero(np.isfinite(found)).tolist() == stay
    np.testing.assert_array_equal(found[stay], np.float32(logits_V - logits_V.max())[stay])


def test_what_is_not_truncated_keeps_every_token_however_unlikely():
    logits_1xV = np.array([[0.0, -80.0, -200.0, -np.inf]])
    np.testing.assert_array_equal(cut(logits_1xV, [0], [1.0]), np.float32(logits_1xV))
