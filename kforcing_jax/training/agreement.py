"""How often a student's tokens are those that the AR teacher draws from the same noise, given its own before them.

The one definition of agreement with the AR teacher, of validation and of evaluation.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from kforcing_jax.data.packing import Batch
from kforcing_jax.models import CausalLM, PushForwardLM
from kforcing_jax.models.keys import Causal, Known
from kforcing_jax.models.lm import consecutive, text_positions
from kforcing_jax.noise import sample_uniform
from kforcing_jax.sharding import to_host
from kforcing_jax.training.losses import block_agreement, block_weights, window_weights


def window_hidden(
    teacher: CausalLM,
    params: dict,
    tokens_BxN: jax.Array,
    window_BxNxK: jax.Array,
    segments_BxN: jax.Array | None = None,
) -> jax.Array:
    """The teacher's hidden_BxNxKxD at every window token, given the text and the window tokens before it."""
    variables = {"params": params}
    text: Any = teacher.apply(variables, tokens_BxN, segments_BxN=segments_BxN, method="begin")
    window = window_BxNxK.shape[2]
    if window == 1:
        return text.known.hidden
    positions = consecutive(text_positions(tokens_BxN.shape, segments_BxN) + 1, window - 1)
    prefix = Known(text.text_keys, Causal(segments_BxN))
    later: Any = teacher.apply(variables, window_BxNxK[..., :-1], None, None, positions, prefix, method="extend")
    return jnp.concatenate([text.known.hidden, later.known.hidden], axis=2)


class RowSums(NamedTuple):
    """Of R rows, f64: agreements, collision probabilities and counts per offset; agreeing blocks, and all blocks."""

    agree_RxK: np.ndarray
    collide_RxK: np.ndarray
    count_RxK: np.ndarray
    agree_R: np.ndarray
    blocks_R: np.ndarray

    @property
    def agreement_K(self) -> np.ndarray:
        """How often every offset agrees."""
        return self.agree_RxK.sum(0) / np.maximum(self.count_RxK.sum(0), 1)

    @property
    def chance_K(self) -> np.ndarray:
        """How often two independent draws of the teacher would be equal."""
        return self.collide_RxK.sum(0) / np.maximum(self.count_RxK.sum(0), 1)

    @property
    def block_agreement(self) -> float:
        """How often all offsets agree."""
        return float(self.agree_R.sum() / np.maximum(self.blocks_R.sum(), 1))


def agreement_by_row(
    teacher: CausalLM,
    teacher_params: dict,
    student: PushForwardLM,
    params: dict,
    batches: Batch,
    key: jax.Array,
    *,
    window: int,
    tau: float,
    eos_id: int | None,
    top_p: float = 1.0,
) -> RowSums:
    """Sums of every row of batches with leaves (I, B, N), each batch with noise of its own.

    `top_p` is that of the teacher's draws, with which the student was trained.

    All processes of a run have to call this together. One program for all batches of a size, also of other callers.
    """
    of_batches = []
    for index in range(len(batches.tokens)):
        batch = jax.tree.map(lambda x, index=index: x[index], batches)
        noise_BxNxK = sample_uniform(jax.random.fold_in(key, index), (*batch.tokens.shape, window))
        tau_B = jnp.full(len(batch.tokens), tau)
        sums = agreement_sums(teacher, teacher_params, student, params, batch, noise_BxNxK, tau_B, eos_id, top_p)
        of_batches.append([to_host(x).astype(np.float64) for x in sums])
    return RowSums(*map(np.concatenate, zip(*of_batches, strict=True)))


@functools.partial(jax.jit, static_argnames=("teacher", "student", "eos_id", "top_p"))
def agreement_sums(
    teacher: CausalLM,
    teacher_params: dict,
    student: PushForwardLM,
    params: dict,
    batch: Batch,
    noise_BxNxK: jax.Array,
    tau_B: jax.Array,
    eos_id: int | None,
    top_p: float = 1.0,
) -> tuple[jax.Array, ...]:
    """Of each row of a batch: agreements, collision probabilities and counts per offset, all (B, K); agreeing blocks,
    and all blocks, both (B,).
    """
    tau_Bx1x1 = tau_B[:, None, None]
    tokens_BxN, segments_BxN, answers_BxN = jax.tree.map(jnp.asarray, batch)

    def call(model, params, method, *args):
        return model.apply({"params": params}, *args, method=method)

    result = call(student, params, "begin", tokens_BxN, noise_BxNxK, tau_B, segments_BxN)
    drawn_BxNxK = call(student, params, "draw", student.drawable(result), noise_BxNxK, tau_Bx1x1)

    def compare(logits, u, tau, drawn):
        collision = jnp.square(jax.nn.softmax(teacher.tempered(logits, tau, top_p), axis=-1)).sum(-1)
        return teacher.pick(logits, u, tau, top_p) == drawn, collision

    hidden = window_hidden(teacher, teacher_params, tokens_BxN, drawn_BxNxK, segments_BxN)
    agrees, collision = call(teacher, teacher_params, "per_token", compare, hidden, noise_BxNxK, tau_Bx1x1, drawn_BxNxK)
    weights = window_weights(drawn_BxNxK, tokens_BxN, segments_BxN, eos_id, answers_BxN=answers_BxN)
    per_offset = [(weights * x).sum(1) for x in (agrees, collision, 1)]
    return (*per_offset, *jax.vmap(block_agreement)(agrees, weights, block_weights(weights, segments_BxN)))
