"""Slots: what a device knows of the requests that it works on, in arrays whose shapes never change.

A slot is row b of every array: B slots, texts of up to S positions.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kforcing_jax.decoding.requests import MODES, MOST_END_IDS, Request
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

    @classmethod
    def empty(cls, rows: int) -> "Settings":
        """Of no request; numpy arrays, to be filled."""
        whole = [np.zeros(rows, np.int32) for _ in range(2)]
        numbers = [np.ones(rows, np.float32), *(np.zeros(rows, np.float32) for _ in range(2))]
        more = np.zeros(rows, np.uint32), np.zeros(rows, np.int32), np.ones(rows, np.int32)
        return cls(*whole, *more, *numbers, np.full((rows, MOST_END_IDS), -1, np.int32))

    def fill(self, row: int, request: Request, k: int):
        """Writes a request into a row of the host's arrays."""
        ends = [*request.end_ids, *[-1] * (MOST_END_IDS - len(request.end_ids))]
        values = (
            len(request.prompt),
            request.end,
            request.seed,
            MODES.index(request.mode),
            k,
            request.tau,
            request.confidence,
            request.frequency_penalty,
            ends,
        )
        for array, value in zip(self, values, strict=True):
            array[row] = value


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
    of_tau_BxD: jax.Array  # what the student's noise encoder makes of the temperature

    @classmethod
    def empty(cls, rows: int, positions: int, models: tuple[str, ...], width: int) -> "Slots":
        """Free slots. `width` is that of the student, 0 without one."""

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
            of_tau_BxD=jnp.zeros((rows, width)),
        )


def insert(slots: Slots, is_new_B, settings: Settings, tokens_BxS, noise_BxS, is_given_B, of_tau_BxD) -> Slots:
    """Slots with new requests in the rows `is_new`; noise that is not given comes from the seeds."""
    positions_BxS = jnp.broadcast_to(jnp.arange(tokens_BxS.shape[1]), tokens_BxS.shape)
    seeded_BxS = position_noise(settings.seed_B, positions_BxS)
    # An f64 just below 1 is no f32 below 1.
    given_BxS = jnp.minimum(noise_BxS, LARGEST_UNIFORM)
    zeros = jax.tree.map(jnp.zeros_like, (slots.cached_B, slots.passes_B))
    new = Slots(
        settings=settings,
        tokens_BxS=tokens_BxS,
        noise_BxS=jnp.where(is_given_B[:, None], given_BxS, seeded_BxS),
        length_B=settings.prompt_B,
        running_B=jnp.ones_like(is_new_B),
        finite_B=jnp.ones_like(is_new_B),
        cached_B=zeros[0],
        passes_B=zeros[1],
        of_tau_BxD=of_tau_BxD,
    )
    return jax.tree.map(lambda kept, row: jnp.where(_like(is_new_B, kept), row, kept), slots, new)


def _like(mask_B, array):
    return mask_B.reshape(-1, *[1] * (array.ndim - 1))


def at_positions(values_BxS: jax.Array, first_B: jax.Array, count: int) -> jax.Array:
    """`count` values of every row from position `first` on, (B, count)."""
    return jnp.take_along_axis(values_BxS, first_B[:, None] + jnp.arange(count), axis=1, mode="clip")


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
    write = jax.vmap(lambda row, new, first: jax.lax.dynamic_update_slice_in_dim(row, new, first, axis=0))
    return slots._replace(
        tokens_BxS=write(slots.tokens_BxS, new_BxM, slots.length_B),
        length_B=length_B,
        running_B=slots.running_B & ~(active_B & ended_B),
    )


def generated_counts(slots: Slots, columns_BxS: jax.Array, size: int) -> jax.Array:
    """How often every row's text has generated each token, (B, size) f32, by the column of each token."""
    position_S = jnp.arange(columns_BxS.shape[1])
    new_BxS = (position_S >= slots.settings.prompt_B[:, None]) & (position_S < slots.length_B[:, None])
    rows_Bx1 = jnp.arange(columns_BxS.shape[0])[:, None]
    return jnp.zeros((columns_BxS.shape[0], size)).at[rows_Bx1, columns_BxS].add(new_BxS.astype(jnp.float32))
