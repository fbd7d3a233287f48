"""From the logits of a window to its tokens, under what requests ask for: penalties, biases, truncation."""

import functools

import jax
import jax.numpy as jnp

from kforcing_jax import noise
from kforcing_jax.decoding.slots import Slots, generated_counts
from kforcing_jax.models import CausalLM, PushForwardLM
from kforcing_jax.models.truncation import truncated


def draw(
    model: CausalLM | PushForwardLM,
    slots: Slots,
    active_B: jax.Array,
    ordered_BxKxV: jax.Array,
    u_BxK: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """(tokens_BxK, probabilities_BxK of a student's own tokens) of windows after the texts of the slots.

    A window's own tokens count for its later ones' penalty. Weighing costs its time only when an active request asks
    for it, otherwise the probabilities are 1; and so do penalties and biases, and truncation.
    """
    settings = slots.settings
    is_changed, is_truncated = (jnp.any(active_B & x) for x in (settings.is_changed_B, settings.is_truncated_B))
    is_weighed = jnp.any(active_B & (settings.confidence_B > 0))

    def plain():
        tokens_BxK = model.pick(ordered_BxKxV, u_BxK, settings.tau_B[:, None])
        return tokens_BxK, _probabilities(model, ordered_BxKxV, is_weighed)

    def nucleus():
        truncation_BxK = (jnp.broadcast_to(x[:, None], u_BxK.shape) for x in (settings.top_k_B, settings.top_p_B))
        cut_BxKxV = truncated(model.tempered(ordered_BxKxV, settings.tau_B[:, None]), *truncation_BxK)
        return model.cfg.token_at(noise.inverse_cdf(cut_BxKxV, u_BxK)), jnp.ones(u_BxK.shape)

    def one_offset(counts_BxV, logits_and_u):
        ordered_BxV, u_B = logits_and_u
        ordered_BxV = _biased(model, settings, ordered_BxV) - settings.penalty_B[:, None] * counts_BxV
        token_B = _pick(model, settings, is_truncated, ordered_BxV, u_B)
        counts_BxV += jax.nn.one_hot(model.cfg.column_of(token_B), counts_BxV.shape[1])
        return counts_BxV, (token_B, _probabilities(model, ordered_BxV, is_weighed))

    def one_by_one():
        counts_BxV = generated_counts(slots, model.cfg.column_of(slots.tokens_BxS), ordered_BxKxV.shape[-1])
        offsets_first = jnp.moveaxis(ordered_BxKxV, 1, 0), u_BxK.T
        _, drawn_KxB = jax.lax.scan(one_offset, counts_BxV, offsets_first)
        return jax.tree.map(jnp.transpose, drawn_KxB)

    if not isinstance(model, CausalLM):
        return jax.lax.cond(is_changed, one_by_one, plain)
    return jax.lax.switch(jnp.where(is_changed, 2, is_truncated.astype(int)), [plain, nucleus, one_by_one])


def _biased(model, settings, ordered_BxV):
    rows_Bx1 = jnp.arange(ordered_BxV.shape[0])[:, None]
    return ordered_BxV.at[rows_Bx1, model.cfg.column_of(settings.biased_BxI)].add(settings.bias_BxI)


def _pick(model, settings, is_truncated, ordered_BxV, u_B):
    """The model's tokens, a teacher's among those that truncation leaves."""
    if not isinstance(model, CausalLM):
        return model.pick(ordered_BxV, u_B, settings.tau_B)
    tempered_BxV = model.tempered(ordered_BxV, settings.tau_B)
    cut = functools.partial(truncated, tempered_BxV, settings.top_k_B, settings.top_p_B)
    tempered_BxV = jax.lax.cond(is_truncated, cut, lambda: tempered_BxV)
    return model.cfg.token_at(noise.inverse_cdf(tempered_BxV, u_B))


def _probabilities(model, ordered_xV, is_weighed):
    ones_x = jnp.ones(ordered_xV.shape[:-1])
    if not isinstance(model, PushForwardLM):
        return ones_x
    return jax.lax.cond(is_weighed, lambda: model.probability(ordered_xV), lambda: ones_x)


def is_finite(logits_BxKxV: jax.Array) -> jax.Array:
    """is_finite_B: whether all logits of a request are. A NaN passes through the maximum."""
    return jnp.isfinite(jnp.max(jnp.abs(logits_BxKxV), axis=(1, 2)))
