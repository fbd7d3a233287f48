"""Losses against plain numpy, and the EOS rule."""

import jax
import jax.numpy as jnp
import numpy as np

from kforcing_jax.training.losses import next_token_loss, weights_up_to_eos, window_metrics

EOS = 0


def test_tokens_after_the_first_eos_of_a_window_carry_no_weight():
    targets = jnp.array([[[3, EOS, 5, EOS], [EOS, 1, 1, 1], [1, 2, 3, 4]]])
    expected = [[[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]]
    assert weights_up_to_eos(targets, EOS).tolist() == expected


def test_without_an_eos_every_offset_carries_weight():
    assert weights_up_to_eos(jnp.array([[[3, EOS, 5]]]), None).tolist() == [[[1, 1, 1]]]


def test_next_token_loss_scores_each_token_by_the_position_before_it():
    logits = jax.random.normal(jax.random.key(0), (2, 5, 7))
    tokens = jax.random.randint(jax.random.key(1), (2, 5), 0, 7)
    log_probs = np.asarray(jax.nn.log_softmax(logits))
    expected = [[-log_probs[b, n, tokens[b, n + 1]] for n in range(4)] for b in range(2)]
    np.testing.assert_allclose(next_token_loss(logits, tokens), expected, rtol=1e-6)


def test_window_metrics_equal_plain_averages_over_the_offsets_that_count():
    batch, length, window, vocab = 2, 3, 4, 5
    logits = jax.random.normal(jax.random.key(0), (batch, length, window, vocab))
    targets = jax.random.randint(jax.random.key(1), (batch, length, window), 0, vocab)
    weights = np.asarray(weights_up_to_eos(targets, EOS))
    assert 0 < weights.sum() < weights.size
    loss, metrics = window_metrics(logits, targets, jnp.asarray(weights))

    log_probs, hits = np.asarray(jax.nn.log_softmax(logits)), np.asarray(logits.argmax(-1) == targets)
    nll = -np.take_along_axis(log_probs, np.asarray(targets)[..., None], -1)[..., 0]
    np.testing.assert_allclose(loss, (nll * weights).sum() / weights.sum(), rtol=1e-6)
    for j in range(window):
        count = weights[..., j].sum()
        np.testing.assert_allclose(metrics[f"loss_{j + 1}"], (nll * weights)[..., j].sum() / count, rtol=1e-6)
        np.testing.assert_allclose(metrics[f"agreement_{j + 1}"], (hits * weights)[..., j].sum() / count, rtol=1e-6)
    np.testing.assert_allclose(metrics["block_agreement"], (hits | (weights == 0)).all(-1).mean(), rtol=1e-6)


def test_a_batch_in_which_nothing_counts_has_loss_zero_and_a_finite_gradient():
    targets = jnp.ones((1, 2, 2), jnp.int32)
    grad = jax.grad(lambda x: window_metrics(x, targets, jnp.zeros((1, 2, 2)))[0])(jnp.ones((1, 2, 2, 3)))
    assert np.isfinite(grad).all() and not np.any(grad)
