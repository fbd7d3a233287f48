"""The training step: rollout, student forward, loss, gradient, update and EMA in one XLA program."""

import flax.struct
import jax
import jax.numpy as jnp
import optax

from kforcing_jax.data.packing import Batch
from kforcing_jax.sharding import ROWS, constrain
from kforcing_jax.training.losses import Mean
from kforcing_jax.training.objectives import Objective


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


def train_step(
    state: TrainState,
    batch: Batch,
    key: jax.Array,
    *,
    objective: Objective,
    optimizer: optax.GradientTransformation,
    teacher_params: dict | None = None,
    ema_decay: float = 0.999,
    accumulation: int = 1,
) -> tuple[TrainState, dict[str, jax.Array]]:
    """(new state, metrics). Metrics are scalars, f32: the objective's, `loss`, and `grad_norm` before clipping.

    Randomness is a function of (key, state.step), so a resumed run repeats an uninterrupted one exactly. The batch is
    worked off in `accumulation` parts, which have to divide its rows; they change memory and nothing else.
    `teacher_params` may be left out where the data is the teacher.
    """
    inputs = objective.draw_inputs(batch, jax.random.fold_in(key, state.step))
    grads, loss, metrics = _gradients(objective, state.params, teacher_params or {}, inputs, accumulation)
    updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
    params = optax.apply_updates(state.params, updates)
    new_state = TrainState(
        step=state.step + 1,
        params=params,
        ema=optax.incremental_update(params, state.ema, 1 - ema_decay),
        opt_state=opt_state,
    )
    metrics = {name: mean.value for name, mean in metrics.items()}
    return new_state, metrics | {"loss": loss.value, "grad_norm": optax.tree.norm(grads)}


def _gradients(objective, params, teacher_params, inputs, accumulation):
    """(gradients of the mean loss, loss, metrics) of a whole batch."""

    def total_loss(params, part):
        loss, metrics = objective.losses(params, teacher_params, part)
        return loss.total, (loss, metrics)

    def of_part(part):
        grads, (loss, metrics) = jax.grad(total_loss, has_aux=True)(params, part)
        return grads, loss, metrics

    if accumulation == 1:
        grads, loss, metrics = of_part(inputs)
    else:
        parts = _parts(inputs, accumulation)
        zeros = jax.tree.map(
            lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(of_part, jax.tree.map(lambda x: x[0], parts))
        )
        (grads, loss, metrics), _ = jax.lax.scan(
            lambda sums, part: (jax.tree.map(jnp.add, sums, of_part(part)), None), zeros, parts
        )
    scale = Mean(jnp.float32(1), loss.weight).value
    return jax.tree.map(lambda g: g * scale, grads), loss, metrics


def _parts(inputs, count):
    """(B, ...) to (count, B / count, ...): every count-th row, so that every device keeps the rows it has."""

    def split(x):
        parts = x.reshape(x.shape[0] // count, count, *x.shape[1:]).swapaxes(0, 1)
        return constrain(parts, None, ROWS)

    return jax.tree.map(split, inputs)
