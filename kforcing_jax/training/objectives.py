"""What a stage minimises: (parameters, teacher's parameters, text, key) -> (loss, metrics)."""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from kforcing_jax.config import StageConfig
from kforcing_jax.models import CausalLM, PushForwardLM
from kforcing_jax.noise import sample_uniform
from kforcing_jax.training.losses import next_token_loss, weights_up_to_eos, window_metrics
from kforcing_jax.training.rollout import rollout

Objective = Callable[[dict, dict, jax.Array, jax.Array], tuple[jax.Array, dict[str, jax.Array]]]


def language_modelling(model: CausalLM) -> Objective:
    """Next-token cross entropy on real text; there is no teacher and no randomness."""

    def objective(params, teacher_params, tokens_BxN, key):
        del teacher_params, key
        return next_token_loss(model.apply({"params": params}, tokens_BxN), tokens_BxN).mean(), {}

    return objective


def distillation(
    student: PushForwardLM, teacher: CausalLM | PushForwardLM, stage: StageConfig, eos_id: int | None
) -> Objective:
    """Cross entropy against the teacher's own tokens for the same noise, one window after every position.

    A CausalLM teacher rolls out token by token; a student teacher half a window at a time (self-forcing).
    """
    chunk = 1 if isinstance(teacher, CausalLM) else stage.window // 2

    def objective(params, teacher_params, tokens_BxN, key):
        noise_key, tau_key = jax.random.split(key)
        batch, length = tokens_BxN.shape
        noise_BxNxK = sample_uniform(noise_key, (batch, length, stage.window))
        tau_B = jax.random.uniform(tau_key, (batch,), minval=stage.tau_min, maxval=stage.tau_max)
        targets_BxNxK = rollout(teacher, teacher_params, tokens_BxN, noise_BxNxK, tau_B, chunk)
        weights_BxNxK = weights_up_to_eos(targets_BxNxK, eos_id if stage.skip_after_eos else None)
        logits_BxNxKxV = student.apply({"params": params}, tokens_BxN, noise_BxNxK, tau_B)
        return window_metrics(logits_BxNxKxV, jax.lax.stop_gradient(targets_BxNxK), weights_BxNxK)

    return objective


def in_full_precision(objective: Objective) -> Objective:
    """The same objective with every matmul at the highest precision (TPUs otherwise multiply f32 in bf16)."""

    def precise(*args):
        with jax.default_matmul_precision("highest"):
            return objective(*args)

    return precise


def mean_loss(objective: Objective, params, teacher_params, batches_IxBxN: jax.Array, key: jax.Array) -> jax.Array:
    """The objective's loss averaged over I batches, each with noise of its own."""

    def one(index_and_batch):
        index, tokens_BxN = index_and_batch
        return objective(params, teacher_params, tokens_BxN, jax.random.fold_in(key, index))[0]

    return jax.lax.map(one, (jnp.arange(len(batches_IxBxN)), batches_IxBxN)).mean()
