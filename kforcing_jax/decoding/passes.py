"""What an engine compiles: prefill, and one loop of passes for each mode.

A pass leaves the last tokens of a text to the next one, which reads them together with what asks for the tokens after
them: noise for a student, the last token itself for the teacher.

A gated student has its teacher in itself: all modes then run over one set of weights and one cache. And a pass of mode
`exact` may do both: verify the drafts of the pass before, and draft on from wherever they stop being right.
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
from kforcing_jax.models.backbone import take_rows
from kforcing_jax.models.cache import Cache
from kforcing_jax.models.cached import Weights, Windows, append, call, ordered_logits, with_delta
from kforcing_jax.sharding import platform

# The models that a mode runs, where they are two.
MODELS = {"student": ("student",), "ar": ("teacher",), "exact": ("student", "teacher")}

# Rows that are multiplied with a matrix in not much more than the time of reading it.
_ROWS_AT_ONCE = {"cpu": 16, "others": 64}


@dataclasses.dataclass(frozen=True)
class Models:
    """The models of an engine and the largest window: what its programs are compiled for.

    `exact_windows` is of a gated student that is its own teacher: how many windows hang off the drafts that a pass of
    mode `exact` verifies; 0: a step is two passes, one that drafts and one that verifies.
    """

    student: PushForwardLM | None
    teacher: CausalLM | None
    k: int
    exact_windows: int = 0

    @property
    def names(self) -> tuple[str, ...]:
        """Of the models that there are: `student`, `teacher`. Each has weights, a cache and passes of its own."""
        return tuple(name for name in ("student", "teacher") if getattr(self, name) is not None)

    def config(self, name: str) -> ModelConfig:
        """Of a model that there is."""
        return getattr(self, name).cfg

    @property
    def is_shared(self) -> bool:
        """Whether the teacher is the one in the student."""
        return self.teacher is None and self.student is not None and self.student.cfg.is_gated

    def of_mode(self, mode: str) -> tuple[str, ...]:
        """Names of the models whose weights and caches a mode takes."""
        return ("student",) if self.is_shared else MODELS[mode]

    @property
    def modes(self) -> tuple[str, ...]:
        """Those that the models allow."""
        return tuple(mode for mode in MODES if set(self.of_mode(mode)) <= set(self.names))

    @property
    def causal(self) -> CausalLM | None:
        """The model that draws by inverse CDF: the teacher, or the one in the student."""
        return self.student.text_model if self.is_shared and self.student is not None else self.teacher

    @property
    def causal_name(self) -> str:
        """Where its weights and cache are."""
        return "student" if self.is_shared else "teacher"

    @property
    def is_one_pass(self) -> bool:
        """Whether a pass of mode `exact` verifies and drafts."""
        return self.is_shared and self.exact_windows > 0

    def reads_output_once(self, slots: int) -> bool:
        """Whether a pass of mode `exact` multiplies all that it may need with the output layer, and not in two turns.

        The second turn takes the window that is used, and the time of reading the matrix once more.
        """
        rows = slots * (self.k + self.exact_windows * (self.k - 1))
        return self.exact_windows == 1 or rows <= _ROWS_AT_ONCE.get(platform(), _ROWS_AT_ONCE["others"])

    @property
    def drafts_ahead(self) -> int:
        """Tokens that a pass of mode `exact` drafts for the next one to verify; 0 where a step verifies its own."""
        return self.k - 1 if self.is_one_pass else 0


class Decoding(NamedTuple):
    """What passes change: the slots, and the caches of every layer, by model."""

    slots: Slots
    caches: dict[str, tuple[Cache, ...]]


class Drawn(NamedTuple):
    """Tokens after the texts, the student's probabilities of its own, and whether the logits of a row are numbers."""

    tokens_BxM: jax.Array
    probabilities_BxM: jax.Array
    is_finite_B: jax.Array


def slots_after_a_text(models: Models) -> int:
    """How far beyond a text a pass writes at most: its last token is known, then k + 1 rows of known ones, then k.

    Or k rows, and windows.
    """
    return max(2 * models.k + 2, (1 + models.exact_windows) * models.k)


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
    model = models.causal if name == models.causal_name else models.student
    assert model is not None
    whole = slots.cached_B[name], slots.scores_BxSxC, caches
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
    is_read_B = jnp.all(jnp.stack([read_B[name] >= settings.prompt_B - 1 for name in models.of_mode(mode)]), axis=0)
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
    if models.is_one_pass:
        return _exact_in_one_pass(models, live, weights, state, active_B)
    draft, state = _draft(models, live, weights, state, active_B, known=1 if models.is_shared else models.k + 1)
    if models.is_shared:  # the last token is read again, with the drafts
        state = _with_all_but_the_last_read(models, state, active_B)
    drawn, state = _teacher_draws(models, live, weights, state, active_B, draft.tokens_BxM)
    drawn = drawn._replace(is_finite_B=drawn.is_finite_B & draft.is_finite_B)
    keep_B = strides.exact(draft.tokens_BxM, drawn.tokens_BxM, state.slots.settings.k_B)
    # The teacher has read the drafts that were kept: all of the text but its last token.
    return _with_all_but_the_last_read(models, _commit(state, drawn, keep_B, active_B), active_B)


