"""The uniform noise, and the map between a uniform and a token (inverse CDF) in both directions.

Noise belongs to the position: the uniform of a request at absolute position p is a function of (seed, p)
alone, so decoding with any k, in any batch, uses the same one.
"""

import math

import jax
import jax.numpy as jnp

# Granularity of the uniforms: the largest one, 1 - 2^-24, is the f32 below 1.
_UNIFORM_BITS = 24

# |F_f32(v) - F_f64(v)| stays below this, two ulps of 1, for every v and V up to 50,258 (measured by test_noise.py).
CDF_ERROR_BOUND = 2.0**-22


def sample_uniform(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Independent uniforms in [0, 1) on the 2^-24 grid, f32 (`jax.random.uniform` only has 2^-23)."""
    bits = jax.random.bits(key, shape, jnp.uint32)
    return (bits >> (32 - _UNIFORM_BITS)).astype(jnp.float32) * 2.0**-_UNIFORM_BITS


def position_noise(seeds_B: jax.Array, positions_BxT: jax.Array) -> jax.Array:
    """The uniforms u_BxT of requests `seeds_B` (uint32) at absolute positions: pure in (seed, position)."""

    def one(seed, position):
        return sample_uniform(jax.random.fold_in(jax.random.key(seed), position), ())

    return jax.vmap(jax.vmap(one, (None, 0)))(seeds_B, positions_BxT)


def _cumulative_weights(logits_xV):
    """Unnormalised probabilities and their running sums, (weights_xV, sums_xV), f32.

    Sums run in two levels, sqrt(V) blocks and then within a block, and carry their rounding errors along. Plain f32
    sums lose the tail behind a confident token: each of its terms is below the rounding of the sum (an error of
    2.5e-6 at V = 50,258). Dividing by the last sum, not by exp(logsumexp), makes F end at 1.
    """
    logits_xV = logits_xV.astype(jnp.float32)
    weights_xV = jnp.exp(logits_xV - jnp.max(logits_xV, axis=-1, keepdims=True))
    *batch, vocab = weights_xV.shape
    width = math.isqrt(vocab - 1) + 1
    padding = [(0, 0)] * len(batch) + [(0, -vocab % width)]
    blocks = jnp.pad(weights_xV, padding).reshape(*batch, -1, width)
    within = _running_sums(blocks, jnp.zeros_like(blocks))
    ends = _running_sums(*(part[..., -1] for part in within))
    before = tuple(jnp.pad(part, [(0, 0)] * len(batch) + [(1, 0)])[..., :-1, None] for part in ends)
    total, error = _add(before, within)
    return weights_xV, (total + error).reshape(*batch, -1)[..., :vocab]


def _running_sums(total, error):
    return jax.lax.associative_scan(_add, (total, error), axis=-1)


def _add(a, b):
    """Sum of two (value, error) pairs, with the rounding error of the sum kept (Knuth's two-sum)."""
    (a, a_error), (b, b_error) = a, b
    total = a + b
    part_of_b = total - a
    error = ((a - (total - part_of_b)) + (b - part_of_b)) + (a_error + b_error)
    rounded = total + error
    return rounded, error - (rounded - total)


def cdf(logits_xV: jax.Array) -> jax.Array:
    """F(v) = P(token <= v) in vocabulary order, f32, within `CDF_ERROR_BOUND` of exact."""
    _, sums_xV = _cumulative_weights(logits_xV)
    return sums_xV / sums_xV[..., -1:]


def inverse_cdf(logits_xV: jax.Array, u_x: jax.Array) -> jax.Array:
    """token(u) = min { v : F(v) > u }, in vocabulary order (paper, section 3.1).

    Args:
      logits_xV: logits, already divided by the temperature; -inf means probability zero.
      u_x: uniforms in [0, 1).

    Returns:
      tokens_x, int32. A token whose f32 probability is zero is never returned, at u = 0 or anywhere else.
      A token can differ from the exact one only where u is within `CDF_ERROR_BOUND` of a bin edge.
    """
    weights_xV, sums_xV = _cumulative_weights(logits_xV)
    possible_xV = weights_xV > 0
    beyond_xV = possible_xV & (sums_xV > u_x[..., None] * sums_xV[..., -1:])
    # u * total can round up to total; the bin of such a u is the last one.
    last_x = weights_xV.shape[-1] - 1 - jnp.argmax(possible_xV[..., ::-1], axis=-1)
    tokens_x = jnp.where(beyond_xV.any(axis=-1), jnp.argmax(beyond_xV, axis=-1), last_x)
    return tokens_x.astype(jnp.int32)


def noise_within_bins(logits_xV: jax.Array, tokens_x: jax.Array, fraction_x: jax.Array) -> jax.Array:
    """The uniform that lies `fraction_x` (in [0, 1)) of the way through the bin of each token: u_x."""
    weights_xV, sums_xV = _cumulative_weights(logits_xV)
    total_x = sums_xV[..., -1]

    def pick(values_xV, index_x):
        return jnp.take_along_axis(values_xV, index_x[..., None], axis=-1)[..., 0]

    lower_x = jnp.where(tokens_x > 0, pick(sums_xV, jnp.maximum(tokens_x - 1, 0)), 0.0)
    u_x = (lower_x + fraction_x * pick(weights_xV, tokens_x)) / total_x
    u_x = _clip_to_bin(u_x, lower_x, pick(sums_xV, tokens_x), total_x)
    return jnp.clip(u_x, 0.0, 1.0 - 2.0**-_UNIFORM_BITS)


def _clip_to_bin(u_x, lower_x, upper_x, total_x):
    """Moves u, which rounding may have put on or past an edge, to where lower <= u * total < upper in f32."""
    least_x, most_x = lower_x / total_x, upper_x / total_x
    least_x = jnp.where(least_x * total_x < lower_x, jnp.nextafter(least_x, jnp.float32(1)), least_x)
    for _ in range(2):  # the quotient and the product round once each
        most_x = jnp.where(most_x * total_x >= upper_x, jnp.nextafter(most_x, jnp.float32(0)), most_x)
    return jnp.clip(u_x, least_x, most_x)


def invert_noise(logits_BxNxV: jax.Array, tokens_BxN: jax.Array, key: jax.Array) -> jax.Array:
    """Noise under which a teacher with these logits would have drawn the given text.

    `logits[:, n]` predict `tokens[:, n + 1]`, so the result u_BxN-1 belongs to tokens 1..N-1; within its bin
    each uniform is random (`key`). `inverse_cdf` maps it back to the tokens wherever a bin is wider than
    2 * CDF_ERROR_BOUND; narrower bins cannot be resolved in f32. Vocabulary order, like `inverse_cdf` (the
    released code inverts in order of descending probability, which its own forward sampler does not use).
    """
    targets_BxM = tokens_BxN[:, 1:]
    return noise_within_bins(logits_BxNxV[:, :-1], targets_BxM, sample_uniform(key, targets_BxM.shape))
