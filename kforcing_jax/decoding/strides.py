"""Strides: how many tokens of a window a request keeps (B requests, windows of K tokens).

- `fixed` keeps all k: a constant advance, nothing checked (the paper).
- `confident(c)` keeps the first, then further ones while the product of the student's probabilities of its own tokens
  stays at least c: speed for quality, continuously; it needs no teacher.
- `exact` keeps tokens up to and including the first that differs from the teacher's own draw for the same uniform, in
  the teacher's version: the AR sample of that seed, token for token.

A token that is not kept is drawn again in a later pass, from the same uniform and a better context: noise belongs to
the position. So a stride never changes what is sampled, only who decides it.
"""

import jax
import jax.numpy as jnp


def fixed(k_B: jax.Array) -> jax.Array:
    """keep_B: all k."""
    return k_B


def confident(probabilities_BxK: jax.Array, confidence_B: jax.Array, k_B: jax.Array) -> jax.Array:
    """keep_B: the first, then further ones while the product of all up to and with them is at least the confidence.

    Args:
      probabilities_BxK: the student's probabilities of its own tokens.
      confidence_B: in [0, 1]; 0 keeps all k.
      k_B: tokens of the window that may be kept.
    """
    likely_BxK = jnp.cumprod(probabilities_BxK, axis=1) >= confidence_B[:, None]
    return jnp.clip(_leading(likely_BxK), 1, k_B)


def exact(draft_BxK: jax.Array, teacher_BxM: jax.Array, k_B: jax.Array) -> jax.Array:
    """keep_B of the teacher's M = K + 1 draws: those that follow drafts which equal the draws before them.

    Token j of the teacher is drawn after drafts 0 to j - 1, so it is an AR draw if these are. Mixing shared noise with
    acceptance by a ratio of probabilities would be biased.
    """
    offset_K = jnp.arange(draft_BxK.shape[1])
    equal_BxK = (draft_BxK == teacher_BxM[:, :-1]) & (offset_K < k_B[:, None])
    return _leading(equal_BxK) + 1


def likely_ends(probabilities_BxD: jax.Array, k_B: jax.Array, count: int) -> jax.Array:
    """ends_BxW, ascending: the `count` likeliest numbers of D drafts that a pass of the exact stride will accept.

    Args:
      probabilities_BxD: of each draft to be right when those before it are.
      k_B: tokens that a pass may keep, one more than drafts.
    """
    may_BxD = jnp.arange(probabilities_BxD.shape[1]) < k_B[:, None] - 1
    reached_BxD = jnp.cumprod(jnp.where(may_BxD, probabilities_BxD, 0), axis=1)
    # Of 0, 1, ... D drafts: that so many are right, less that one more is.
    ends_BxE = jnp.pad(reached_BxD, [(0, 0), (1, 0)], constant_values=1) - jnp.pad(reached_BxD, [(0, 0), (0, 1)])
    return jnp.sort(jax.lax.top_k(ends_BxE, count)[1], axis=1)


def _leading(true_BxK):
    """How many of the first ones hold."""
    return jnp.cumprod(true_BxK.astype(jnp.int32), axis=1).sum(axis=1)
