"""Losses and what is reported next to them, as sums that can be added over parts of a batch."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import optax

from kforcing_jax.models.lm import text_positions
from kforcing_jax.noise import argmax

# A batch in which nothing carries loss has loss 0, not NaN.
_LEAST_WEIGHT = 1e-9


class Mean(NamedTuple):
    """A weighted mean in the making: means over the parts of a batch add up to the mean over all of it."""

    total: jax.Array
    weight: jax.Array

    @property
    def value(self) -> jax.Array:
        """total / weight; 0 where nothing has weight."""
        return self.total / jnp.maximum(self.weight, _LEAST_WEIGHT)


def weighted_mean(values: jax.Array, weights: jax.Array) -> Mean:
    """The mean of all values, weighted: scalars, f32."""
    return Mean(jnp.sum(weights * values), jnp.sum(weights))


def cross_entropy(logits_xV: jax.Array, targets_x: jax.Array) -> jax.Array:
    """-log p of the targets, columns of the logits: loss_x in nats, f32 (paper, eq. 6)."""
    return optax.softmax_cross_entropy_with_integer_labels(logits_xV, targets_x)


def loss_and_agreement(
    logits_xV: jax.Array, targets_x: jax.Array, loss: Callable[[jax.Array, jax.Array], jax.Array] = cross_entropy
) -> tuple[jax.Array, jax.Array]:
    """Of every token: loss_x, f32, and whether the argmax is the target (a column of the logits), bool."""
    return loss(logits_xV, targets_x), argmax(logits_xV) == targets_x


def next_token_weights(
    tokens_BxN: jax.Array, segments_BxN: jax.Array | None, answers_BxN: jax.Array | None = None
) -> jax.Array:
    """1 where the next position continues the same text, 0 at the end of a row or segment and in padding: f32.

    With `answers` only where the next token is of an answer.
    """
    continues_BxM = jnp.ones(tokens_BxN[:, 1:].shape, bool)
    if segments_BxN is not None:
        continues_BxM = (segments_BxN[:, 1:] == segments_BxN[:, :-1]) & (segments_BxN[:, 1:] > 0)
    if answers_BxN is not None:
        continues_BxM &= answers_BxN[:, 1:]
    return jnp.pad(continues_BxM.astype(jnp.float32), [(0, 0), (0, 1)])


def window_weights(
    window_BxNxK: jax.Array,
    tokens_BxN: jax.Array,
    segments_BxN: jax.Array | None,
    eos_id: int | None,
    skip_after_eos: bool = True,
    answers_BxN: jax.Array | None = None,
) -> jax.Array:
    """Which tokens of the window after every position carry loss: weights_BxNxK, f32.

    Those that a teacher has learnt to draw, and that are decoded:

    - at positions below N, beyond which nothing was trained;
    - up to the first EOS of a window, unless not `skip_after_eos`: what a teacher writes there is the beginning of
      another document;
    - in rows of several segments, of no window in the padding or after the EOS that ends a segment;
    - with `answers`, at the positions where the text has a token of an answer.

    `eos_id` is None where there is no EOS.
    """
    carries_BxNxK = _window_positions(window_BxNxK.shape, segments_BxN) < window_BxNxK.shape[1]
    if eos_id is not None and skip_after_eos:
        is_eos = window_BxNxK == eos_id
        carries_BxNxK &= (jnp.cumsum(is_eos, axis=-1) - is_eos) == 0
    if segments_BxN is not None:
        carries_BxNxK &= (segments_BxN > 0)[..., None]
        if eos_id is not None:
            carries_BxNxK &= (tokens_BxN != eos_id)[..., None]
    if answers_BxN is not None:
        carries_BxNxK &= _in_answers(answers_BxN, segments_BxN, window_BxNxK.shape[2])
    return carries_BxNxK.astype(jnp.float32)


def _in_answers(answers_BxN, segments_BxN, window):
    """Whether the text after every position goes on, within its segment, with a token of an answer: bool (B, N, K)."""
    length = answers_BxN.shape[1]
    index_NxK = jnp.arange(length)[:, None] + 1 + jnp.arange(window)
    at_NxK = jnp.minimum(index_NxK, length - 1)
    found_BxNxK = answers_BxN[:, at_NxK] & (index_NxK < length)
    if segments_BxN is None:
        return found_BxNxK
    return found_BxNxK & (segments_BxN[:, at_NxK] == segments_BxN[..., None])


def block_weights(weights_BxNxK: jax.Array, segments_BxN: jax.Array | None) -> jax.Array:
    """Which windows count as whole blocks: weights_BxN, of those that carry loss and end below position N."""
    ends_below_BxN = _window_positions(weights_BxNxK.shape, segments_BxN)[..., -1] < weights_BxNxK.shape[1]
    return weights_BxNxK[..., 0] * ends_below_BxN


def _window_positions(shape_BxNxK, segments_BxN):
    """Absolute positions of the tokens of every window."""
    return text_positions(shape_BxNxK[:2], segments_BxN)[..., None] + 1 + jnp.arange(shape_BxNxK[2])


def block_agreement(agrees_BxNxK: jax.Array, weights_BxNxK: jax.Array, blocks_BxN: jax.Array) -> Mean:
    """How often all offsets that carry weight agree, of the windows that count as blocks."""
    return weighted_mean((agrees_BxNxK | (weights_BxNxK == 0)).all(axis=-1), blocks_BxN)


def window_metrics(
    loss_BxNxK: jax.Array, agrees_BxNxK: jax.Array, weights_BxNxK: jax.Array, blocks_BxN: jax.Array
) -> tuple[Mean, dict[str, Mean]]:
    """The mean loss over offsets and positions (paper, eq. 6), and what is reported next to it.

    Metrics: `loss_j` and `agreement_j` (argmax equals the teacher's token) for j = 1..K, and `block_agreement`
    (all offsets that carry loss agree, of windows with `block_weights`).
    """
    metrics = {"block_agreement": block_agreement(agrees_BxNxK, weights_BxNxK, blocks_BxN)}
    for j in range(loss_BxNxK.shape[2]):
        weights_BxN = weights_BxNxK[..., j]
        metrics[f"loss_{j + 1}"] = weighted_mean(loss_BxNxK[..., j], weights_BxN)
        metrics[f"agreement_{j + 1}"] = weighted_mean(agrees_BxNxK[..., j], weights_BxN)
    return weighted_mean(loss_BxNxK, weights_BxNxK), metrics
