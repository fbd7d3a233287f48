"""The key-value cache of one layer: a row of slots for every request, written at its end, attended over while live."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from kforcing_jax.models.keys import KeyValue
from kforcing_jax.sharding import ROWS, constrain, current_mesh, platform

# Keys and values (B, H, S, C), H the heads of keys and values: the axes that attention multiplies over are the last
# two. On a TPU, whose memory has rows of 128 numbers, several narrow heads lie side by side in them:
# (B, H / 2, S, 2 C).
Cache = KeyValue
LANES = 128

# Slots that are attended over at a time where a loop ends after the last live one.
BLOCK = 64


def allocate(rows: int, heads: int, slots: int, width: int, dtype: DTypeLike) -> Cache:
    """An empty cache for heads of `width` channels; what it holds is never seen before it is written."""
    beside = _heads_side_by_side(heads, width)
    empty = jnp.zeros((rows, heads // beside, slots, beside * width), dtype)
    return Cache(constrain(empty, ROWS, "tensor"), constrain(empty, ROWS, "tensor"))


def _heads_side_by_side(heads, width) -> int:
    beside = LANES // width if platform() == "tpu" and LANES % width == 0 else 1
    return 1 if heads % (beside * current_mesh().shape.get("tensor", 1)) else beside


def write(cache: Cache, new_BxGxHxC: KeyValue, start_B: jax.Array) -> Cache:
    """The cache with the keys and values of G tokens in slots start, start + 1, ... of every row; `start + G <= S`."""
    put = _put_rows if platform() == "tpu" else _put_chunks

    def written(slots_BxHxSxC, new_BxGxHxC):
        new_BxGxHxC = new_BxGxHxC.reshape(*new_BxGxHxC.shape[:2], slots_BxHxSxC.shape[1], -1)
        new_BxHxGxC = jnp.swapaxes(new_BxGxHxC, 1, 2).astype(slots_BxHxSxC.dtype)
        return constrain(put(slots_BxHxSxC, new_BxHxGxC, start_B), ROWS, "tensor")

    return jax.tree.map(written, cache, new_BxGxHxC)


def _put_chunks(slots_BxHxSxC, new_BxHxGxC, start_B):
    return jax.vmap(functools.partial(jax.lax.dynamic_update_slice_in_dim, axis=1))(slots_BxHxSxC, new_BxHxGxC, start_B)


def _put_rows(slots_BxHxSxC, new_BxHxGxC, start_B):
    """The same, one slot of one head at a time: of whole chunks XLA makes a loop over the requests on a TPU."""
    rows, heads, group, _ = new_BxHxGxC.shape
    row_Bx1x1, head_Hx1 = jnp.arange(rows)[:, None, None], jnp.arange(heads)[:, None]
    slot_Bx1xG = start_B[:, None, None] + jnp.arange(group)
    put = slots_BxHxSxC.at[row_Bx1x1, head_Hx1, slot_Bx1xG]
    return put.set(new_BxHxGxC, unique_indices=True, indices_are_sorted=True, mode="promise_in_bounds")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Seen:
    """Which slots of its row a query sees: from `first` (by default 0) to `last`, and those of its own window.

    A window that does not end its text lies beyond it, in slots `own_first` to `own_last`. All slots may be left to
    the caller but these: a query sees at least one.
    """

    last_BxG: jax.Array
    first_BxG: jax.Array | None = None
    own_first_BxG: jax.Array | None = None
    own_last_BxG: jax.Array | None = None

    @property
    def farthest(self) -> jax.Array:
        """The last slot that anything sees."""
        return jnp.max(self.last_BxG if self.own_last_BxG is None else jnp.maximum(self.last_BxG, self.own_last_BxG))

    def of(self, slots_S: jax.Array) -> jax.Array:
        """seen_BxGxS."""
        seen = slots_S <= self.last_BxG[..., None]
        if self.first_BxG is not None:
            seen &= slots_S >= self.first_BxG[..., None]
        if self.own_first_BxG is not None and self.own_last_BxG is not None:
            seen |= (slots_S >= self.own_first_BxG[..., None]) & (slots_S <= self.own_last_BxG[..., None])
        return seen


def attention(q_BxGxHxC: jax.Array, cache: Cache, seen: Seen, live: int, precision: str) -> jax.Array:
    """Attention out_BxGxHxC of every query over the slots of its row that it sees. Scores and softmax are f32.

    Query heads that share the keys of a head are further rows. `live` slots are all that any query sees. On a CPU a
    loop over blocks of slots ends with the last that is seen, so that a row's result does not depend on how long
    others are, to the last bit; elsewhere it is one softmax.
    """
    rows, group, heads, width = q_BxGxHxC.shape
    beside = cache.key.shape[-1] // width
    sharing = heads // (beside * cache.key.shape[1])
    # (B, KV, sharing * G, C): under each head of keys its query heads one after the other.
    q_BxHxGxC = jnp.swapaxes(q_BxGxHxC, 1, 2).reshape(rows, heads // sharing, sharing * group, width)
    seen = jax.tree.map(lambda slot_BxG: jnp.tile(slot_BxG, sharing), seen)
    over = _in_blocks if platform() == "cpu" else _at_once
    out_BxHxGxC = over(q_BxHxGxC, cache, seen, live, precision)
    return jnp.swapaxes(out_BxHxGxC.reshape(rows, heads, group, width), 1, 2)


def _at_once(q_BxHxGxC, cache, seen, live, precision):
    keys, values = (kv[:, :, :live] for kv in cache)
    beside = q_BxHxGxC.shape[1] // keys.shape[1]
    width = q_BxHxGxC.shape[-1]
    q_BxHxGxC, seen = _apart(q_BxHxGxC, beside), jax.tree.map(lambda slot_BxG: jnp.tile(slot_BxG, beside), seen)
    scores = _scores(q_BxHxGxC, keys, seen.of(jnp.arange(live))[:, None], width, precision)
    weights = jax.nn.softmax(scores, axis=-1).astype(values.dtype)
    return _own(jnp.einsum("BHGS,BHSC->BHGC", weights, values, precision=precision), beside)


def _apart(q_BxHxGxC, beside):
    """Queries of heads whose keys lie side by side, as more queries of one wide head: 0 where another's keys are."""
    rows, heads, group, width = q_BxHxGxC.shape
    q_BxWxHxGxC = q_BxHxGxC.reshape(rows, heads // beside, beside, group, width)
    q_BxWxHxGxC = jnp.concatenate([q_BxWxHxGxC] * beside, axis=-1)
    is_own_HxGxC = jnp.arange(beside * width) // width == jnp.arange(beside)[:, None, None]
    return jnp.where(is_own_HxGxC, q_BxWxHxGxC, 0).reshape(rows, heads // beside, beside * group, beside * width)


def _own(out_BxWxGxC, beside):
    """What `_apart` queries got from the values of their own heads."""
    parts = [jnp.split(x, beside, axis=-1)[i] for i, x in enumerate(jnp.split(out_BxWxGxC, beside, axis=2))]
    rows, wide, group, width = parts[0].shape
    return jnp.stack(parts, axis=2).reshape(rows, wide * beside, group, width)


def _in_blocks(q_BxHxGxC, cache, seen, live, precision):
    """Softmax over one block after the other, with the sums rescaled to the largest score so far."""

    def one_block(index, carry):
        most, total, out = carry
        keys, values = (jax.lax.dynamic_slice_in_dim(kv, index * BLOCK, BLOCK, axis=2) for kv in cache)
        seen_Bx1xGxS = seen.of(index * BLOCK + jnp.arange(BLOCK))[:, None]
        scores = _scores(q_BxHxGxC, keys, seen_Bx1xGxS, q_BxHxGxC.shape[-1], precision)
        new_most = jnp.maximum(most, scores.max(-1, keepdims=True))
        # Where nothing was seen so far, every weight is to be 0, not NaN.
        shift = jnp.where(jnp.isfinite(new_most), new_most, 0) if may_see_nothing else new_most
        weights, kept = jnp.exp(scores - shift), jnp.exp(most - shift)
        added = jnp.einsum("BHGS,BHSC->BHGC", weights.astype(values.dtype), values, precision=precision)
        return new_most, total * kept + weights.sum(-1, keepdims=True), out * kept + added

    # Otherwise every query sees slot 0, so the largest score is finite after the first block.
    may_see_nothing = seen.first_BxG is not None
    shape = (*q_BxHxGxC.shape[:3], 1)
    start = jnp.full(shape, -jnp.inf), jnp.zeros(shape), jnp.zeros(q_BxHxGxC.shape)
    _, total, out = jax.lax.fori_loop(0, seen.farthest // BLOCK + 1, one_block, start)
    return (out / total).astype(q_BxHxGxC.dtype)


def _scores(q_BxHxGxC, keys_BxHxSxC, seen_Bx1xGxS, width, precision):
    products = jnp.einsum(
        "BHGC,BHSC->BHGS", q_BxHxGxC, keys_BxHxSxC, precision=precision, preferred_element_type=jnp.float32
    )
    return jnp.where(seen_Bx1xGxS, products * width**-0.5, -jnp.inf)
