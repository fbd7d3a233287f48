"""The optimiser of a stage: schedules of its learning rate, and what takes the steps; `registry.py` has their names."""

import jax
import optax

from kforcing_jax.config import StageConfig
from kforcing_jax.registry import OPTIMIZERS, SCHEDULES


def learning_rate(stage: StageConfig) -> optax.Schedule:
    """Linear warm-up, then what the stage's schedule says of the remaining steps: (step) -> rate."""
    after = SCHEDULES.find(stage.schedule)(stage, max(stage.steps - stage.warmup_steps, 1))
    # Warm-up starts one step in, so that no step has a learning rate of zero.
    first = stage.learning_rate / (stage.warmup_steps + 1)
    warmup = optax.linear_schedule(first, stage.learning_rate, stage.warmup_steps)
    return optax.join_schedules([warmup, after], [stage.warmup_steps])


def make_optimizer(stage: StageConfig) -> optax.GradientTransformation:
    """The stage's optimiser behind gradient clipping. Its numbers are the configuration's; Muon's own are optax's."""
    return optax.chain(optax.clip_by_global_norm(stage.clip_norm), OPTIMIZERS.find(stage.optimizer)(stage))


def constant(stage: StageConfig, steps: int) -> optax.Schedule:
    """The same rate throughout, as in the paper."""
    del steps
    return optax.constant_schedule(stage.learning_rate)


def cosine(stage: StageConfig, steps: int) -> optax.Schedule:
    """Half a cosine, to zero after the last step."""
    return optax.cosine_decay_schedule(stage.learning_rate, steps)


def linear(stage: StageConfig, steps: int) -> optax.Schedule:
    """A straight line to zero after the last step."""
    return optax.linear_schedule(stage.learning_rate, 0.0, steps)


def warmup_stable_decay(stage: StageConfig, steps: int) -> optax.Schedule:
    """Constant, then a straight line to zero in the last `decay_fraction` of the steps (Hu et al., 2024)."""
    decay = round(stage.decay_fraction * steps)
    falling = optax.linear_schedule(stage.learning_rate, 0.0, max(decay, 1))
    return optax.join_schedules([optax.constant_schedule(stage.learning_rate), falling], [steps - decay])


def adamw(stage: StageConfig) -> optax.GradientTransformation:
    """AdamW as in the paper."""
    return optax.adamw(
        learning_rate(stage),
        b1=stage.beta1,
        b2=stage.beta2,
        eps=stage.epsilon,
        weight_decay=stage.weight_decay,
    )


def muon(stage: StageConfig) -> optax.GradientTransformation:
    """Muon (Jordan et al., 2024) for the matrices of blocks and noise encoder, AdamW for all else.

    A matrix's step is its momentum with all singular values moved to about 1, by Newton-Schulz iterations. Embeddings
    and the output layer are matrices too, but their rows are tokens: AdamW takes them, at `rest_rate` of the rate and
    with Nesterov momentum, as optax has it.
    """
    rate = learning_rate(stage)
    return optax.contrib.muon(
        rate,
        weight_decay=stage.weight_decay,
        muon_weight_dimension_numbers=_dimension_numbers,
        adam_learning_rate=lambda step: stage.rest_rate * rate(step),
        adam_b1=stage.beta1,
        adam_b2=stage.beta2,
        eps=stage.epsilon,
        adam_weight_decay=stage.weight_decay,
    )


# How the kernels of the models are matrices, by the layer's name: inputs, outputs; other axes hold a matrix each, such
# as the layers of the stacked blocks, and queries, keys and values.
_MATRICES = {
    ("blocks", "attn_qkv"): ((1,), (3, 4)),
    ("blocks", "attn_q"): ((1,), (2, 3)),
    ("blocks", "attn_kv"): ((1,), (3, 4)),
    ("blocks", "attn_out"): ((1, 2), (3,)),
    ("blocks", "mlp_in"): ((1,), (2,)),
    ("blocks", "mlp_gate"): ((1,), (2,)),
    ("blocks", "mlp_out"): ((1,), (2,)),
    ("noise_encoder", "project"): ((0,), (1,)),
    ("noise_encoder", "mlp_in"): ((0,), (1,)),
    ("noise_encoder", "mlp_out"): ((0,), (1,)),
}
# The same of the deltas of blocks, by the matrix's name; their parts hold a matrix each.
_DELTAS = {"down": ((1,), (3,)), "up": ((2,), (3,)), "full": ((1,), (3,))}


def _dimension_numbers(params):
    """Of every leaf: how it is a matrix for Muon, None where it is none."""

    def of_leaf(path, leaf):
        names = tuple(key.key for key in path)
        axes = _MATRICES.get(names[-3:-1]) if names[-1] == "kernel" else None
        if names[-3:-2] == ("blocks",) and names[-2].endswith("_delta"):
            axes = _DELTAS[names[-1]]
        return axes and optax.contrib.MuonDimensionNumbers(*axes)

    return jax.tree_util.tree_map_with_path(of_leaf, params)