def _with_all_but_the_last_read(models, state, active_B) -> Decoding:
    """What the teacher's cache holds of the texts of active rows."""
    slots, name = state.slots, models.causal_name
    read_B = jnp.where(active_B, slots.length_B - 1, slots.cached_B[name])
    return state._replace(slots=slots._replace(cached_B=slots.cached_B | {name: read_B}))


def _exact_in_one_pass(models, live, weights, state, active_B):
    """A gated student's draws after the drafts of the last pass, and windows that hang off these for the next one.

    Its chunk: the last token of the text, k - 1 drafts, then the windows. Window i begins with the noise of the token
    after its anchor, which is drawn, so the rest of it are drafts.
    """
    if models.k == 1:  # a window of one token drafts nothing
        return _ar_pass(models, live, weights, state, active_B)
    draft_BxD, settings = state.slots.draft_BxD, state.slots.settings
    anchor_BxW = strides.likely_ends(state.slots.odds_BxD, settings.k_B, models.exact_windows)
    known_BxKxD, windows_BxWxDxD, state = _verify_and_draft(models, live, weights, state, active_B, anchor_BxW)
    slots, u_BxK = state.slots, at_positions(state.slots.noise_BxS, state.slots.length_B, models.k)
    logits_BxKxV, of_windows = _teachers_logits(models, weights["student"], known_BxKxD, windows_BxWxDxD)
    drawn = _drawn(models.causal, slots, active_B, logits_BxKxV, u_BxK)
    slots = _scored(models.causal, slots, active_B, logits_BxKxV, drawn.tokens_BxM)
    keep_B = strides.exact(draft_BxD, drawn.tokens_BxM, settings.k_B - 1)

    chosen, is_drafted_BxD = _of_the_window_after(of_windows, anchor_BxW, keep_B - 1)
    logits_BxDxV = _students_logits(models, weights["student"], *chosen)
    drawn = drawn._replace(is_finite_B=drawn.is_finite_B & is_finite(logits_BxDxV))
    state = _commit(state._replace(slots=slots), drawn, keep_B, active_B)
    state = _with_all_but_the_last_read(models, state, active_B)
    return _with_drafts(models, state, active_B, logits_BxDxV, is_drafted_BxD, keep_B)


def _verify_and_draft(models, live, weights, state, active_B, anchor_BxW):
    """Hidden states of known tokens (B, k, D) and of windows but for their first tokens (B, W, k - 1, D); the state."""
    model, weights, slots, k = models.student, weights["student"], state.slots, models.k
    read_B, count = slots.cached_B["student"], anchor_BxW.shape[1]
    known_BxK = jnp.concatenate([at_positions(slots.tokens_BxS, read_B, 1), slots.draft_BxD], axis=1)
    ahead_BxM = (anchor_BxW[..., None] + jnp.arange(k)).reshape(-1, count * k)
    u_BxM = jnp.take_along_axis(at_positions(slots.noise_BxS, slots.length_B, 2 * k - 1), ahead_BxM, axis=1)
    known_BxKxD = call(model, weights, "embed", known_BxK)
    noise_BxMxD = call(model, weights, "embed_noise", u_BxM, slots.of_tau_BxD)
    x_BxGxD = jnp.concatenate([known_BxKxD, noise_BxMxD], axis=1)
    row_G = jnp.arange(k + count * k)
    is_noise_BxG = jnp.broadcast_to(row_G >= k, x_BxGxD.shape[:2])
    wanted = [row for row in range(k + count * k) if row < k or row % k]
    rows_BxR = jnp.broadcast_to(jnp.array(wanted), (x_BxGxD.shape[0], len(wanted)))
    hidden_BxRxD, caches = append(
        model, weights, x_BxGxD, state.caches["student"], read_B, live, rows_BxR, is_noise_BxG, Windows(anchor_BxW, k)
    )
    of_windows = hidden_BxRxD[:, k:].reshape(-1, count, k - 1, hidden_BxRxD.shape[-1])
    return hidden_BxRxD[:, :k], of_windows, _after_a_pass(state, "student", caches, active_B)


