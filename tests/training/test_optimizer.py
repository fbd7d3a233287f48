"""Schedules, clipping and the paper's numbers."""

import jax.numpy as jnp
import optax
import pytest

from kforcing_jax.config import StageConfig
from kforcing_jax.training.optimizer import learning_rate, make_optimizer


def test_the_defaults_are_the_papers():
    stage = StageConfig()
    assert (stage.learning_rate, stage.beta1, stage.beta2, stage.epsilon) == (1e-4, 0.9, 0.999, 1e-6)
    assert (stage.weight_decay, stage.clip_norm, stage.ema_decay) == (0.0, 1.0, 0.999)
    assert learning_rate(stage)(0) == learning_rate(stage)(999) == pytest.approx(1e-4)


def test_warm_up_rises_to_the_learning_rate_and_never_starts_at_zero():
    schedule = learning_rate(StageConfig(learning_rate=1.0, warmup_steps=4))
    rates = [float(schedule(step)) for step in range(6)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0, 1.0])


def test_a_cosine_reaches_zero_after_the_last_step():
    schedule = learning_rate(StageConfig(learning_rate=1.0, schedule="cosine", warmup_steps=10, steps=110))
    assert float(schedule(10)) == pytest.approx(1.0)
    assert float(schedule(60)) == pytest.approx(0.5)
    assert float(schedule(110)) == pytest.approx(0.0, abs=1e-6)


def test_gradients_are_clipped_before_adam_sees_them():
    optimizer = make_optimizer(StageConfig(clip_norm=1.0))
    params = {"w": jnp.zeros(2)}
    small, _ = optimizer.update({"w": jnp.array([0.6, 0.8])}, optimizer.init(params), params)
    large, _ = optimizer.update({"w": jnp.array([6e5, 8e5])}, optimizer.init(params), params)
    assert optax.tree.norm(small) > 0
    assert jnp.allclose(small["w"], large["w"], rtol=1e-4)


def test_weight_decay_pulls_parameters_towards_zero():
    optimizer = make_optimizer(StageConfig(weight_decay=0.5, learning_rate=0.1))
    params = {"w": jnp.ones(1)}
    updates, _ = optimizer.update({"w": jnp.zeros(1)}, optimizer.init(params), params)
    assert float(updates["w"][0]) == pytest.approx(-0.05, rel=1e-3)
