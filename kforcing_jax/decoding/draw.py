"""From the logits of a window to its tokens, under the penalties that requests ask for."""

import jax
import jax.numpy as jnp

from kforcing_jax.decoding.slots import Slots, generated_counts
from kforcing_jax.models import PushForwardLM


def draw(model, slots: Slots, active_B: jax.Array, ordered_BxKxV: jax.Array, u_BxK: jax.Array):
    """(tokens_BxK, probabilities_BxK of a student's own tokens) of windows after the texts of the slots.

    A window's own tokens count for its later ones' penalty. Counting and weighing cost their time only when an active
    request asks for it; otherwise the probabilities are 1.
    """
    settings = slots.settings
    is_penalised = jnp.any(active_B & (settings.penalty_B != 0))
    is_weighed = jnp.any(active_B & (settings.confidence_B > 0))
    tau_B = settings.tau_B

    def plain():
        tokens_BxK = model.pick(ordered_BxKxV, u_BxK, tau_B[:, None])
        return tokens_BxK, _probabilities(model, ordered_BxKxV, is_weighed)

    def one_offset(counts_BxV, logits_and_u):
        ordered_BxV, u_B = logits_and_u
        ordered_BxV -= settings.penalty_B[:, None] * counts_BxV
        token_B = model.pick(ordered_BxV, u_B, tau_B)
        counts_BxV += jax.nn.one_hot(model.cfg.column_of(token_B), counts_BxV.shape[1])
        return counts_BxV, (token_B, _probabilities(model, ordered_BxV, is_weighed))

    def penalised():
        counts_BxV = generated_counts(slots, model.cfg.column_of(slots.tokens_BxS), ordered_BxKxV.shape[-1])
        offsets_first = jnp.moveaxis(ordered_BxKxV, 1, 0), u_BxK.T
        _, drawn_KxB = jax.lax.scan(one_offset, counts_BxV, offsets_first)
        return jax.tree.map(jnp.transpose, drawn_KxB)

    return jax.lax.cond(is_penalised, penalised, plain)


def _probabilities(model, ordered_xV, is_weighed):
    ones_x = jnp.ones(ordered_xV.shape[:-1])
    if not isinstance(model, PushForwardLM):
        return ones_x
    return jax.lax.cond(is_weighed, lambda: model.probability(ordered_xV), lambda: ones_x)


def is_finite(logits_BxKxV: jax.Array) -> jax.Array:
    """Of every request. A NaN passes through the maximum."""
    return jnp.isfinite(jnp.max(jnp.abs(logits_BxKxV), axis=(1, 2)))
