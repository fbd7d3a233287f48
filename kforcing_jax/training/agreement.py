"""How often a student's tokens are those that the AR teacher draws from the same noise, given its own before them.

The one definition of agreement with the AR teacher, of validation and of evaluation.
"""

from typing import Any

import jax
import jax.numpy as jnp

from kforcing_jax.models import CausalLM, PushForwardLM
from kforcing_jax.models.keys import Causal, Known
from kforcing_jax.models.lm import consecutive, text_positions
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


def agreement_sums(
    teacher: CausalLM,
    teacher_params: dict,
    student: PushForwardLM,
    params: dict,
    tokens_BxN: jax.Array,
    segments_BxN: jax.Array | None,
    noise_BxNxK: jax.Array,
    tau_B: jax.Array,
    eos_id: int | None,
) -> tuple[jax.Array, ...]:
    """Of each row of a batch: agreements, collision probabilities and counts per offset, all (B, K); agreeing blocks,
    and all blocks, both (B,).
    """
    tau_Bx1x1 = tau_B[:, None, None]

    def call(model, params, method, *args):
        return model.apply({"params": params}, *args, method=method)

    result = call(student, params, "begin", tokens_BxN, noise_BxNxK, tau_B, segments_BxN)
    drawn_BxNxK = call(student, params, "draw", student.drawable(result), noise_BxNxK, tau_Bx1x1)

    def compare(logits, u, tau, drawn):
        collision = jnp.square(jax.nn.softmax(teacher.tempered(logits, tau), axis=-1)).sum(-1)
        return teacher.pick(logits, u, tau) == drawn, collision

    hidden = window_hidden(teacher, teacher_params, tokens_BxN, drawn_BxNxK, segments_BxN)
    agrees, collision = call(teacher, teacher_params, "per_token", compare, hidden, noise_BxNxK, tau_Bx1x1, drawn_BxNxK)
    weights = window_weights(drawn_BxNxK, tokens_BxN, segments_BxN, eos_id)
    per_offset = [(weights * x).sum(1) for x in (agrees, collision, 1)]
    return (*per_offset, *jax.vmap(block_agreement)(agrees, weights, block_weights(weights, segments_BxN)))
