"""Slots: what a device knows of the requests that it works on, in arrays whose shapes never change.

A slot is row b of every array: B slots, texts of up to S positions.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kforcing_jax.decoding.requests import MODES, MOST_BIASES, MOST_END_IDS, Request
from kforcing_jax.noise import LARGEST_UNIFORM, position_noise


class Settings(NamedTuple):
    """What requests ask for; arrays of the host's, too."""

    prompt_B: jax.Array  # tokens of the prompt
    end_B: jax.Array  # the longest text
    seed_B: jax.Array
    mode_B: jax.Array  # index into MODES
    k_B: jax.Array
    tau_B: jax.Array
    confidence_B: jax.Array
    penalty_B: jax.Array
    end_ids_BxE: jax.Array  # -1 where there are fewer
    top_k_B: jax.Array  # 0: all
    top_p_B: jax.Array
    biased_BxI: jax.Array  # token ids
    bias_BxI: jax.Array  # 0 where there are fewer
    is_changed_B: jax.Array  # whether logits are, before a draw: penalty, bias
    is_truncated_B: jax.Array
    is_scored_B: jax.Array  # whether log-probabilities are wanted

    @classmethod
    def empty(cls, rows: int) -> "Settings":
        """Of no request; numpy arrays, to be filled."""

        def array(dtype, value=0, *shape):
            return np.full((rows, *shape), value, dtype)

        whole, number = np.int32, np.float32
        return cls(
            prompt_B=array(whole),
            end_B=array(whole),
            seed_B=array(np.uint32),
            mode_B=array(whole),
            k_B=array(whole, 1),
            tau_B=array(number, 1),
            confidence_B=array(number),
            penalty_B=array(number),
            end_ids_BxE=array(whole, -1, MOST_END_IDS),
            top_k_B=array(whole),
            top_p_B=array(number, 1),
            biased_BxI=array(whole, 0, MOST_BIASES),
            bias_BxI=array(number, 0, MOST_BIASES),
            is_changed_B=array(bool),
            is_truncated_B=array(bool),
            is_scored_B=array(bool),
        )

    def fill(self, row: int, request: Request, k: int) -> None:
        """Writes a request into a row of the host's arrays, which are empty there."""
        self.prompt_B[row] = len(request.prompt)
        self.end_B[row] = request.end
        self.seed_B[row] = request.seed
        self.mode_B[row] = MODES.index(request.mode)
        self.k_B[row] = k
        self.tau_B[row] = request.tau
        self.confidence_B[row] = request.confidence
        self.penalty_B[row] = request.frequency_penalty
        self.end_ids_BxE[row, : len(request.end_ids)] = request.end_ids
        self.top_k_B[row] = min(request.top_k, np.iinfo(np.int32).max)
        self.top_p_B[row] = request.top_p
        self.biased_BxI[row, : len(request.logit_bias)] = list(request.logit_bias)
        self.bias_BxI[row, : len(request.logit_bias)] = list(request.logit_bias.values())
        self.is_changed_B[row] = bool(request.logit_bias) or request.frequency_penalty != 0
        self.is_truncated_B[row] = request.top_k > 0 or request.top_p < 1
        self.is_scored_B[row] = request.logprobs is not None


class Slots(NamedTuple):
    """The state of all slots. What lies at and beyond a text's length is arbitrary."""

    settings: Settings
    tokens_BxS: jax.Array  # the text: prompt, then what was generated
    noise_BxS: jax.Array  # the uniform of every position
    length_B: jax.Array  # tokens of the text
    running_B: jax.Array  # neither ended nor free
    finite_B: jax.Array  # all logits so far were
    cached_B: dict[str, jax.Array]  # by model: tokens whose keys its cache holds
    passes_B: dict[str, jax.Array]  # by model: forward passes after prefill
    kept_BxM: jax.Array  # passes that kept more than 0, 1, ... tokens
    of_tau_BxD: jax.Array  # what the student's noise encoder makes of the temperature
    scores_BxSxC: jax.Array  # log-probabilities of every position, as `logprobs.score` gives them
    draft_BxD: jax.Array  # tokens after the text that the next pass of mode exact verifies; at first anything
    odds_BxD: jax.Array  # the student's probabilities of them

    @classmethod
    def empty(
        cls, rows: int, positions: int, models: tuple[str, ...], most: int, width: int, scores: int, drafts: int = 0
    ) -> "Slots":
        """Free slots.

        Args:
          models: names of those that there are.
          most: tokens that a pass gives at most.
          width: of the student, 0 without one.
          scores: what `logprobs.score` gives of a token, 0 without a teacher.
          drafts: that a pass leaves to the next one.
        """

        def counts():
            return {name: jnp.zeros(rows, jnp.int32) for name in models}

        return cls(
            settings=Settings(*map(jnp.asarray, Settings.empty(rows))),
            tokens_BxS=jnp.zeros((rows, positions), jnp.int32),
            noise_BxS=jnp.zeros((rows, positions)),
            length_B=jnp.zeros(rows, jnp.int32),
            running_B=jnp.zeros(rows, bool),
            finite_B=jnp.ones(rows, bool),
            cached_B=counts(),
            passes_B=counts(),
            kept_BxM=jnp.zeros((rows, most), jnp.int32),
            of_tau_BxD=jnp.zeros((rows, width)),
            scores_BxSxC=jnp.zeros((rows, positions if scores else 0, scores)),
            draft_BxD=jnp.zeros((rows, drafts), jnp.int32),
            odds_BxD=jnp.zeros((rows, drafts)),
        )


