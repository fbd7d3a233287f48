"""Truncation: only the likeliest tokens can be drawn. Rows of logits x, each with settings of its own.

The tokens that stay are those above a threshold, which is searched for, not sorted for: the 31 bits of a non-negative
f32 are ordered as it is, so 31 sums over the vocabulary find it exactly. Tokens that are equally likely stay together.
"""

import jax
import jax.numpy as jnp

# Infinity: a token with this key has no probability.
_LAST = 0x7F800000


def truncated(logits_xV: jax.Array, top_k_x: jax.Array, top_p_x: jax.Array) -> jax.Array:
    """Logits without the tokens that are cut off: -inf, and the others as they were.

    Args:
      logits_xV: their maximum is 0.
      top_k_x: so many of the likeliest stay, and those as likely as the last of them; 0 keeps all.
      top_p_x: of what these leave, as `nucleus`.
    """
    keys_xV = _keys(logits_xV)
    count_x = jnp.where(top_k_x > 0, jnp.minimum(top_k_x, logits_xV.shape[-1]), logits_xV.shape[-1])
    last_x = _least_key(keys_xV, jnp.ones_like(logits_xV), count_x.astype(jnp.float32))
    return nucleus(_up_to(last_x, keys_xV, logits_xV), top_p_x)


def nucleus(logits_xV: jax.Array, top_p_x: jax.Array | float) -> jax.Array:
    """Logits without the tokens outside the nucleus: -inf, and the others as they were.

    Args:
      logits_xV: their maximum is 0.
      top_p_x: the fewest tokens stay that together have at least this much of the probability, and those as likely as
        the last of them; 1 keeps all.
    """
    keys_xV, weights_xV = _keys(logits_xV), jnp.exp(logits_xV)
    reached_x = _least_key(keys_xV, weights_xV, top_p_x * jnp.sum(weights_xV, axis=-1))
    return _up_to(jnp.where(jnp.asarray(top_p_x) < 1, reached_x, _LAST), keys_xV, logits_xV)


def _keys(logits_xV):
    """The likelier, the less."""
    return jax.lax.bitcast_convert_type(jnp.abs(logits_xV), jnp.int32)


def _up_to(last_x, keys_xV, logits_xV):
    return jnp.where(keys_xV <= last_x[..., None], logits_xV, -jnp.inf)


def _least_key(keys_xV, weights_xV, target_x):
    """The least key such that the tokens up to it weigh at least the target."""

    def halve(_, bounds):
        low_x, high_x = bounds
        middle_x = low_x + (high_x - low_x) // 2
        weight_x = jnp.sum(jnp.where(keys_xV <= middle_x[..., None], weights_xV, 0), axis=-1)
        is_enough_x = weight_x >= target_x
        return jnp.where(is_enough_x, low_x, middle_x + 1), jnp.where(is_enough_x, middle_x, high_x)

    bounds = jnp.zeros_like(target_x, jnp.int32), jnp.full_like(target_x, _LAST, jnp.int32)
    return jax.lax.fori_loop(0, 31, halve, bounds)[1]
