"""The key-value cache of one layer: a row of slots for every request, written at its end, attended over while live."""

import jax
import jax.numpy as jnp

from kforcing_jax.models.keys import KeyValue
from kforcing_jax.sharding import ROWS, constrain, platform

# Keys and values (B, H, S, C): the axes that attention multiplies over are the last two.
Cache = KeyValue

# Slots that are attended over at a time where a loop ends after the last live one.
BLOCK = 64


def allocate(rows: int, heads: int, slots: int, width: int, dtype) -> Cache:
    """An empty cache; what it holds is never seen before it is written."""
    empty = jnp.zeros((rows, heads, slots, width), dtype)
    return Cache(constrain(empty, ROWS, "tensor"), constrain(empty, ROWS, "tensor"))


def write(cache: Cache, new_BxGxHxC: KeyValue, start_B: jax.Array) -> Cache:
    """Keys and values of G tokens into slots start, start + 1, ... of every row; `start + G <= S`.

    Numbers only: slots that are not seen have weight 0, and 0 times what damaged weights leave there would be NaN, also
    for the next request of that row.
    """

    def one_row(slots_HxSxC, new_GxHxC, start):
        new_HxGxC = jnp.nan_to_num(jnp.swapaxes(new_GxHxC, 0, 1), posinf=0, neginf=0).astype(slots_HxSxC.dtype)
        return jax.lax.dynamic_update_slice_in_dim(slots_HxSxC, new_HxGxC, start, axis=1)

    written = jax.tree.map(lambda slots, new: jax.vmap(one_row)(slots, new, start_B), cache, new_BxGxHxC)
    return jax.tree.map(lambda slots: constrain(slots, ROWS, "tensor"), written)


def attention(q_BxGxHxC: jax.Array, cache: Cache, last_BxG: jax.Array, live: int, precision: str) -> jax.Array:
    """Attention out_BxGxHxC of every query over slots 0 to `last` of its row. Scores and softmax are f32.

    `live` slots are all that any query sees. On a CPU a loop over blocks of slots ends with the last that is seen, so
    that a row's result does not depend on how long others are, to the last bit; elsewhere it is one softmax.
    """
    q_BxHxGxC = jnp.swapaxes(q_BxGxHxC, 1, 2)
    over = _in_blocks if platform() == "cpu" else _at_once
    return jnp.swapaxes(over(q_BxHxGxC, cache, last_BxG, live, precision), 1, 2)


def _at_once(q_BxHxGxC, cache, last_BxG, live, precision):
    keys, values = (kv[:, :, :live] for kv in cache)
    scores = _scores(q_BxHxGxC, keys, jnp.arange(live) <= last_BxG[:, None, :, None], precision)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    return jnp.einsum("BHGS,BHSC->BHGC", weights, values, precision=precision)


def _in_blocks(q_BxHxGxC, cache, last_BxG, live, precision):
    """Softmax over one block after the other, with the sums rescaled to the largest score so far."""

    def one_block(index, carry):
        most, total, out = carry
        keys, values = (jax.lax.dynamic_slice_in_dim(kv, index * BLOCK, BLOCK, axis=2) for kv in cache)
        seen = index * BLOCK + jnp.arange(BLOCK) <= last_BxG[:, None, :, None]
        scores = _scores(q_BxHxGxC, keys, seen, precision)
        new_most = jnp.maximum(most, scores.max(-1, keepdims=True))
        weights, kept = jnp.exp(scores - new_most), jnp.exp(most - new_most)
        added = jnp.einsum("BHGS,BHSC->BHGC", weights.astype(values.dtype), values, precision=precision)
        return new_most, total * kept + weights.sum(-1, keepdims=True), out * kept + added

    shape = (*q_BxHxGxC.shape[:3], 1)
    start = jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros(q_BxHxGxC.shape)
    # Every query sees slot 0, so the largest score is finite after the first block.
    _, total, out = jax.lax.fori_loop(0, jnp.max(last_BxG) // BLOCK + 1, one_block, start)
    return (out / total).astype(q_BxHxGxC.dtype)


def _scores(q_BxHxGxC, keys_BxHxSxC, seen_Bx1xGxS, precision):
    products = jnp.einsum(
        "BHGC,BHSC->BHGS", q_BxHxGxC, keys_BxHxSxC, precision=precision, preferred_element_type=jnp.float32
    )
    return jnp.where(seen_Bx1xGxS, products * q_BxHxGxC.shape[-1] ** -0.5, -jnp.inf)
