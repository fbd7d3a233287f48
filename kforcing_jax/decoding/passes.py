"""What an engine compiles: prefill, and one loop of passes for each mode.

A pass leaves the last tokens of a text to the next one, which reads them together with what asks for the tokens after
them: noise for a student, the last token itself for the teacher.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from kforcing_jax.decoding import strides
from kforcing_jax.decoding.draw import draw, is_finite
from kforcing_jax.decoding.logprobs import score, score_chunk
from kforcing_jax.decoding.requests import MODES
from kforcing_jax.decoding.slots import Slots, at_positions, commit, put
from kforcing_jax.models import CausalLM, ModelConfig, PushForwardLM
from kforcing_jax.models.cache import Cache
from kforcing_jax.models.cached import Weights, append, call, ordered_logits

# The models that a mode runs.
MODELS = {"student": ("student",), "ar": ("teacher",), "exact": ("student", "teacher")}


@dataclasses.dataclass(frozen=True)
class Models:
    """The models of an engine and the largest window: what its programs are compiled for."""

    student: PushForwardLM | None
    teacher: CausalLM | None
    k: int

    @property
    def names(self) -> tuple[str, ...]:
        """Of the models that there are: `student`, `teacher`."""
        return tuple(name for name in ("student", "teacher") if getattr(self, name) is not None)

    def config(self, name: str) -> ModelConfig:
        """Of a model that there is."""
        return getattr(self, name).cfg


class Decoding(NamedTuple):
    """What passes change: the slots, and the caches of every layer, by model."""

    slots: Slots
    caches: dict[str, tuple[Cache, ...]]


class Drawn(NamedTuple):
    """Tokens after the texts, the student's probabilities of its own, and whether the logits of a row are numbers."""

    tokens_BxM: jax.Array
    probabilities_BxM: jax.Array
    is_finite_B: jax.Array


def slots_after_a_text(k: int) -> int:
    """How far beyond a text a pass writes at most: its last token is known, then k + 1 rows of known ones, then k."""
    return 2 * k + 2


def prefill(
    models: Models,
    name: str,
    chunk: int,
    live: int,
    weights: Weights,
    slots: Slots,
    caches: tuple[Cache, ...],
    row: jax.Array | None = None,
    scored: bool = False,
) -> tuple[Slots, tuple[Cache, ...]]:
    """Reads the next `chunk` tokens of the texts, but for their last one, into a model's caches: (slots, caches).

    Of all rows, or of one. Rows that have had a pass, or are further already, write only what is overwritten. If
    `scored` (by the teacher), the tokens after those that are read get their log-probabilities.
    """
    model, whole = getattr(models, name), (slots.cached_B[name], slots.scores_BxSxC, caches)
    # What a pass has left unread is read by the next one: here `live` may be too short for it.
    length_B = jnp.where(slots.passes_B[name] > 0, slots.cached_B[name], slots.length_B)
    length_B, tokens_BxS, (read_B, scores_BxSxC, caches) = _of_row((length_B, slots.tokens_BxS, whole), row)
    x_BxGxD = call(model, weights, "embed", at_positions(tokens_BxS, read_B, chunk))
    hidden_BxGxD, caches = append(model, weights, x_BxGxD, caches, read_B, live)
    if scored:
        scores_BxGxC = score_chunk(model, weights, hidden_BxGxD, at_positions(tokens_BxS, read_B + 1, chunk))
        scores_BxSxC = put(scores_BxSxC, scores_BxGxC, read_B + 1)
    read_B = jnp.maximum(read_B, jnp.minimum(read_B + chunk, length_B - 1))
    read_B, scores_BxSxC, caches = _into_row(whole, (read_B, scores_BxSxC, caches), row)
    return slots._replace(cached_B=slots.cached_B | {name: read_B}, scores_BxSxC=scores_BxSxC), caches


def _of_row(arrays, row):
    """A row of all arrays; all of them without one."""
    return arrays if row is None else jax.tree.map(lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1), arrays)


