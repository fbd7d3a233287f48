"""Attention of groups of tokens that hang off a prefix: the one pattern behind every computation here.

A group of G tokens hangs off each of A anchors. Its tokens see (1) the first `stop` keys of the prefix, the
same for the whole group, (2) the tokens that earlier passes left at the same anchor, and (3) each other,
causally. Groups never see each other. Training, rollout, prefill and decoding are all this function:

| where                     | A | G                         | prefix        | stop  | past               |
| ------------------------- | - | ------------------------- | ------------- | ----- | ------------------ |
| text (teacher, prefill)   | N | 1, the token itself       | the text      | t     | -                  |
| student in training       | N | 1 + K, token and window   | the text      | t     | -                  |
| rollout, later passes     | N | tokens, then noise        | the text      | t + 1 | window tokens      |
| decoding                  | 1 | emitted tokens, then noise | the KV cache | length | -                  |
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class KeyValue(NamedTuple):
    """Keys and values of some tokens, both of shape (..., H, C)."""

    key: jax.Array
    value: jax.Array


class Past(NamedTuple):
    """Keys and values (..., B, A, P, H, C) that earlier passes left at each anchor; the first `length` are real."""

    tokens: KeyValue
    length: jax.Array


def group_attention(
    q_BxAxGxHxC: jax.Array,
    own: KeyValue,
    prefix: KeyValue,
    stop_BxA: jax.Array,
    past: Past | None = None,
) -> jax.Array:
    """Attention output out_BxAxGxHxC.

    Args:
      q_BxAxGxHxC: queries, rotated to their positions.
      own: keys and values (B, A, G, H, C) of the same tokens.
      prefix: keys and values (B, S, H, C) shared by all anchors of a row.
      stop_BxA: how many prefix keys each anchor sees.
      past: earlier tokens at the same anchors.

    Scores and softmax are f32 whatever the dtype of the queries. Cost: A * G * (S + P + G) pairs, linear in G
    for G << S, because a group shares its prefix (the dense mask of the released code is quadratic in G).
    """
    group, prefix_length = q_BxAxGxHxC.shape[2], prefix.key.shape[1]
    causal_GxG = jnp.tril(jnp.ones((group, group), bool))
    seen_BxAxS = jnp.arange(prefix_length) < stop_BxA[..., None]
    scores = [
        _masked_scores("BAGHC,BSHC->BHAGS", q_BxAxGxHxC, prefix.key, seen_BxAxS[:, None, :, None, :]),
        _masked_scores("BAGHC,BASHC->BHAGS", q_BxAxGxHxC, own.key, causal_GxG),
    ]
    if past is not None:
        real_P = jnp.arange(past.tokens.key.shape[2]) < past.length
        scores.append(_masked_scores("BAGHC,BASHC->BHAGS", q_BxAxGxHxC, past.tokens.key, real_P))

    weights = jax.nn.softmax(jnp.concatenate(scores, axis=-1), axis=-1).astype(q_BxAxGxHxC.dtype)
    to_prefix, to_own, to_past = jnp.split(weights, [prefix_length, prefix_length + group], axis=-1)
    out = jnp.einsum("BHAGS,BSHC->BAGHC", to_prefix, prefix.value)
    out += jnp.einsum("BHAGS,BASHC->BAGHC", to_own, own.value)
    if past is not None:
        out += jnp.einsum("BHAGS,BASHC->BAGHC", to_past, past.tokens.value)
    return out


def _masked_scores(equation, q, k, mask):
    scores = jnp.einsum(equation, q, k, preferred_element_type=jnp.float32)
    return jnp.where(mask, scores * q.shape[-1] ** -0.5, -jnp.inf)