def insert(
    slots: Slots,
    is_new_B: jax.Array,
    settings: Settings,
    tokens_BxS: jax.Array,
    noise_BxS: jax.Array,
    is_given_B: jax.Array,
    of_tau_BxD: jax.Array,
) -> Slots:
    """Slots with new requests in the rows `is_new`; noise that is not given comes from the seeds."""
    positions_BxS = jnp.broadcast_to(jnp.arange(tokens_BxS.shape[1]), tokens_BxS.shape)
    seeded_BxS = position_noise(settings.seed_B, positions_BxS)
    # An f64 just below 1 is no f32 below 1.
    given_BxS = jnp.minimum(noise_BxS, LARGEST_UNIFORM)
    counts = slots.cached_B, slots.passes_B, slots.kept_BxM, slots.draft_BxD, slots.odds_BxD
    zeros = jax.tree.map(jnp.zeros_like, counts)
    new = Slots(
        settings=settings,
        tokens_BxS=tokens_BxS,
        noise_BxS=jnp.where(is_given_B[:, None], given_BxS, seeded_BxS),
        length_B=settings.prompt_B,
        running_B=jnp.ones_like(is_new_B),
        finite_B=jnp.ones_like(is_new_B),
        cached_B=zeros[0],
        passes_B=zeros[1],
        kept_BxM=zeros[2],
        of_tau_BxD=of_tau_BxD,
        scores_BxSxC=slots.scores_BxSxC,
        draft_BxD=zeros[3],
        odds_BxD=zeros[4],
    )
    return jax.tree.map(lambda kept, row: jnp.where(_like(is_new_B, kept), row, kept), slots, new)


def _like(mask_B, array):
    return mask_B.reshape(-1, *[1] * (array.ndim - 1))


def at_positions(values_BxS: jax.Array, first_B: jax.Array, count: int) -> jax.Array:
    """`count` values of every row from position `first` on, (B, count)."""
    return jnp.take_along_axis(values_BxS, first_B[:, None] + jnp.arange(count), axis=1, mode="clip")


def put(values_BxSx: jax.Array, new_BxMx: jax.Array, first_B: jax.Array) -> jax.Array:
    """Values with M new ones of every row from position `first` on."""
    write = jax.vmap(lambda row, new, first: jax.lax.dynamic_update_slice_in_dim(row, new, first, axis=0))
    return write(values_BxSx, new_BxMx, first_B)


def commit(slots: Slots, new_BxM: jax.Array, keep_B: jax.Array, active_B: jax.Array) -> Slots:
    """Appends the first `keep` of M new tokens to the texts of active rows, up to their end or a token that ends them.

    M positions after the longest text have to exist.
    """
    settings = slots.settings
    ends_BxM = (new_BxM[..., None] == settings.end_ids_BxE[:, None]).any(-1)
    offset_M = jnp.arange(new_BxM.shape[1])
    first_end_B = jnp.min(jnp.where(ends_BxM, offset_M, new_BxM.shape[1]), axis=1)
    keep_B = jnp.minimum(keep_B, settings.end_B - slots.length_B)
    keep_B = jnp.where(active_B, jnp.minimum(keep_B, first_end_B + 1), 0)
    length_B = slots.length_B + keep_B
    ended_B = (length_B >= settings.end_B) | (first_end_B < keep_B)
    return slots._replace(
        tokens_BxS=put(slots.tokens_BxS, new_BxM, slots.length_B),
        kept_BxM=slots.kept_BxM + (keep_B[:, None] > jnp.arange(slots.kept_BxM.shape[1])),
        length_B=length_B,
        running_B=slots.running_B & ~(active_B & ended_B),
    )


def generated_counts(slots: Slots, columns_BxS: jax.Array, size: int) -> jax.Array:
    """How often every row's text has generated each token, (B, size) f32, by the column of each token."""
    position_S = jnp.arange(columns_BxS.shape[1])
    new_BxS = (position_S >= slots.settings.prompt_B[:, None]) & (position_S < slots.length_B[:, None])
    rows_Bx1 = jnp.arange(columns_BxS.shape[0])[:, None]
    return jnp.zeros((columns_BxS.shape[0], size)).at[rows_Bx1, columns_BxS].add(new_BxS.astype(jnp.float32))
