"""Rotary positions (Su et al., 2021), and the ways in which the Llama family stretches them to longer texts."""

import math

import jax
import jax.numpy as jnp

from kforcing_jax.architecture import Rope


def rotary_frequencies(rope: Rope, head_width: int) -> jax.Array:
    """Radians per position of each of the C / 2 channel pairs, f32."""
    plain = rope.base ** (-jnp.arange(0, head_width, 2, dtype=jnp.float32) / head_width)
    return {"default": _plain, "linear": _linear, "llama3": _llama3, "yarn": _yarn}[rope.scaling](rope, plain)


def _plain(rope, frequencies):
    del rope
    return frequencies


def _linear(rope, frequencies):
    """Positions are divided (Chen et al., 2023)."""
    return frequencies / rope.factor


def _llama3(rope, frequencies):
    """Divided where there are few turns in the original length, unchanged where there are many, blended between."""
    turns = rope.original_length * frequencies / (2 * math.pi)
    kept = (turns - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    return _blended(frequencies, rope.factor, jnp.clip(kept, 0, 1))


def _yarn(rope, frequencies):
    """The same with a ramp over channels (Peng et al., 2023), from `beta_fast` to `beta_slow` turns."""
    pairs = len(frequencies)

    def channel(turns):
        return pairs * math.log(rope.original_length / (turns * 2 * math.pi)) / math.log(rope.base)

    first, last = channel(rope.beta_fast), channel(rope.beta_slow)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, 2 * pairs - 1)
    last += 0.001 * (first == last)  # a ramp of no length
    divided = jnp.clip((jnp.arange(pairs, dtype=jnp.float32) - first) / (last - first), 0, 1)
    return _blended(frequencies, rope.factor, 1 - divided)


def _blended(frequencies, factor, kept):
    return frequencies / factor * (1 - kept) + frequencies * kept


def rotary_angles(positions: jax.Array, rope: Rope, head_width: int) -> tuple[jax.Array, jax.Array]:
    """(cos, sin) of shape (*positions.shape, 1, C / 2), f32; the 1 broadcasts over heads."""
    angles = positions[..., None, None].astype(jnp.float32) * rotary_frequencies(rope, head_width)
    cos, sin = jnp.cos(angles), jnp.sin(angles)
    return (cos, sin) if rope.attention_factor == 1 else (cos * rope.attention_factor, sin * rope.attention_factor)


def rotate(x_xHxC: jax.Array, cos: jax.Array, sin: jax.Array) -> jax.Array:
    """Rotated x_xHxC of the same dtype, cos and sin as of `rotary_angles`: channel c pairs with channel c + C/2."""
    first, second = jnp.split(x_xHxC.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x_xHxC.dtype)