def _into_row(arrays, new, row):
    if row is None:
        return new
    return jax.tree.map(lambda whole, x: jax.lax.dynamic_update_slice_in_dim(whole, x, row, 0), arrays, new)


def run(
    models: Models,
    mode: str,
    live: int,
    weights: dict[str, Weights],
    state: Decoding,
    alive_B: jax.Array,
    passes: jax.Array,
    wait: jax.Array,
) -> Decoding:
    """The state after up to `passes` passes (int32) of the requests of a mode.

    Rows that are not `alive` are stopped; those whose prompts are not read yet wait. Returns early when no request of
    the mode is left, and, unless told to `wait`, as soon as one of them ends.
    """
    one_pass = {"student": _student_pass, "ar": _ar_pass, "exact": _exact_pass}[mode]
    slots = state.slots
    # Free rows are as if nothing was read: they should not make attention go further than others need.
    read_B = jax.tree.map(lambda read_B: jnp.where(alive_B, read_B, 0), slots.cached_B)
    state = state._replace(slots=slots._replace(running_B=slots.running_B & alive_B, cached_B=read_B))

    settings = slots.settings
    is_read_B = jnp.all(jnp.stack([read_B[name] >= settings.prompt_B - 1 for name in MODELS[mode]]), axis=0)
    may_run_B = is_read_B & (settings.mode_B == MODES.index(mode))

    def active_B(state):
        return state.slots.running_B & may_run_B

    before = jnp.sum(active_B(state))

    def unfinished(carry):
        index, state = carry
        now = jnp.sum(active_B(state))
        return (index < passes) & (now > 0) & (wait | (now == before))

    def next_pass(carry):
        index, state = carry
        return index + 1, one_pass(models, live, weights, state, active_B(state))

    return jax.lax.while_loop(unfinished, next_pass, (jnp.int32(0), state))[1]


def _student_pass(models, live, weights, state, active_B):
    drawn, state = _draft(models, live, weights, state, active_B, known=models.k)
    settings = state.slots.settings
    keep_B = strides.confident(drawn.probabilities_BxM, settings.confidence_B, strides.fixed(settings.k_B))
    return _commit(state, drawn, keep_B, active_B)


def _ar_pass(models, live, weights, state, active_B):
    drawn, state = _teacher_draws(models, live, weights, state, active_B)
    return _commit(state, drawn, jnp.ones_like(state.slots.length_B), active_B)


def _exact_pass(models, live, weights, state, active_B):
    """The student drafts a window, and the teacher draws after every token of it."""
    draft, state = _draft(models, live, weights, state, active_B, known=models.k + 1)
    drawn, state = _teacher_draws(models, live, weights, state, active_B, draft.tokens_BxM)
    drawn = drawn._replace(is_finite_B=drawn.is_finite_B & draft.is_finite_B)
    keep_B = strides.exact(draft.tokens_BxM, drawn.tokens_BxM, state.slots.settings.k_B)
    state = _commit(state, drawn, keep_B, active_B)
    # The teacher has read the drafts that were kept: all of the text but its last token.
    cached_B = state.slots.cached_B
    read_B = jnp.where(active_B, state.slots.length_B - 1, cached_B["teacher"])
    return state._replace(slots=state.slots._replace(cached_B=cached_B | {"teacher": read_B}))


def _draft(models, live, weights, state, active_B, known):
    """Windows of the student. Its chunk: the (at most `known`) tokens not yet read, k of noise, then filling."""
    model, weights, slots, k = models.student, weights["student"], state.slots, models.k
    read_B = slots.cached_B["student"]
    unread_B = jnp.clip(slots.length_B - read_B, 1, known)
    u_BxK = at_positions(slots.noise_BxS, slots.length_B, k)
    text_BxNxD = call(model, weights, "embed", at_positions(slots.tokens_BxS, read_B, known))
    noise_BxKxD = call(model, weights, "embed_noise", u_BxK, slots.of_tau_BxD)
    x_BxGxD = _joined(text_BxNxD, noise_BxKxD, unread_B)
    rows_BxK = unread_B[:, None] + jnp.arange(k)
    is_noise_BxG = jnp.arange(known + k) >= unread_B[:, None] if model.cfg.is_gated else None
    hidden_BxKxD, caches = append(
        model, weights, x_BxGxD, state.caches["student"], read_B, live, rows_BxK, is_noise_BxG
    )
    state = _after_a_pass(state, "student", caches, active_B)
    return _drawn(model, slots, active_B, ordered_logits(model, weights, hidden_BxKxD), u_BxK), state


