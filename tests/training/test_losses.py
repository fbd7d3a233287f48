"""Losses against plain numpy, and the EOS rule."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kforcing_jax.training.losses import (
    block_weights,
    loss_and_agreement,
    next_token_weights,
    weighted_mean,
    window_metrics,
    window_weights,
)

EOS = 0


def weights_of(windows, length, eos_id, segments=None, tokens=None, skip_after_eos=True, answers=None):
    """Weights of the windows of a row of `length` tokens; those that are not given are 3, 3, ..."""
    windows = np.array(windows)
    padded = np.full((1, length, windows.shape[1]), 3)
    padded[0, : len(windows)] = windows
    tokens = np.ones((1, length), int) if tokens is None else np.array([tokens])
    segments = None if segments is None else jnp.array([segments])
    answers = None if answers is None else jnp.array([answers], bool)
    return window_weights(jnp.asarray(padded), jnp.asarray(tokens), segments, eos_id, skip_after_eos, answers)[0]


def test_tokens_after_the_first_eos_of_a_window_carry_no_weight():
    weights = weights_of([[3, EOS, 5, EOS], [EOS, 1, 1, 1], [1, 2, 3, 4]], 9, EOS)
    assert weights[:3].tolist() == [[1, 1, 0, 0], [1, 0, 0, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("eos_id, skip", [(None, True), (EOS, False)])
def test_without_an_eos_or_the_rule_every_offset_carries_weight(eos_id, skip):
    assert weights_of([[3, EOS, 5]], 4, eos_id, skip_after_eos=skip)[0].tolist() == [1, 1, 1]


def test_tokens_beyond_the_longest_text_carry_no_weight():
    """No teacher has learnt what follows the last position, and nobody decodes there."""
    assert weights_of([[3, 3, 3]], 4, EOS).tolist() == [[1, 1, 1], [1, 1, 0], [1, 0, 0], [0, 0, 0]]


@pytest.mark.parametrize("skip", [True, False])
def test_no_window_hangs_off_padding_or_off_the_end_of_a_segment(skip):
    tokens, segments = [4, 5, EOS, 6, 7, EOS], [1, 1, 1, 2, 2, 0]
    assert weights_of([[3, 3]], 6, EOS, segments, tokens, skip)[:, 0].tolist() == [1, 1, 0, 1, 1, 0]


def test_next_tokens_count_within_a_segment_only():
    tokens, segments = jnp.ones((1, 6), int), jnp.array([[1, 1, 2, 2, 0, 0]])
    assert next_token_weights(tokens, segments).tolist() == [[1, 0, 1, 0, 0, 0]]
    assert next_token_weights(tokens, None).tolist() == [[1, 1, 1, 1, 1, 0]]


def test_of_an_answer_its_tokens_count_whatever_they_are_predicted_from():
    tokens, answers = jnp.ones((1, 7), int), jnp.array([[0, 0, 1, 1, 0, 0, 1]], bool)
    assert next_token_weights(tokens, None, answers).tolist() == [[0, 1, 1, 0, 0, 1, 0]]
    # The last of a segment is before the first of the next, and does not predict it.
    segments = jnp.array([[1, 1, 1, 2, 2, 0, 0]])
    assert next_token_weights(tokens, segments, answers).tolist() == [[0, 1, 0, 0, 0, 0, 0]]


def test_tokens_of_a_window_count_where_the_text_goes_on_with_an_answer():
    windows, answers = [[3, 3, 3]] * 6, [0, 0, 1, 1, 0, 1]
    by_hand = [[0, 1, 1], [1, 1, 0], [1, 0, 1], [0, 1, 0], [1, 0, 0], [0, 0, 0]]
    assert weights_of(windows, 6, None, answers=answers).tolist() == by_hand
    # The rule of what comes after an EOS still holds.
    assert weights_of([[EOS, 3, 3], *windows[1:]], 6, EOS, answers=answers)[0].tolist() == [0, 0, 0]
    # A window that goes on beyond its segment finds no answer there.
    of_segments = weights_of(windows, 6, None, segments=[1, 1, 1, 2, 2, 2], answers=answers)
    assert of_segments.tolist() == [[0, 1, 0], [1, 0, 0], [0, 0, 0], [0, 1, 0], [1, 0, 0], [0, 0, 0]]


def test_weights_are_what_they_were_where_every_token_is_of_an_answer():
    tokens, segments = jnp.ones((1, 6), int), jnp.array([[1, 1, 2, 2, 2, 0]])
    everywhere = jnp.ones((1, 6), bool)
    for of_row in (None, segments):
        np.testing.assert_array_equal(
            next_token_weights(tokens, of_row, everywhere), next_token_weights(tokens, of_row)
        )
    np.testing.assert_array_equal(weights_of([[3, 3]] * 6, 6, EOS, answers=[1] * 6), weights_of([[3, 3]] * 6, 6, EOS))


def test_loss_and_agreement_of_every_token():
    logits = jax.random.normal(jax.random.key(0), (2, 5, 7))
    targets = jax.random.randint(jax.random.key(1), (2, 5), 0, 7)
    loss, agrees = loss_and_agreement(logits, targets)
    expected = -np.take_along_axis(np.asarray(jax.nn.log_softmax(logits)), np.asarray(targets)[..., None], -1)[..., 0]
    np.testing.assert_allclose(loss, expected, rtol=1e-6)
    np.testing.assert_array_equal(agrees, logits.argmax(-1) == targets)


def test_means_of_parts_add_up_to_the_mean_of_the_whole(rng):
    values, weights = rng.random((2, 10)), rng.random((2, 10)) < 0.5
    parts = [weighted_mean(v, w) for v, w in zip(values, weights, strict=True)]
    summed = jax.tree.map(lambda a, b: a + b, *parts)
    np.testing.assert_allclose(summed.value, values[weights].mean(), rtol=1e-6)


def test_window_metrics_equal_plain_averages_over_the_offsets_that_count():
    batch, length, window, vocab = 2, 7, 4, 5
    logits = jax.random.normal(jax.random.key(0), (batch, length, window, vocab))
    targets = jax.random.randint(jax.random.key(1), (batch, length, window), 0, vocab)
    weights = np.asarray(window_weights(targets, jnp.ones((batch, length), int), None, EOS))
    assert 0 < weights.sum() < weights.size
    per_token = loss_and_agreement(logits, targets)
    loss, metrics = window_metrics(*per_token, jnp.asarray(weights), block_weights(weights, None))
    loss, metrics = loss.value, {name: mean.value for name, mean in metrics.items()}

    log_probs, hits = np.asarray(jax.nn.log_softmax(logits)), np.asarray(logits.argmax(-1) == targets)
    nll = -np.take_along_axis(log_probs, np.asarray(targets)[..., None], -1)[..., 0]
    np.testing.assert_allclose(loss, (nll * weights).sum() / weights.sum(), rtol=1e-6)
    for j in range(window):
        count = weights[..., j].sum()
        np.testing.assert_allclose(metrics[f"loss_{j + 1}"], (nll * weights)[..., j].sum() / count, rtol=1e-6)
        np.testing.assert_allclose(metrics[f"agreement_{j + 1}"], (hits * weights)[..., j].sum() / count, rtol=1e-6)
    # Windows after the first three positions end before position seven.
    np.testing.assert_allclose(metrics["block_agreement"], (hits | (weights == 0))[:, :3].all(-1).mean(), rtol=1e-6)


def test_a_batch_in_which_nothing_counts_has_loss_zero_and_a_finite_gradient():
    targets = jnp.ones((1, 2, 2), jnp.int32)

    def loss(logits):
        nothing = jnp.zeros((1, 2, 2))
        return window_metrics(*loss_and_agreement(logits, targets), nothing, nothing[..., 0])[0].value

    value, grad = jax.value_and_grad(loss)(jnp.ones((1, 2, 2, 3)))
    assert value == 0 and np.isfinite(grad).all() and not np.any(grad)
