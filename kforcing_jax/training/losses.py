"""Losses and what is reported next to them, per offset of the window."""

import jax
import jax.numpy as jnp
import optax

# A batch in which nothing carries loss has loss 0, not NaN.
_LEAST_WEIGHT = 1e-9


def next_token_loss(logits_BxNxV: jax.Array, tokens_BxN: jax.Array) -> jax.Array:
    """Cross entropy loss_BxN-1 (nats) of every token after the first."""
    return optax.softmax_cross_entropy_with_integer_labels(logits_BxNxV[:, :-1], tokens_BxN[:, 1:])


def window_loss(logits_BxNxKxV: jax.Array, targets_BxNxK: jax.Array) -> jax.Array:
    """Cross entropy loss_BxNxK (nats) of the student's windows against the teacher's tokens."""
    return optax.softmax_cross_entropy_with_integer_labels(logits_BxNxKxV, targets_BxNxK)


def weights_up_to_eos(targets_BxNxK: jax.Array, eos_id: int | None) -> jax.Array:
    """1 up to and including the first EOS of each window, 0 after it: weights_BxNxK, f32.

    What a teacher writes after its EOS is the beginning of another document; nobody will decode it.
    """
    if eos_id is None:
        return jnp.ones(targets_BxNxK.shape)
    is_eos = targets_BxNxK == eos_id
    eos_before_BxNxK = jnp.cumsum(is_eos, axis=-1) - is_eos
    return (eos_before_BxNxK == 0).astype(jnp.float32)


def window_metrics(
    logits_BxNxKxV: jax.Array, targets_BxNxK: jax.Array, weights_BxNxK: jax.Array
) -> tuple[jax.Array, dict[str, jax.Array]]:
    """The weighted mean loss over offsets and positions (paper, eq. 6), and scalar metrics.

    Metrics: `loss_j` and `agreement_j` (argmax equals the teacher's token) for j = 1..K, and `block_agreement`
    (all offsets that carry loss agree).
    """
    loss_BxNxK = window_loss(logits_BxNxKxV, targets_BxNxK)
    agrees_BxNxK = jnp.argmax(logits_BxNxKxV, axis=-1) == targets_BxNxK
    counts_K = jnp.maximum(weights_BxNxK.sum((0, 1)), _LEAST_WEIGHT)
    loss_K = (weights_BxNxK * loss_BxNxK).sum((0, 1)) / counts_K
    agreement_K = (weights_BxNxK * agrees_BxNxK).sum((0, 1)) / counts_K
    metrics = {"block_agreement": (agrees_BxNxK | (weights_BxNxK == 0)).all(axis=-1).mean()}
    for j in range(loss_K.shape[0]):
        metrics[f"loss_{j + 1}"], metrics[f"agreement_{j + 1}"] = loss_K[j], agreement_K[j]
    return jnp.sum(loss_K * counts_K) / counts_K.sum(), metrics
