"""Rotary positions, the shape of the parameters, and what a ModelConfig refuses."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kforcing_jax.models import CausalLM
from kforcing_jax.models.attention import Causal
from kforcing_jax.models.transformer import Backbone, ModelConfig, rotary_angles, rotate


def rotated(x_HxC, position):
    return rotate(jnp.asarray(x_HxC), *rotary_angles(jnp.asarray(position), x_HxC.shape[-1]))


def test_a_rotated_product_depends_only_on_the_distance(rng):
    q, k = rng.normal(size=(2, 3, 8)).astype(np.float32)
    products = [jnp.sum(rotated(q, start + 5) * rotated(k, start), axis=-1) for start in (0, 1, 40, 900)]
    for product in products[1:]:
        np.testing.assert_allclose(product, products[0], atol=2e-4)
    assert jnp.abs(products[0] - jnp.sum(rotated(q, 6) * rotated(k, 0), axis=-1)).min() > 1e-2


def test_position_zero_is_not_rotated(rng):
    x = rng.normal(size=(3, 8)).astype(np.float32)
    np.testing.assert_array_equal(rotated(x, 0), x)


def test_rotation_pairs_channel_c_with_channel_c_plus_half():
    """Channel 1 of four turns by one radian per position times its frequency, 10000^(-1/2), into channel 3."""
    x = np.array([[0.0, 1.0, 0.0, 0.0]], np.float32)
    np.testing.assert_allclose(rotated(x, 50)[0], [0, np.cos(0.5), 0, np.sin(0.5)], atol=1e-6)


def test_angles_are_f32_whatever_the_dtype_of_the_queries():
    """Position 257 does not exist in bfloat16."""
    x = jnp.array([[1.0, 0.0]], jnp.bfloat16)
    assert rotated(x, 257).dtype == jnp.bfloat16
    np.testing.assert_allclose(rotated(x, 257)[0].astype(jnp.float32), [np.cos(257), np.sin(257)], atol=2**-7)


def test_moving_a_whole_text_changes_nothing(rng, tiny_config):
    backbone = Backbone(tiny_config)
    x = jnp.asarray(rng.normal(size=(1, 4, 1, tiny_config.d_model)), jnp.float32)
    reach, positions = Causal(), jnp.arange(4)[None, :, None]
    variables = jax.jit(backbone.init)(jax.random.key(0), x, positions, reach)
    apply = jax.jit(backbone.apply)
    here, _ = apply(variables, x, positions, reach)
    far, _ = apply(variables, x, positions + 300, reach)
    stretched, _ = apply(variables, x, positions * 3, reach)
    np.testing.assert_allclose(far, here, atol=1e-4)
    assert jnp.abs(stretched - here).max() > 1e-2


@pytest.mark.parametrize("kind", ["causal_lm", "push_forward_lm"])
def test_layers_are_stacked_on_a_leading_axis(request, kind):
    model, params = request.getfixturevalue(kind)
    leaves = jax.tree.leaves(params["backbone"]["blocks"])
    assert {leaf.shape[0] for leaf in leaves} == {model.cfg.num_layers}


def test_layers_start_from_different_weights(tiny_config):
    variables = jax.jit(CausalLM(tiny_config).init)(jax.random.key(0), jnp.zeros((1, 2), int))
    kernel = variables["params"]["backbone"]["blocks"]["attn_qkv"]["kernel"]
    assert jnp.abs(kernel[0] - kernel[1]).max() > 0


def test_the_teacher_and_the_student_have_the_same_backbone(causal_lm, push_forward_lm):
    shapes = [jax.tree.map(jnp.shape, params["backbone"]) for _, params in (causal_lm, push_forward_lm)]
    assert shapes[0] == shapes[1]
    assert set(causal_lm[1]) == {"backbone"}
    assert set(push_forward_lm[1]) == {"backbone", "noise_encoder"}


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"d_model": 18, "num_heads": 4}, "model.d_model = 18 is not divisible by model.num_heads = 4"),
        ({"d_model": 6, "num_heads": 2}, "model.d_model / model.num_heads = 3 is odd"),
        ({"mask_id": 13}, r"model.mask_id = 13 is not in \[0, 13\)"),
        ({"mask_id": -1}, r"model.mask_id = -1 is not in \[0, 13\)"),
    ],
)
def test_a_shape_that_cannot_be_built_is_refused(tiny_config: ModelConfig, changes, message):
    with pytest.raises(ValueError, match=message):
        dataclasses.replace(tiny_config, **changes)
