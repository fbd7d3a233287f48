"""Log-probabilities of the tokens of a text, and of the likeliest tokens in their place, under the teacher.

On a device they are C = 1 + 2 T numbers of every position: the token's, those of the T likeliest, and their ids (f32
holds whole numbers below 2^24 as they are).
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kforcing_jax.decoding.requests import MOST_LOGPROBS
from kforcing_jax.models import CausalLM, PushForwardLM
from kforcing_jax.models.cached import Weights, ordered_logits

# Rows of logits that a chunk of a prompt needs at a time, all requests together.
_ROWS = 64


class Logprobs(NamedTuple):
    """Of N tokens that follow each other, f32 logarithms of the teacher's probabilities at temperature 1.

    T alternatives: as many as were asked for, and never more than there are tokens (the mask is none). The value of a
    token is that of the first alternative, to the bit, where it is the likeliest.
    """

    token_N: np.ndarray  # of the token itself
    top_ids_NxT: np.ndarray  # the likeliest tokens, in descending order
    top_NxT: np.ndarray  # theirs

    @classmethod
    def of(cls, scores_NxC: np.ndarray, wanted: int) -> "Logprobs":
        """The first `wanted` alternatives of what a device has."""
        top_NxT, ids_NxT = np.split(scores_NxC[:, 1:], 2, axis=1)
        return cls(scores_NxC[:, 0].copy(), ids_NxT[:, :wanted].astype(np.int32), top_NxT[:, :wanted].copy())

    @classmethod
    def joined(cls, parts: Sequence["Logprobs"]) -> "Logprobs":
        """Of one text, from those of its updates."""
        return cls(*map(np.concatenate, zip(*parts, strict=True)))


def width(vocab_size: int) -> int:
    """C of a vocabulary: one of its tokens is the mask."""
    return 1 + 2 * min(MOST_LOGPROBS, vocab_size - 1)


def score(model: CausalLM | PushForwardLM, ordered_xV: jax.Array, tokens_x: jax.Array) -> jax.Array:
    """scores_xC of tokens by the logits that they were drawn from, f32."""
    shifted_xV = model.tempered(ordered_xV, jnp.ones(tokens_x.shape))
    log_total_x1 = jnp.log(jnp.sum(jnp.exp(shifted_xV), axis=-1, keepdims=True))
    own_x1 = jnp.take_along_axis(shifted_xV, model.cfg.column_of(tokens_x)[..., None], axis=-1)
    top_xT, columns_xT = jax.lax.top_k(shifted_xV, width(ordered_xV.shape[-1]) // 2)
    ids_xT = model.cfg.token_at(columns_xT).astype(jnp.float32)
    return jnp.concatenate([own_x1 - log_total_x1, top_xT - log_total_x1, ids_xT], axis=-1)


def score_chunk(
    model: CausalLM | PushForwardLM, weights: Weights, hidden_BxGxD: jax.Array, tokens_BxG: jax.Array
) -> jax.Array:
    """scores_BxGxC of a chunk, a few tokens of it at a time: nobody holds the logits of all."""
    rows, chunk = tokens_BxG.shape
    at_once = max(1, min(chunk, 1 << (_ROWS // rows).bit_length() >> 1))

    def turns(x_BxGx):
        return jnp.moveaxis(x_BxGx.reshape(rows, chunk // at_once, at_once, *x_BxGx.shape[2:]), 1, 0)

    def one_turn(hidden_and_tokens):
        hidden_BxNxD, tokens_BxN = hidden_and_tokens
        return score(model, ordered_logits(model, weights, hidden_BxNxD), tokens_BxN)

    scores_xBxNxC = jax.lax.map(one_turn, (turns(hidden_BxGxD), turns(tokens_BxG)))
    return jnp.moveaxis(scores_xBxNxC, 0, 1).reshape(rows, chunk, -1)
