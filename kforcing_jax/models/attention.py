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

| implementation | where                           | how                                                              |
| -------------- | ------------------------------- | ---------------------------------------------------------------- |
| dense          | short texts                     | all pairs, one softmax                                           |
| blockwise      | anywhere                        | blocks of anchors, each against the keys up to its own end       |
| splash         | TPU, texts of 128 i positions   | the stock flash kernel over the prefix, merged with the group    |
| cudnn          | GPU, half precision, bare text  | the stock flash kernel; a group of one needs no merging          |
"""

import functools

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from kforcing_jax.models import splash
from kforcing_jax.models.keys import ATTENDED, Causal, KeyValue, Past, UpTo
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
) -> jax.Array:
    """Attention output out_BxAxGxHxC.

    Args:
      q_BxAxGxHxC: queries, rotated to their positions.
      own: keys and values (B, A, M, H, C) of the last M tokens of each group. M is G, or G - 1 where the first token
        of a group belongs to the prefix.
      prefix: keys and values (B, S, H, C) shared by all anchors of a row.
      reach: which prefix keys an anchor sees.
      past: earlier tokens at the same anchors.
      implementation: one of `config.ATTENTIONS`. `auto` chooses by platform and size; so does what cannot serve here.
      precision: of the products, as in `jax.lax.Precision`.

    Scores, softmax and its sums are f32 whatever the dtype of the queries. All implementations agree within rounding,
    in values and gradients.
    """
    implementation = choose_implementation(q_BxAxGxHxC, own, prefix, reach, past, implementation)
    if implementation == "splash":
        assert isinstance(reach, Causal)  # the others are dense
        out = splash.group_attention(q_BxAxGxHxC, own, prefix, reach.segments_BxS, past, precision)
    elif implementation == "cudnn":
        out = _cudnn(q_BxAxGxHxC, prefix)
    elif implementation == "blockwise":
        out = _blockwise(q_BxAxGxHxC, own, prefix, reach, past, precision)
    else:
        out = _dense(q_BxAxGxHxC, own, prefix, reach, past, precision)
    return checkpoint_name(out, ATTENDED)


def choose_implementation(
    q_BxAxGxHxC: jax.Array,
    own: KeyValue,
    prefix: KeyValue,
    reach: Causal | UpTo,
    past: Past | None,
    wanted: str = "auto",
) -> str:
    """The implementation for these shapes on the platform that is compiled for: the wanted one where it can serve."""
    length = prefix.key.shape[1]
    if isinstance(reach, UpTo):
        return "dense"
    bare_text = own.key.shape[2] == 0 and past is None and reach.segments_BxS is None
    serves = {
        "dense": True,
        "blockwise": True,
        "splash": splash.fits(q_BxAxGxHxC.shape),
        "cudnn": platform() == "gpu" and bare_text and q_BxAxGxHxC.dtype != jnp.float32,
    }
    if serves.get(wanted):
        return wanted
    if length < _LEAST_BLOCKWISE_KEYS:
        return "dense"
    if platform() == "tpu" and serves["splash"]:
        return "splash"
    return "cudnn" if serves["cudnn"] else "blockwise"


def _dense(q_BxAxGxHxC, own, prefix, reach, past, precision, first=0):
    """One softmax over all keys; the anchors of a causal reach are first, first + 1, ..."""
    group, members, prefix_length = q_BxAxGxHxC.shape[2], own.key.shape[2], prefix.key.shape[1]
    einsum = functools.partial(jnp.einsum, precision=precision)
    masked_scores = functools.partial(_masked_scores, precision=precision)
    seen_BxAxS = _seen(reach, first, q_BxAxGxHxC.shape[1], prefix_length)
    scores = [
        masked_scores("BAGHC,BSHC->BHAGS", q_BxAxGxHxC, prefix.key, seen_BxAxS[:, None, :, None, :]),
        masked_scores("BAGHC,BAMHC->BHAGM", q_BxAxGxHxC, own.key, _causal_in_group(group, members)),
    ]
    if past is not None:
        real_P = jnp.arange(past.tokens.key.shape[2]) < past.length
        scores.append(masked_scores("BAGHC,BAMHC->BHAGM", q_BxAxGxHxC, past.tokens.key, real_P))

    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(q_BxAxGxHxC.dtype)
    to_prefix, to_own, to_past = jnp.split(weights, [prefix_length, prefix_length + members], axis=-1)
    out = einsum("BHAGS,BSHC->BAGHC", to_prefix, prefix.value)
    out += einsum("BHAGM,BAMHC->BAGHC", to_own, own.value)
    if past is not None:
        out += einsum("BHAGM,BAMHC->BAGHC", to_past, past.tokens.value)
    return out


def _masked_scores(equation, q, k, mask, precision):
    scores = jnp.einsum(equation, q, k, precision=precision, preferred_element_type=jnp.float32)
    return jnp.where(mask, scores * q.shape[-1] ** -0.5, -jnp.inf)


def _causal_in_group(group, members):
    """mask_GxM: token g of a group sees its tokens up to itself; the M members are its last ones."""
    return jnp.tril(jnp.ones((group, members), bool), k=members - group)


def _seen(reach, first, anchors, length):
    """Mask (B or 1, A, S) of the prefix keys that each anchor sees."""
    keys_S = jnp.arange(length)
    if isinstance(reach, UpTo):
        return keys_S < reach.length_BxA[..., None]
    seen_1xAxS = (keys_S <= first + jnp.arange(anchors)[:, None])[None]
    if reach.segments_BxS is None:
        return seen_1xAxS
    of_anchor_BxA = reach.segments_BxS[:, first : first + anchors]
    return seen_1xAxS & (of_anchor_BxA[..., None] == reach.segments_BxS[:, None, :length])


def block_length(length: int) -> int:
    """Anchors per block over a text: at most `_MOST_BLOCKS` blocks, so 1 + 1 / blocks times the causal pairs."""
    return max(_LEAST_BLOCK, -(-length // _MOST_BLOCKS))


def _blockwise(q_BxAxGxHxC, own, prefix, reach, past, precision):
    """Blocks of anchors against the keys up to the block's end, one after the other.

    The backward pass computes each block again, so that no more than one block's scores are alive.
    """
    tokens, length = (None, None) if past is None else past
    return _blocks_in_turn(precision, q_BxAxGxHxC, own, prefix, tokens, reach.segments_BxS, length)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _blocks_in_turn(precision, q_BxAxGxHxC, own, prefix, past_tokens, segments_BxS, past_length):
    return _forward(precision, q_BxAxGxHxC, own, prefix, past_tokens, segments_BxS, past_length)[0]


def _forward(precision, *inputs):
    outputs: list[jax.Array] = []
    for start, end in _blocks(inputs[0].shape[1]):
        q, *keys = _of_block(start, end, *inputs[:4])
        if outputs:
            q = _after(outputs[-1], q)
        outputs.append(_one_block(precision, start, inputs[4:], q, *keys))
    return jnp.concatenate(outputs, axis=1), inputs


def _backward(precision, inputs, d_out):
    d_prefix, d_anchors = jax.tree.map(jnp.zeros_like, inputs[2]), []
    for start, end in _blocks(d_out.shape[1]):
        q, *keys = _of_block(start, end, *inputs[:4])
        q = _after(d_prefix.key, q)
        _, pull_back = jax.vjp(functools.partial(_one_block, precision, start, inputs[4:]), q, *keys)
        d_q, d_own, d_keys, d_past = pull_back(d_out[:, start:end])
        d_prefix = jax.tree.map(lambda sums, new, end=end: sums.at[:, :end].add(new), d_prefix, d_keys)
        d_anchors.append((d_q, d_own, d_past))
    d_q, d_own, d_past = jax.tree.map(lambda *blocks: jnp.concatenate(blocks, axis=1), *d_anchors)
    return d_q, d_own, d_prefix, d_past, None, None


_blocks_in_turn.defvjp(_forward, _backward)


def _blocks(length):
    """(first anchor, end) of every block."""
    block = block_length(length)
    return [(start, min(start + block, length)) for start in range(0, length, block)]


def _of_block(start, end, q, own, prefix, past_tokens):
    """What belongs to a block of anchors, and the keys up to its end."""
    q, own, past_tokens = jax.tree.map(lambda x: x[:, start:end], (q, own, past_tokens))
    return q, own, jax.tree.map(lambda kv: kv[:, :end], prefix), past_tokens


def _one_block(precision, start, segments_and_past_length, q, own, keys, past_tokens):
    segments_BxS, past_length = segments_and_past_length
    past = None if past_tokens is None else Past(past_tokens, past_length)
    return _dense(q, own, keys, Causal(segments_BxS), past, precision, start)


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