def _teachers_logits(models, weights, known_BxKxD, windows_BxWxDxD):
    """logits_BxKxV of known tokens; and of windows hidden states, with logits where one product gives those of all."""
    rows, windows, drafts, width = windows_BxWxDxD.shape
    if not models.reads_output_once(rows):
        return ordered_logits(models.causal, weights, known_BxKxD), (windows_BxWxDxD,)
    hidden_BxRxD = jnp.concatenate([known_BxKxD, windows_BxWxDxD.reshape(rows, windows * drafts, width)], axis=1)
    logits_BxRxV = ordered_logits(models.causal, weights, hidden_BxRxD)
    of_windows = logits_BxRxV[:, models.k :].reshape(rows, windows, drafts, -1)
    return logits_BxRxV[:, : models.k], (windows_BxWxDxD, of_windows)


def _students_logits(models, weights, hidden_BxDxD, text_BxDxV=None):
    """Those of noise rows, given what the teacher makes of their hidden states or not."""
    if text_BxDxV is None:
        return ordered_logits(models.student, weights, hidden_BxDxD)
    return with_delta(models.student, weights, text_BxDxV, hidden_BxDxD)


def _of_the_window_after(of_windows, anchor_BxW, accepted_B):
    """(what a window has of the D tokens after the accepted drafts and one more, is_there_BxD).

    The window is that off the last accepted draft, or the nearest before it, which ends earlier; there may be none.
    `of_windows` are arrays of shape (B, W, D, ...).
    """
    drafts = of_windows[0].shape[2]
    # Anchors ascend: as many as are not beyond the accepted ones.
    window_B = jnp.sum(anchor_BxW <= accepted_B[:, None], axis=1) - 1
    chosen_Bx1 = jnp.maximum(window_B, 0)[:, None]
    first_B = accepted_B - jnp.take_along_axis(anchor_BxW, chosen_Bx1, axis=1)[:, 0]
    offset_BxD = jnp.maximum(first_B, 0)[:, None] + jnp.arange(drafts)
    is_there_BxD = (window_B >= 0)[:, None] & (offset_BxD < drafts)
    offset_BxD = jnp.minimum(offset_BxD, drafts - 1)

    def taken(windows_BxWxDxX):
        return take_rows(take_rows(windows_BxWxDxX, chosen_Bx1)[:, 0], offset_BxD)

    return tuple(map(taken, of_windows)), is_there_BxD


def _with_drafts(models, state, active_B, logits_BxDxV, is_drafted_BxD, keep_B) -> Decoding:
    """The drafts after the texts as they are now, for the next pass; where none was made, those of an earlier one."""
    slots, drafts = state.slots, logits_BxDxV.shape[1]
    u_BxD = at_positions(slots.noise_BxS, slots.length_B, drafts)
    token_BxD, _ = draw(models.student, slots, active_B, logits_BxDxV, u_BxD)
    earlier_BxD = at_positions(slots.draft_BxD, keep_B, drafts)
    token_BxD = jnp.where(is_drafted_BxD, token_BxD, earlier_BxD)
    slots = slots._replace(draft_BxD=jnp.where(active_B[:, None], token_BxD, slots.draft_BxD))
    if models.exact_windows < models.k:
        odds_BxD = jnp.where(is_drafted_BxD, models.student.probability(logits_BxDxV), 0)
        slots = slots._replace(odds_BxD=jnp.where(active_B[:, None], odds_BxD, slots.odds_BxD))
    return state._replace(slots=slots)


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
    model, name, slots = models.causal, models.causal_name, state.slots
    weights, read_B = weights[name], slots.cached_B[name]
    tokens_BxM = at_positions(slots.tokens_BxS, read_B, 1)
    if draft_BxK is not None:
        tokens_BxM = jnp.concatenate([tokens_BxM, draft_BxK], axis=1)
    x_BxMxD = call(model, weights, "embed", tokens_BxM)
    hidden_BxMxD, caches = append(model, weights, x_BxMxD, state.caches[name], read_B, live)
    u_BxM = at_positions(slots.noise_BxS, slots.length_B, tokens_BxM.shape[1])
    logits_BxMxV = ordered_logits(model, weights, hidden_BxMxD)
    drawn = _drawn(model, slots, active_B, logits_BxMxV, u_BxM)
    slots = _scored(model, slots, active_B, logits_BxMxV, drawn.tokens_BxM)
    return drawn, _after_a_pass(state._replace(slots=slots), name, caches, active_B)


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