def _joined(first_BxNxD, then_BxKxD, count_B):
    """The first `count` of N rows, then K, then filling: (B, N + K, D)."""
    joined = jnp.pad(first_BxNxD, [(0, 0), (0, then_BxKxD.shape[1]), (0, 0)])
    put = jax.vmap(lambda row, new, at: jax.lax.dynamic_update_slice_in_dim(row, new, at, axis=0))
    return put(joined, then_BxKxD, count_B)


def _teacher_draws(models, live, weights, state, active_B, draft_BxK=None):
    """The teacher's inverse-CDF draws: of the token after the text, and after every draft where there are some.

    And their log-probabilities, in what the state has of the positions after the text.
    """
    model, weights, slots = models.teacher, weights["teacher"], state.slots
    read_B = slots.cached_B["teacher"]
    tokens_BxM = at_positions(slots.tokens_BxS, read_B, 1)
    if draft_BxK is not None:
        tokens_BxM = jnp.concatenate([tokens_BxM, draft_BxK], axis=1)
    x_BxMxD = call(model, weights, "embed", tokens_BxM)
    hidden_BxMxD, caches = append(model, weights, x_BxMxD, state.caches["teacher"], read_B, live)
    u_BxM = at_positions(slots.noise_BxS, slots.length_B, tokens_BxM.shape[1])
    logits_BxMxV = ordered_logits(model, weights, hidden_BxMxD)
    drawn = _drawn(model, slots, active_B, logits_BxMxV, u_BxM)
    slots = _scored(model, slots, active_B, logits_BxMxV, drawn.tokens_BxM)
    return drawn, _after_a_pass(state._replace(slots=slots), "teacher", caches, active_B)


def _scored(model, slots, active_B, logits_BxMxV, tokens_BxM) -> Slots:
    """With the log-probabilities of the tokens after the text, if an active request asks for them."""

    def scored(_, scores_BxSxC):
        return put(scores_BxSxC, score(model, logits_BxMxV, tokens_BxM), slots.length_B)

    # A loop of one turn or none: the branches of a cond would copy the array, a loop writes into it.
    turns = jnp.any(active_B & slots.settings.is_scored_B).astype(jnp.int32)
    return slots._replace(scores_BxSxC=jax.lax.fori_loop(0, turns, scored, slots.scores_BxSxC))


def _drawn(model, slots, active_B, logits_BxMxV, u_BxM) -> Drawn:
    return Drawn(*draw(model, slots, active_B, logits_BxMxV, u_BxM), is_finite(logits_BxMxV))


def _after_a_pass(state: Decoding, name, caches, active_B) -> Decoding:
    """The caches of active rows hold the text as it was before the pass."""
    slots = state.slots
    read_B = jnp.where(active_B, slots.length_B, slots.cached_B[name])
    passes_B = slots.passes_B[name] + active_B
    slots = slots._replace(cached_B=slots.cached_B | {name: read_B}, passes_B=slots.passes_B | {name: passes_B})
    return Decoding(slots, state.caches | {name: caches})


def _commit(state: Decoding, drawn: Drawn, keep_B, active_B) -> Decoding:
    """Appends what is kept. Requests whose logits are no numbers stop; the others know nothing of it."""
    slots, fine_B = state.slots, drawn.is_finite_B | ~active_B
    slots = slots._replace(finite_B=slots.finite_B & fine_B, running_B=slots.running_B & fine_B)
    slots = commit(slots, drawn.tokens_BxM, keep_B, active_B & fine_B)
    return state._replace(slots=slots)
