"""What a stage minimises.

An objective is in two parts, so that a batch can be worked off piece by piece and give the same result: `draw_inputs`
draws the randomness of a whole batch, and `losses` is a sum over rows. `registry.py` has the names of objectives; each
is made from (model, teacher, stage, eos_id).
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kforcing_jax.config import StageConfig
from kforcing_jax.data.packing import Batch
from kforcing_jax.models import CausalLM, PushForwardLM
from kforcing_jax.models.gated import with_own
from kforcing_jax.noise import sample_uniform
from kforcing_jax.registry import LOSSES
from kforcing_jax.training.losses import (
    Mean,
    block_weights,
    loss_and_agreement,
    next_token_weights,
    weighted_mean,
    window_metrics,
    window_weights,
)
from kforcing_jax.training.rollout import rollout


class Inputs(NamedTuple):
    """What a row's loss depends on besides parameters; every leaf has a leading axis of rows."""

    batch: Batch
    noise_BxNxK: jax.Array | None = None
    tau_B: jax.Array | None = None


@dataclasses.dataclass(frozen=True)
class Objective:
    """What a stage minimises.

    `draw_inputs(batch, key) -> Inputs`; `losses(params, teacher_params, inputs) -> (loss, metrics)`, all `Mean`.
    """

    draw_inputs: Callable[[Batch, jax.Array], Inputs]
    losses: Callable[[dict, dict, Inputs], tuple[Mean, dict[str, Mean]]]


def language_modelling(
    model: CausalLM, teacher: None = None, stage: StageConfig | None = None, eos_id: int | None = None
) -> Objective:
    """Next-token cross entropy on real text; there is no teacher and no randomness."""
    del teacher, stage, eos_id

    def draw_inputs(batch, key):
        del key
        return Inputs(batch)

    def losses(params, teacher_params, inputs):
        del teacher_params
        tokens_BxN, segments_BxN, answers_BxN = inputs.batch
        variables = {"params": params}
        result: Any = model.apply(variables, tokens_BxN, segments_BxN=segments_BxN, method="begin")
        targets_BxNx1 = model.cfg.column_of(jnp.roll(tokens_BxN, -1, axis=1)[..., None])
        hidden_BxNx1xD = result.known.hidden
        loss_BxNx1, _ = model.apply(variables, loss_and_agreement, hidden_BxNx1xD, targets_BxNx1, method="per_token")
        weights_BxN = next_token_weights(tokens_BxN, segments_BxN, answers_BxN)
        return weighted_mean(loss_BxNx1[..., 0], weights_BxN), {}

    return Objective(draw_inputs, losses)


def distillation(
    student: PushForwardLM,
    teacher: CausalLM | PushForwardLM,
    stage: StageConfig,
    eos_id: int | None,
    targets: Callable[..., jax.Array] = rollout,
) -> Objective:
    """The stage's loss (cross entropy) on the teacher's own tokens for the same noise, windows after every position.

    A CausalLM teacher rolls out token by token; a student teacher half a window at a time (self-forcing). Of a gated
    student only what is its own is trained: `params` are that, and the rest is in `teacher_params`. Its text rows are
    the teacher's, so one pass over the text, without a gradient, serves the rollout, the student, and all windows.
    `targets` gives the tokens to learn, with the arguments of `rollout`.

    Raises:
      ConfigError: a loss of one's own cannot be imported.
    """
    chunk = 1 if isinstance(teacher, CausalLM) else stage.window // 2
    scored = functools.partial(loss_and_agreement, loss=LOSSES.find(stage.loss))

    def draw_inputs(batch, key):
        noise_key, tau_key = jax.random.split(key)
        noise_BxNxK = sample_uniform(noise_key, (*batch.tokens.shape, stage.windows * stage.window))
        tau_B = jax.random.uniform(tau_key, batch.tokens.shape[:1], minval=stage.tau_min, maxval=stage.tau_max)
        return Inputs(batch, noise_BxNxK, tau_B)

    def of_windows(params, teacher_params, inputs, text):
        (tokens_BxN, segments_BxN, answers_BxN), noise_BxNxK, tau_B = inputs
        given = tokens_BxN, noise_BxNxK, tau_B, chunk, segments_BxN, stage.top_p, text
        targets_BxNxK = jax.lax.stop_gradient(targets(teacher, teacher_params, *given))
        where = tokens_BxN, segments_BxN, eos_id, stage.skip_after_eos, answers_BxN
        weights_BxNxK = window_weights(targets_BxNxK, *where)
        variables = {"params": params}
        method, first = ("begin", tokens_BxN) if text is None else ("resume", text)
        result: Any = student.apply(variables, first, noise_BxNxK, tau_B, segments_BxN, method=method)
        columns_BxNxK = student.cfg.column_of(targets_BxNxK)
        per_token: Any = student.apply(variables, scored, result.noise.hidden, columns_BxNxK, method="per_token")
        loss_BxNxK, agrees_BxNxK = per_token
        blocks_BxN = block_weights(weights_BxNxK, segments_BxN)
        return window_metrics(loss_BxNxK, agrees_BxNxK, weights_BxNxK, blocks_BxN)

    def losses(params, teacher_params, inputs):
        return of_windows(params, teacher_params, inputs, None)

    return Objective(draw_inputs, _gated(student, stage.windows, of_windows) if student.cfg.is_gated else losses)


def _gated(student, windows, of_windows):
    """The losses of a gated student, whose own parameters are trained, over several windows after every position.

    `of_windows(params, teacher_params, inputs, text)` are those of one, from the known rows of a pass over the text.
    """

    def losses(params, teacher_params, inputs):
        params = with_own(teacher_params, params)
        # Nothing that is trained has a part in the text's rows.
        text: Any = student.text_model.apply(
            {"params": teacher_params}, inputs.batch.tokens, segments_BxN=inputs.batch.segments, method="begin"
        )
        known = jax.lax.stop_gradient(text.known)
        if windows == 1:
            return of_windows(params, teacher_params, inputs, known)
        noise_MxBxNxK = jnp.stack(jnp.split(inputs.noise_BxNxK, windows, axis=2))
        means = jax.lax.map(
            lambda noise_BxNxK: of_windows(params, teacher_params, inputs._replace(noise_BxNxK=noise_BxNxK), known),
            noise_MxBxNxK,
        )
        return jax.tree.map(lambda x_M: x_M.sum(0), means)

    return losses


def batch_loss(
    objective: Objective, params: dict, teacher_params: dict, batch: Batch, index: jax.Array | int, key: jax.Array
) -> Mean:
    """The objective's loss on one of several batches, each with noise of its own by its index."""
    inputs = objective.draw_inputs(batch, jax.random.fold_in(key, index))
    return objective.losses(params, teacher_params, inputs)[0]
