"""Rotary positions, the shape of the parameters, and what a ModelConfig refuses."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import OPTIMISED

from kforcing_jax.architecture import Rope
from kforcing_jax.models import CausalLM, PushForwardLM, backbone, init_params, layers
from kforcing_jax.models.backbone import Backbone, ModelConfig
from kforcing_jax.models.keys import Text
from kforcing_jax.models.rotary import rotary_angles, rotate
from kforcing_jax.training.losses import loss_and_agreement


def rotated(x_HxC, position):
    return rotate(jnp.asarray(x_HxC), *rotary_angles(jnp.asarray(position), Rope(), x_HxC.shape[-1]))


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
    text, positions = Text(), jnp.arange(4)[None, :, None]
    variables = jax.jit(backbone.init)(jax.random.key(0), x, positions, text)
    apply = jax.jit(backbone.apply)
    here, _ = apply(variables, x, positions, text)
    far, _ = apply(variables, x, positions + 300, text)
    stretched, _ = apply(variables, x, positions * 3, text)
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


@pytest.fixture
def small_chunks(monkeypatch):
    """An output layer that holds two anchors' logits at a time."""
    monkeypatch.setattr(layers, "_MOST_LOGITS", 2 * 3 * 2 * 13)


def per_token_and_plain(model_and_params, rng):
    """Loss and tokens of random hidden states, and their gradients, through chunks and with all logits at once."""
    model, params = model_and_params
    hidden = jnp.asarray(rng.normal(size=(2, 6, 3, model.cfg.d_model)), jnp.float32)
    targets, u = jnp.asarray(rng.integers(0, 9, size=(2, 6, 3))), jnp.asarray(rng.random((2, 6, 3)), jnp.float32)
    tau, variables = jnp.array([0.5, 1.0])[:, None, None], {"params": params}

    def chunked(params, hidden):
        loss, _ = model.apply({"params": params}, loss_and_agreement, hidden, targets, method="per_token")
        return loss.sum()

    def plain(params, hidden):
        return loss_and_agreement(model.apply({"params": params}, hidden, method="logits"), targets)[0].sum()

    values = [jax.jit(jax.value_and_grad(f, argnums=(0, 1)))(params, hidden) for f in (chunked, plain)]
    drawn = model.apply(variables, hidden, u, tau, method="draw")
    return values, (
        drawn,
        model.pick(model.apply(variables, hidden, method="logits"), u, jnp.broadcast_to(tau, u.shape)),
    )


@pytest.mark.parametrize("kind", ["causal_lm", "push_forward_lm"])
def test_a_few_positions_at_a_time_give_what_all_logits_give(request, rng, small_chunks, kind):
    model = request.getfixturevalue(kind)
    assert layers.chunk_size((2, 6, 3), model[0].cfg.vocab_size) == 2
    (chunked, plain), (drawn, picked) = per_token_and_plain(model, rng)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-5), chunked, plain)
    np.testing.assert_array_equal(drawn, picked)


@pytest.mark.parametrize("anchors", [1, 7, 96, 1021, 1024])
def test_chunks_stay_within_the_limit_and_are_as_few_as_it_allows(anchors):
    """Also of a prime number of anchors, which only chunks of one divide."""
    for group, vocabulary in ((1, 13), (4, 50_258)):
        size, per_anchor = layers.chunk_size((8, anchors, group), vocabulary), 8 * group * vocabulary
        assert size * per_anchor <= layers._MOST_LOGITS
        assert -(-anchors // size) == -(-anchors // (layers._MOST_LOGITS // per_anchor))


def test_memory_of_the_loss_does_not_grow_with_all_logits(tiny_config):
    """Forward and backward of the loss over 32,768 and 131,072 positions of a vocabulary of 20,000."""
    model = CausalLM(dataclasses.replace(tiny_config, vocab_size=20_000))
    params = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))

    def loss(params, hidden, targets):
        return model.apply({"params": params}, loss_and_agreement, hidden, targets, method="per_token")[0].sum()

    def temporary_bytes(length):
        hidden = jax.ShapeDtypeStruct((1, length, 1, 16), jnp.float32)
        targets = jax.ShapeDtypeStruct((1, length, 1), jnp.int32)
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1))).lower(params, hidden, targets).compile(OPTIMISED)
        return compiled.memory_analysis().temp_size_in_bytes

    short, long = temporary_bytes(32_768), temporary_bytes(131_072)
    assert long < 1.1 * short
    assert long < 131_072 * 20_000 * 4 / 16


@pytest.mark.parametrize("remat", ["attention", "matmuls", "nothing"])
def test_what_is_kept_for_the_backward_pass_changes_no_gradient(rng, push_forward_lm, remat):
    model, params = push_forward_lm
    tokens, noise = rng.integers(0, 9, size=(2, 5)), jnp.asarray(rng.random((2, 5, 2)), jnp.float32)

    def gradient(policy):
        other = PushForwardLM(dataclasses.replace(model.cfg, remat=policy))
        return jax.jit(jax.grad(lambda p: (other.apply({"params": p}, tokens, noise, jnp.ones(2)) ** 2).mean()))(params)

    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), gradient(remat), gradient("blocks")
    )


def test_keeping_more_takes_more_memory_and_repeats_less(tiny_config):
    def memory_and_flops(policy):
        model = CausalLM(dataclasses.replace(tiny_config, num_layers=8, d_model=32, remat=policy))
        params = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
        tokens = jax.ShapeDtypeStruct((4, 96), jnp.int32)
        gradient = jax.jit(jax.grad(lambda p, t: model.apply({"params": p}, t).sum()))
        compiled = gradient.lower(params, tokens).compile(OPTIMISED)
        return compiled.memory_analysis().temp_size_in_bytes, compiled.cost_analysis()["flops"]

    memory, flops = zip(*map(memory_and_flops, backbone.REMAT_POLICIES), strict=True)
    assert max(memory[:2]) < memory[2] < memory[3]
    assert flops[0] > flops[1] > flops[2] >= flops[3]


def test_an_unknown_policy_or_implementation_is_refused(tiny_config):
    with pytest.raises(ValueError, match=r"model\.remat = 'some' is not one of blocks, attention, matmuls, nothing"):
        dataclasses.replace(tiny_config, remat="some")
    with pytest.raises(ValueError, match=r"model\.attention = 'flash' is not one of auto, dense"):
        dataclasses.replace(tiny_config, attention="flash")
