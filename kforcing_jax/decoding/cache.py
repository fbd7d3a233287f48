"""The static-shape KV cache of a decoding loop."""

import jax
import jax.numpy as jnp

from kforcing_jax.models.keys import KeyValue


def allocate(prefix: KeyValue, capacity: int) -> KeyValue:
    """A cache (L, B, capacity, H, C) that begins with the given prefix (L, B, P, H, C)."""
    room = capacity - prefix.key.shape[2]
    return jax.tree.map(lambda kv: jnp.pad(kv, [(0, 0), (0, 0), (0, room), (0, 0), (0, 0)]), prefix)


def write(cache: KeyValue, tokens: KeyValue, start_B: jax.Array) -> KeyValue:
    """Writes keys and values (L, B, T, H, C) of T tokens at slot `start` of each request's row."""

    def one_request(row_LxSxHxC, new_LxTxHxC, start):
        return jax.lax.dynamic_update_slice_in_dim(row_LxSxHxC, new_LxTxHxC, start, axis=1)

    per_request = jax.vmap(one_request, in_axes=(1, 1, 0), out_axes=1)
    return jax.tree.map(lambda kept, new: per_request(kept, new, start_B), cache, tokens)
