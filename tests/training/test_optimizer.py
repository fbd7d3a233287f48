"""Schedules, clipping and the paper's numbers."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from kforcing_jax.config import StageConfig
from kforcing_jax.models import ModelConfig, PushForwardLM, init_params
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


def test_a_line_falls_to_zero_at_the_last_step():
    schedule = learning_rate(StageConfig(learning_rate=1.0, schedule="linear", warmup_steps=10, steps=110))
    assert [float(schedule(step)) for step in (10, 35, 110)] == pytest.approx([1.0, 0.75, 0.0])


def test_warm_up_stable_decay_is_constant_until_the_last_part_of_the_steps():
    stage = StageConfig(learning_rate=1.0, schedule="wsd", warmup_steps=10, steps=110, decay_fraction=0.2)
    rates = [float(learning_rate(stage)(step)) for step in (10, 60, 90, 100, 110)]
    assert rates == pytest.approx([1.0, 1.0, 1.0, 0.5, 0.0])


def test_a_stable_phase_does_not_know_how_long_it_will_be():
    short, long = (learning_rate(StageConfig(schedule="wsd", steps=steps)) for steps in (100, 1000))
    assert all(short(step) == long(step) for step in range(80))


@pytest.fixture(scope="module")
def muon_steps():
    """Parameters of a small student, random gradients, and the first update that Muon makes of them."""
    model = PushForwardLM(ModelConfig(vocab_size=13, mask_id=12, num_layers=2, d_model=16, num_heads=2))
    params = jax.jit(lambda: init_params(model, jax.random.key(0)))()
    keys = iter(jax.random.split(jax.random.key(1), 100))
    gradients = jax.tree.map(lambda x: jax.random.normal(next(keys), x.shape), params)
    optimizer = make_optimizer(StageConfig(optimizer="muon", learning_rate=1.0, rest_rate=0.25))
    return params, gradients, first_update(optimizer, gradients, params)


def first_update(optimizer, gradients, params):
    """As one program: op by op it would compile for half a minute."""
    return jax.jit(lambda g, p: optimizer.update(g, optimizer.init(p), p)[0])(gradients, params)


def test_muon_moves_all_singular_values_of_a_matrix_alike(muon_steps):
    *_, updates = muon_steps
    blocks = updates["backbone"]["blocks"]
    queries = blocks["attn_qkv"]["kernel"][1, :, 0].reshape(16, 16)
    for matrix in (queries, blocks["mlp_in"]["kernel"][0], updates["noise_encoder"]["project"]["kernel"]):
        values = np.linalg.svd(matrix, compute_uv=False)
        assert values.max() / values.min() < 4  # of a random matrix of this size: more than 20


def test_muon_leaves_tokens_and_vectors_to_adam(muon_steps):
    params, gradients, updates = muon_steps
    adam = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(0.25, eps=1e-6, weight_decay=0.0, nesterov=True))
    expected = first_update(adam, gradients, params)
    for path in (("embedding", "embedding"), ("output", "kernel"), ("final_norm", "scale")):
        layer, name = path
        np.testing.assert_allclose(
            updates["backbone"][layer][name], expected["backbone"][layer][name], rtol=1e-4, err_msg=layer
        )


def test_muon_moves_each_layer_as_if_it_were_alone(muon_steps):
    params, *_ = muon_steps
    optimizer = make_optimizer(StageConfig(optimizer="muon", clip_norm=1e9))
    gradients = jax.tree.map(jnp.ones_like, params)
    other = jax.tree.map(lambda x: x, gradients)
    kernel = other["backbone"]["blocks"]["mlp_in"]["kernel"]
    other["backbone"]["blocks"]["mlp_in"]["kernel"] = kernel.at[1].multiply(jnp.arange(64.0))
    moved = [first_update(optimizer, g, params) for g in (gradients, other)]
    first, second = (m["backbone"]["blocks"]["mlp_in"]["kernel"] for m in moved)
    np.testing.assert_array_equal(first[0], second[0])
    assert not np.allclose(first[1], second[1])
