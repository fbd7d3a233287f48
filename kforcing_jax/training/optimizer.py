"""The optimiser of a stage."""

import optax

from kforcing_jax.config import StageConfig

# By the names in `config.SCHEDULES`: (highest rate, steps) -> schedule.
AFTER_WARMUP = {
    "constant": lambda rate, steps: optax.constant_schedule(rate),
    "cosine": optax.cosine_decay_schedule,
}


def learning_rate(stage: StageConfig) -> optax.Schedule:
    """Linear warm-up, then constant or a cosine to zero at the last step."""
    after = AFTER_WARMUP[stage.schedule](stage.learning_rate, max(stage.steps - stage.warmup_steps, 1))
    # Warm-up starts one step in, so that no step has a learning rate of zero.
    first = stage.learning_rate / (stage.warmup_steps + 1)
    warmup = optax.linear_schedule(first, stage.learning_rate, stage.warmup_steps)
    return optax.join_schedules([warmup, after], [stage.warmup_steps])


def make_optimizer(stage: StageConfig) -> optax.GradientTransformation:
    """AdamW behind gradient clipping, as in the paper; every number comes from the configuration."""
    return optax.chain(
        optax.clip_by_global_norm(stage.clip_norm),
        optax.adamw(
            learning_rate(stage),
            b1=stage.beta1,
            b2=stage.beta2,
            eps=stage.epsilon,
            weight_decay=stage.weight_decay,
        ),
    )
