"""The training step: rollout, student forward, loss, gradient, update and EMA in one XLA program."""

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from kforcing_jax.training.objectives import Objective
from kforcing_jax.training.sharding import batch_sharding, replicated


@flax.struct.dataclass
class TrainState:
    """Everything that a step changes."""

    step: jax.Array
    params: dict
    ema: dict  # exponential moving average of params
    opt_state: optax.OptState


def init_state(params: dict, optimizer: optax.GradientTransformation) -> TrainState:
    """State before the first step; the average starts at the parameters."""
    return TrainState(
        step=jnp.int32(0), params=params, ema=jax.tree.map(jnp.copy, params), opt_state=optimizer.init(params)
    )


def make_train_step(objective: Objective, optimizer: optax.GradientTransformation, ema_decay: float, mesh: Mesh):
    """The jitted step: (state, teacher's params, tokens_BxN, key) -> (state, metrics); the old state is donated.

    Randomness is a function of (key, state.step), so a resumed run repeats an uninterrupted one exactly.
    Metrics are scalars: the objective's, `loss`, and `grad_norm` before clipping.
    """

    def train_step(state: TrainState, teacher_params, tokens_BxN, key):
        step_key = jax.random.fold_in(key, state.step)
        (loss, metrics), grads = jax.value_and_grad(objective, has_aux=True)(
            state.params, teacher_params, tokens_BxN, step_key
        )
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        new_state = TrainState(
            step=state.step + 1,
            params=params,
            ema=optax.incremental_update(params, state.ema, 1 - ema_decay),
            opt_state=opt_state,
        )
        return new_state, metrics | {"loss": loss, "grad_norm": optax.tree.norm(grads)}

    whole = replicated(mesh)
    return jax.jit(
        train_step,
        in_shardings=(whole, whole, batch_sharding(mesh), whole),
        out_shardings=(whole, whole),
        donate_argnums=0,
    )
