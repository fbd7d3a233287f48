"""Attention of groups of tokens that hang off a prefix: the one pattern behind every computation here.

A group of G tokens hangs off each of A anchors. Its tokens see (1) some keys of the prefix, the same for the whole
group, (2) the tokens that earlier passes left at the same anchor, and (3) each other, causally. Groups never see
each other. Training, rollout and evaluation are this function (decoding writes its groups into a `models/cache.py`):

| where                     | A | G                          | prefix        | reach          | past          |
| ------------------------- | - | -------------------------- | ------------- | -------------- | ------------- |
| text (teacher)            | N | 1, the token itself        | the text      | `Causal`       | -             |
| student in training       | N | 1 + K, token and window    | the text      | `Causal`       | -             |
| rollout, later passes     | N | tokens, then noise         | the text      | `Causal`       | window tokens |
| blocks after prefixes     | A | tokens, or noise           | a text        | `UpTo` length  | -             |

A group shares its prefix, so the cost is A * G * S pairs at most, linear in G (the dense mask of the released code is
quadratic). Over a text half of these pairs are in the future; how they are skipped is the choice of `implementation`:

Where several query heads share the keys of one head, they are further rows over the same keys, as the tokens of a
group are: row g R + r of a key head is token g under the r-th of R query heads.

| implementation | where                           | how                                                              |
| -------------- | ------------------------------- | ---------------------------------------------------------------- |
| dense          | short texts                     | all pairs, one softmax                                           |
| blockwise      | anywhere                        | blocks of anchors, each against the keys up to its own end       |
| splash         | TPU, texts of 128 i positions,  | the stock flash kernel over the prefix, merged with the group    |
|                | few enough rows a position      |                                                                  |
| cudnn          | GPU, half precision, bare text  | the stock flash kernel; a group of one needs no merging          |
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kforcing_jax.models import splash
from kforcing_jax.models.keys import ATTENDED, Causal, KeyValue, Past, Sliding, UpTo
from kforcing_jax.sharding import current_mesh, platform

# In shorter texts blocks save nothing (2 CPU cores; timings in benchmarks).
_LEAST_BLOCKWISE_KEYS = 128
_MOST_BLOCKS = 8
_LEAST_BLOCK = 32


def group_attention(
    q_BxAxGxHxC: jax.Array,
    own: KeyValue,
    prefix: KeyValue,
    reach: Causal | UpTo,
    past: Past | None = None,
    implementation: str = "auto",
    precision: str = "highest",
    sliding: Sliding | None = None,
) -> jax.Array:
    """Attention output out_BxAxGxHxC.

    Args:
      q_BxAxGxHxC: queries, rotated to their positions.
      own: keys and values (B, A, M, KV, C) of the last M tokens of each group. M is G, or G - 1 where the first token
        of a group belongs to the prefix. Query head h sees head h // (H / KV) of keys and values.
      prefix: keys and values (B, S, KV, C) shared by all anchors of a row.
      reach: which prefix keys an anchor sees.
      past: earlier tokens at the same anchors.
      implementation: one of `config.ATTENTIONS`. `auto` chooses by platform and size; so does what cannot serve here.
      precision: of the products, as in `jax.lax.Precision`.
      sliding: how far back a token sees, where that is not everything.

    Scores, softmax and its sums are f32 whatever the dtype of the queries. All implementations agree within rounding,
    in values and gradients.
    """
    implementation = choose_implementation(q_BxAxGxHxC, own, prefix, reach, past, implementation, sliding)
    if implementation == "cudnn":
        return checkpoint_name(_cudnn(q_BxAxGxHxC, prefix), ATTENDED)
    sharing = q_BxAxGxHxC.shape[3] // prefix.key.shape[2]
    q_BxAxRxHxC = as_rows(q_BxAxGxHxC, sharing)
    if implementation == "splash":
        assert isinstance(reach, Causal)  # the others are dense
        out = splash.group_attention(q_BxAxRxHxC, own, prefix, reach.segments_BxS, past, precision, sharing)
    elif implementation == "blockwise":
        out = _blockwise(q_BxAxRxHxC, own, prefix, reach, past, sliding, precision, sharing)
    else:
        out = _dense(q_BxAxRxHxC, own, prefix, reach, past, sliding, precision, sharing)
    return checkpoint_name(from_rows(out, sharing), ATTENDED)


def as_rows(q_xGxHxC: jax.Array, sharing: int) -> jax.Array:
    """Queries with the `sharing` heads that see the same keys as further rows: (x, G * sharing, H / sharing, C)."""
    if sharing == 1:
        return q_xGxHxC
    *x, group, heads, width = q_xGxHxC.shape
    apart = q_xGxHxC.reshape(*x, group, heads // sharing, sharing, width)
    return jnp.swapaxes(apart, -3, -2).reshape(*x, group * sharing, heads // sharing, width)


def from_rows(out_xRxHxC: jax.Array, sharing: int) -> jax.Array:
    """The inverse of `as_rows`."""
    if sharing == 1:
        return out_xRxHxC
    *x, rows, heads, width = out_xRxHxC.shape
    apart = out_xRxHxC.reshape(*x, rows // sharing, sharing, heads, width)
    return jnp.swapaxes(apart, -3, -2).reshape(*x, rows // sharing, heads * sharing, width)


def choose_implementation(
    q_BxAxGxHxC: jax.Array,
    own: KeyValue,
    prefix: KeyValue,
    reach: Causal | UpTo,
    past: Past | None,
    wanted: str = "auto",
    sliding: Sliding | None = None,
) -> str:
    """The implementation for these shapes on the platform that is compiled for: the wanted one where it can serve."""
    length = prefix.key.shape[1]
    if isinstance(reach, UpTo):
        return "dense"
    bare_text = own.key.shape[2] == 0 and past is None and reach.segments_BxS is None
    serves = {
        "dense": True,
        "blockwise": True,
        "splash": sliding is None and splash.fits(q_BxAxGxHxC, q_BxAxGxHxC.shape[3] // prefix.key.shape[2]),
        "cudnn": platform() == "gpu" and sliding is None and bare_text and q_BxAxGxHxC.dtype != jnp.float32,
    }
    if serves.get(wanted):
        return wanted
    if length < _LEAST_BLOCKWISE_KEYS:
        return "dense"
    if platform() == "tpu" and serves["splash"]:
        return "splash"
    return "cudnn" if serves["cudnn"] else "blockwise"


def _dense(q_BxAxRxHxC, own, prefix, reach, past, sliding, precision, sharing, first=0):
    """One softmax over all keys; the anchors of a causal reach are first, first + 1, ..."""
    group, members, prefix_length = q_BxAxRxHxC.shape[2] // sharing, own.key.shape[2], prefix.key.shape[1]
    einsum = functools.partial(jnp.einsum, precision=precision)
    masked_scores = functools.partial(_masked_scores, precision=precision)
    seen_BxAxGxS = _seen(reach, first, q_BxAxRxHxC.shape[1], prefix_length, sliding)
    own_GxM = _causal_in_group(group, members)
    if sliding is not None:
        own_GxM &= _is_near(sliding, sliding.ahead_G[group - members :])
    scores = [
        masked_scores("BARHC,BSHC->BHARS", q_BxAxRxHxC, prefix.key, _per_row(seen_BxAxGxS, sharing)[:, None]),
        masked_scores("BARHC,BAMHC->BHARM", q_BxAxRxHxC, own.key, _per_row(own_GxM, sharing)),
    ]
    if past is not None:
        past_P = jnp.arange(past.tokens.key.shape[2])
        real_GxP = (past_P < past.length)[None]
        if sliding is not None:
            real_GxP = real_GxP & _is_near(sliding, 1 + past_P)
        scores.append(masked_scores("BARHC,BAMHC->BHARM", q_BxAxRxHxC, past.tokens.key, _per_row(real_GxP, sharing)))

    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(q_BxAxRxHxC.dtype)
    to_prefix, to_own, to_past = jnp.split(weights, [prefix_length, prefix_length + members], axis=-1)
    out = einsum("BHARS,BSHC->BARHC", to_prefix, prefix.value)
    out += einsum("BHARM,BAMHC->BARHC", to_own, own.value)
    if past is not None:
        out += einsum("BHARM,BAMHC->BARHC", to_past, past.tokens.value)
    return out


def _masked_scores(equation, q, k, mask, precision):
    scores = jnp.einsum(equation, q, k, precision=precision, preferred_element_type=jnp.float32)
    return jnp.where(mask, scores * q.shape[-1] ** -0.5, -jnp.inf)


def _per_row(mask_xGxM, sharing):
    """Of every row; where one mask serves all tokens of a group, it serves all rows."""
    return mask_xGxM if mask_xGxM.shape[-2] == 1 else jnp.repeat(mask_xGxM, sharing, axis=-2)


def _is_near(sliding, ahead_M):
    """near_GxM: which keys, so far after an anchor, are near enough to the queries of its group."""
    return sliding.ahead_G[:, None] - ahead_M < sliding.width


def _causal_in_group(group, members):
    """mask_GxM: token g of a group sees its tokens up to itself; the M members are its last ones."""
    return jnp.tril(jnp.ones((group, members), bool), k=members - group)


def _seen(reach, first, anchors, length, sliding):
    """Mask (B or 1, A, G or 1, S) of the prefix keys that each anchor sees, or each token of its group."""
    keys_S = jnp.arange(length)
    if isinstance(reach, UpTo):
        seen_BxAxS, at_BxA = keys_S < reach.length_BxA[..., None], reach.length_BxA - 1
    else:
        at_BxA = first + jnp.arange(anchors)[None]
        seen_BxAxS = keys_S <= at_BxA[..., None]
        if reach.segments_BxS is not None:
            of_anchor_BxA = reach.segments_BxS[:, first : first + anchors]
            seen_BxAxS &= of_anchor_BxA[..., None] == reach.segments_BxS[:, None, :length]
    if sliding is None:
        return seen_BxAxS[:, :, None]
    last_BxAxG = at_BxA[..., None] + sliding.ahead_G
    return seen_BxAxS[:, :, None] & (last_BxAxG[..., None] - keys_S < sliding.width)


def block_length(length: int) -> int:
    """Anchors per block over a text: at most `_MOST_BLOCKS` blocks, so 1 + 1 / blocks times the causal pairs."""
    return max(_LEAST_BLOCK, -(-length // _MOST_BLOCKS))


def _blockwise(q_BxAxRxHxC, own, prefix, reach, past, sliding, precision, sharing):
    """Blocks of anchors against the keys up to the block's end, one after the other.

    The backward pass computes each block again, so that no more than one block's scores are alive.
    """
    tokens, length = (None, None) if past is None else past
    return _blocks_in_turn((precision, sharing), q_BxAxRxHxC, own, prefix, tokens, reach.segments_BxS, length, sliding)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocks_in_turn(how, q_BxAxRxHxC, own, prefix, past_tokens, segments_BxS, past_length, sliding):
    return _forward(how, q_BxAxRxHxC, own, prefix, past_tokens, segments_BxS, past_length, sliding)[0]


def _forward(how, *inputs):
    outputs: list[jax.Array] = []
    for start, end in _blocks(inputs[0].shape[1]):
        q, *keys = _of_block(start, end, *inputs[:4])
        if outputs:
            q = _after(outputs[-1], q)
        outputs.append(_one_block(how, start, inputs[4:], q, *keys))
    return jnp.concatenate(outputs, axis=1), inputs


def _backward(how, inputs, d_out):
    d_prefix, d_anchors = jax.tree.map(jnp.zeros_like, inputs[2]), []
    for start, end in _blocks(d_out.shape[1]):
        q, *keys = _of_block(start, end, *inputs[:4])
        q = _after(d_prefix.key, q)
        _, pull_back = jax.vjp(functools.partial(_one_block, how, start, inputs[4:]), q, *keys)
        d_q, d_own, d_keys, d_past = pull_back(d_out[:, start:end])
        d_prefix = jax.tree.map(lambda sums, new, end=end: sums.at[:, :end].add(new), d_prefix, d_keys)
        d_anchors.append((d_q, d_own, d_past))
    d_q, d_own, d_past = jax.tree.map(lambda *blocks: jnp.concatenate(blocks, axis=1), *d_anchors)
    return d_q, d_own, d_prefix, d_past, None, None, None


_blocks_in_turn.defvjp(_forward, _backward)


def _blocks(length):
    """(first anchor, end) of every block."""
    block = block_length(length)
    return [(start, min(start + block, length)) for start in range(0, length, block)]


def _of_block(start, end, q, own, prefix, past_tokens):
    """What belongs to a block of anchors, and the keys up to its end."""
    q, own, past_tokens = jax.tree.map(lambda x: x[:, start:end], (q, own, past_tokens))
    return q, own, jax.tree.map(lambda kv: kv[:, :end], prefix), past_tokens


def _one_block(how, start, fixed, q, own, keys, past_tokens):
    (precision, sharing), (segments_BxS, past_length, sliding) = how, fixed
    past = None if past_tokens is None else Past(past_tokens, past_length)
    return _dense(q, own, keys, Causal(segments_BxS), past, sliding, precision, sharing, start)


def _after(done, next_input):
    """`next_input`, unchanged, but not there before `done`.

    Blocks do not depend on each other, and XLA:CPU would work on all of them at once, every block's scores alive. It
    drops optimization barriers before it schedules, so there has to be a dependence in the values: a zero, unless
    there is a NaN. Elsewhere nothing is needed, and on a mesh one number for all devices would cost a collective.
    """
    if platform() != "cpu" or current_mesh().size > 1:
        return next_input
    first = done.ravel()[0]
    return next_input + jnp.where(jnp.isnan(first), first, 0).astype(next_input.dtype)


def _cudnn(q_BxNx1xHxC, text: KeyValue):
    """A group of one over its text is plain causal attention.

    Larger groups would have to merge two softmaxes, and the public function neither differentiates through the
    log-sum-exp nor returns it in f32.
    """
    out_BxNxHxC = jax.nn.dot_product_attention(
        q_BxNx1xHxC[:, :, 0], text.key, text.value, is_causal=True, implementation="cudnn"
    )
    return out_BxNxHxC[:, :, None]
