"""What each model sees, and that cached passes equal a full one."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kforcing_jax.models import CausalLM, PushForwardLM
from kforcing_jax.models.keys import KeyValue, Known, Past, UpTo
from kforcing_jax.models.layers import exact_gelu, fourier_features
from kforcing_jax.models.lm import consecutive, text_positions
from kforcing_jax.noise import CdfOrder

BATCH, LENGTH, WINDOW = 2, 6, 3
TAU = jnp.array([0.7, 1.0])
TOLERANCE = 1e-4
KINDS = ("causal_lm", "push_forward_lm")


@functools.partial(jax.jit, static_argnames=("model", "method"))
def call(model, params, method, *args):
    return model.apply({"params": params}, *args, method=method)


def begin(model_and_params, *args):
    """(logits, keys and values)"""
    result = call(*model_and_params, "begin", *args)
    return call(*model_and_params, "logits", model_and_params[0].drawable(result)), result.text_keys


def extend(model_and_params, tokens, noise, tau, keys, length, first, past=None):
    """(logits of the rows that tokens are drawn from, or of all known ones of a teacher; keys and values)"""
    model, _ = model_and_params
    is_teacher = isinstance(model, CausalLM)
    positions = consecutive(first, tokens.shape[2] + (0 if is_teacher else noise.shape[2]))
    result = call(*model_and_params, "extend", tokens, noise, tau, positions, Known(keys, UpTo(length)), past)
    hidden = result.known.hidden if is_teacher else result.noise.hidden
    return call(*model_and_params, "logits", hidden), result.known.keys


def first_slots(kept, count):
    return jax.tree.map(lambda kv: kv[:, :, :count], kept)


@pytest.fixture
def text(rng, tiny_config):
    return jnp.asarray(rng.integers(0, tiny_config.vocab_size, size=(BATCH, LENGTH)), jnp.int32)


@pytest.fixture
def noise(rng):
    return jnp.asarray(rng.random((BATCH, LENGTH, 4)), jnp.float32)


def with_embedding(params, embedding):
    return params | {"backbone": params["backbone"] | {"embedding": {"embedding": embedding}}}


def influence(jacobian, axes):
    """Whether each output depends on each input at all: exactly zero means it cannot."""
    return np.abs(np.asarray(jacobian)).max(axis=axes) > 0


def test_causal_lm_logits_depend_on_exactly_the_tokens_so_far(rng, causal_lm):
    """The gradient with respect to the embedding of token m, where every token has an id of its own."""
    model, params = causal_lm
    text, probe = jnp.arange(LENGTH)[None], rng.normal(size=model.cfg.vocab_size)

    def probes(embedding):
        return model.apply({"params": with_embedding(params, embedding)}, text)[0] @ probe

    jacobian = jax.jit(jax.jacrev(probes))(params["backbone"]["embedding"]["embedding"])
    np.testing.assert_array_equal(influence(jacobian[:, :LENGTH], -1), np.tri(LENGTH, dtype=bool))


@pytest.fixture(scope="module")
def window_jacobians(push_forward_lm):
    """Gradients of the logits (N, K) of every window with respect to tokens (N, V, D) and noise (N, K)."""
    model, params = push_forward_lm
    rng = np.random.default_rng(0)
    text, probe = jnp.arange(LENGTH)[None], rng.normal(size=model.cfg.vocab_size)
    noise = jnp.asarray(rng.random((LENGTH, WINDOW)), jnp.float32)

    def probes(embedding, noise):
        variables = {"params": with_embedding(params, embedding)}
        return model.apply(variables, text, noise[None], jnp.ones(1))[0] @ probe

    return jax.jit(jax.jacrev(probes, argnums=(0, 1)))(params["backbone"]["embedding"]["embedding"], noise)


def test_a_window_sees_the_text_up_to_and_including_its_anchor(window_jacobians):
    seen = influence(window_jacobians[0][:, :, :LENGTH], -1)
    for offset in range(WINDOW):
        np.testing.assert_array_equal(seen[:, offset], np.tri(LENGTH, dtype=bool))


def test_a_window_never_sees_another_window(window_jacobians):
    seen = influence(window_jacobians[1], (1, 3))
    np.testing.assert_array_equal(seen, np.eye(LENGTH, dtype=bool))


def test_an_offset_sees_its_own_noise_and_that_of_earlier_offsets(window_jacobians):
    seen = influence(window_jacobians[1], ())
    for anchor in range(LENGTH):
        np.testing.assert_array_equal(seen[anchor, :, anchor], np.tri(WINDOW, dtype=bool))


def test_the_text_is_blind_to_windows(push_forward_lm, text, noise):
    _, seen = begin(push_forward_lm, text, noise, TAU)
    _, unseen = begin(push_forward_lm, text, 1 - noise, 2 * TAU)
    jax.tree.map(np.testing.assert_array_equal, seen, unseen)


@pytest.mark.parametrize("k", [1, 2])
def test_a_narrow_window_is_the_start_of_a_wide_one(push_forward_lm, text, noise, k):
    wide, _ = begin(push_forward_lm, text, noise, TAU)
    narrow, _ = begin(push_forward_lm, text, noise[..., :k], TAU)
    np.testing.assert_allclose(narrow, wide[:, :, :k], atol=TOLERANCE)


def test_noise_and_the_temperature_of_the_row_reach_the_student(push_forward_lm, text, noise):
    logits, _ = begin(push_forward_lm, text, noise, TAU)
    other_noise, _ = begin(push_forward_lm, text, 1 - noise, TAU)
    other_tau, _ = begin(push_forward_lm, text, noise, TAU.at[1].set(0.5))
    assert jnp.abs(logits - other_noise).max() > 0.1
    assert jnp.abs(logits - other_tau)[1].max() > 0.1
    np.testing.assert_array_equal(logits[0], other_tau[0])


def test_calling_a_model_gives_the_logits_of_begin(causal_lm, push_forward_lm, text, noise):
    logits = call(*causal_lm, "__call__", text)
    np.testing.assert_allclose(logits, begin(causal_lm, text)[0][:, :, 0], atol=TOLERANCE)
    logits = call(*push_forward_lm, "__call__", text, noise, TAU)
    np.testing.assert_allclose(logits, begin(push_forward_lm, text, noise, TAU)[0], atol=TOLERANCE)


def test_the_keys_and_values_of_a_prefix_do_not_depend_on_what_follows(push_forward_lm, text, noise):
    _, whole = begin(push_forward_lm, text, noise, TAU)
    _, prefix = begin(push_forward_lm, text[:, :2], noise[:, :2], TAU)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[:, :, :2], b, atol=TOLERANCE), whole, prefix)


def test_a_causal_lm_on_a_cache_equals_a_full_pass(causal_lm, text):
    """Two tokens in the cache, then the other four in one group."""
    full, kept = begin(causal_lm, text)
    at = jnp.full((BATCH, 1), 2)
    logits, own = extend(causal_lm, text[:, None, 2:], None, None, first_slots(kept, 2), at, at)
    np.testing.assert_allclose(logits[:, 0], full[:, 2:, 0], atol=TOLERANCE)
    jax.tree.map(lambda new, old: np.testing.assert_allclose(new[:, :, 0], old[:, :, 2:], atol=TOLERANCE), own, kept)


@pytest.mark.parametrize("k", [1, 2, 4])
def test_a_push_forward_lm_on_a_cache_equals_a_full_pass(push_forward_lm, text, noise, k):
    """Two tokens in the cache, then the other four and a window in one group."""
    full, kept = begin(push_forward_lm, text, noise[..., :k], TAU)
    at = jnp.full((BATCH, 1), 2)
    logits, own = extend(push_forward_lm, text[:, None, 2:], noise[:, -1:, :k], TAU, first_slots(kept, 2), at, at)
    np.testing.assert_allclose(logits[:, 0], full[:, -1], atol=TOLERANCE)
    jax.tree.map(lambda new, old: np.testing.assert_allclose(new[:, :, 0], old[:, :, 2:], atol=TOLERANCE), own, kept)


def with_slack(kept, axis, slots):
    """Room after the real entries, filled with numbers that would show."""
    return jax.tree.map(
        lambda kv: jnp.pad(kv, [(0, slots * (i == axis)) for i in range(kv.ndim)], constant_values=5), kept
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_past_equals_a_full_pass(request, kind, text, noise):
    """Two tokens in a cache of nine slots, three in a past of four, then the last one."""
    model = request.getfixturevalue(kind)
    full, kept = begin(model, text, noise, TAU)
    past = jax.tree.map(lambda kv: kv[:, :, None, 2:5], kept)
    at = jnp.full((BATCH, 1), 2)
    logits, _ = extend(
        model,
        text[:, None, 5:],
        noise[:, 5:],
        TAU,
        with_slack(first_slots(kept, 2), axis=2, slots=7),
        at,
        at + 3,
        Past(with_slack(past, axis=3, slots=1), jnp.int32(3)),
    )
    np.testing.assert_allclose(logits[:, 0], full[:, -1], atol=TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_of_different_lengths_share_a_cache(request, kind, text, noise):
    """Row 0 has two tokens in the cache and row 1 four; both read their next one."""
    model = request.getfixturevalue(kind)
    full, kept = begin(model, text, noise, TAU)
    at, row = jnp.array([[2], [4]]), jnp.arange(BATCH)
    tokens, u = text[row, at[:, 0]][:, None, None], noise[row, at[:, 0]][:, None]
    logits, _ = extend(model, tokens, u, TAU, kept, at, at)
    np.testing.assert_allclose(logits[:, 0], full[row, at[:, 0]], atol=TOLERANCE)


@pytest.mark.parametrize("kind", KINDS)
def test_the_mask_id_always_has_logit_minus_1000(request, kind, text, noise):
    model, params = request.getfixturevalue(kind)
    logits, _ = begin((model, params), text, noise, TAU)
    assert (logits[..., model.cfg.mask_id] == -1000).all()
    assert (jnp.delete(logits, model.cfg.mask_id, axis=-1) > -900).all()
    assert (model.pick(logits, noise[..., : logits.shape[2]], TAU[:, None, None]) != model.cfg.mask_id).all()


@pytest.mark.parametrize("mask_id", [0, 2, 3])
def test_a_causal_lm_never_draws_the_mask_however_hot(tiny_config, mask_id):
    """At tau = 1000 a logit of -1000 is a weight of 1/e next to a logit of 0."""
    model = CausalLM(dataclasses.replace(tiny_config, vocab_size=4, mask_id=mask_id))
    u = (jnp.arange(999) / 999).at[-1].set(1 - 2.0**-24)
    logits = jnp.zeros((999, 4)).at[:, mask_id].set(-1000.0)
    drawn = np.bincount(model.pick(logits, u, jnp.full(999, 1000.0)), minlength=4)
    assert drawn[mask_id] == 0
    np.testing.assert_allclose(np.delete(drawn, mask_id), 333, atol=1)


@pytest.mark.parametrize("mask_logit", [-1000.0, 1000.0])
def test_a_push_forward_lm_draws_the_argmax_but_for_the_mask_whatever_the_noise(rng, tiny_config, mask_logit):
    logits = rng.normal(size=(3, 4, 13)).astype(np.float32) - 2000
    expected = np.where(np.arange(13) == tiny_config.mask_id, -np.inf, logits).argmax(-1)
    logits[..., tiny_config.mask_id] = mask_logit
    tokens = PushForwardLM(tiny_config).pick(jnp.asarray(logits), rng.random((3, 4)), jnp.full((3, 1), 0.3))
    np.testing.assert_array_equal(tokens, expected)


def test_a_temperature_near_zero_draws_the_likeliest_token(rng, causal_lm):
    model, _ = causal_lm
    logits = jnp.asarray(rng.normal(size=(50, 13)), jnp.float32).at[:, model.cfg.mask_id].set(-1000.0)
    drawn = model.pick(logits, jnp.asarray(rng.random(50), jnp.float32), jnp.full(50, 1e-6))
    np.testing.assert_array_equal(drawn, logits.argmax(-1))


# How tokens lie on [0, 1) is a property of the model: columns of its output layer lie in that order.


def in_order(model_and_params, order):
    """The same model, whose tokens lie in another order: the output layer's columns are permuted with them."""
    model, params = model_and_params
    output = jax.tree.map(lambda leaf: leaf[..., order.tokens_V], params["backbone"]["output"])
    cfg = dataclasses.replace(model.cfg, cdf_order=order)
    return type(model)(cfg), params | {"backbone": params["backbone"] | {"output": output}}


ORDER = CdfOrder.shuffled(13, seed=5)


@pytest.mark.parametrize("kind", KINDS)
def test_an_order_of_the_cdf_changes_no_logits(request, kind, text, noise):
    model = request.getfixturevalue(kind)
    expected, _ = begin(model, text, noise, TAU)
    np.testing.assert_allclose(begin(in_order(model, ORDER), text, noise, TAU)[0], expected, atol=TOLERANCE)


def test_a_teacher_draws_by_the_inverse_cdf_in_its_own_order(causal_lm, text, noise):
    model, params = in_order(causal_lm, ORDER)
    hidden = call(model, params, "begin", text).known.hidden
    drawn = call(model, params, "draw", hidden, noise[..., :1], TAU[:, None, None])[..., 0]
    logits = np.asarray(call(model, params, "logits", hidden), np.float64)[:, :, 0] / np.asarray(TAU)[:, None, None]
    weights = np.exp(logits - logits.max(axis=-1, keepdims=True))[..., ORDER.tokens_V]
    cdf = weights.cumsum(axis=-1) / weights.sum(axis=-1, keepdims=True)
    np.testing.assert_array_equal(drawn, ORDER.tokens_V[(cdf <= np.asarray(noise)[..., :1]).sum(axis=-1)])


def test_noise_inversion_and_draws_agree_on_the_order(causal_lm, text):
    model, params = in_order(causal_lm, ORDER)
    text = jnp.where(text == model.cfg.mask_id, 0, text)
    logits = call(model, params, "__call__", text)
    u = model.invert_noise(logits, text, jax.random.key(0))
    hidden = call(model, params, "begin", text).known.hidden
    drawn = call(model, params, "draw", hidden[:, :-1], u[..., None], jnp.ones((BATCH, 1, 1)))[..., 0]
    np.testing.assert_array_equal(drawn, text[:, 1:])


def test_a_student_emits_the_same_tokens_in_any_order(push_forward_lm, text, noise):
    def drawn(model, params):
        hidden = call(model, params, "begin", text, noise, TAU).noise.hidden
        return call(model, params, "draw", hidden, noise, TAU[:, None, None])

    np.testing.assert_array_equal(drawn(*in_order(push_forward_lm, ORDER)), drawn(*push_forward_lm))


def test_what_is_no_order_of_the_vocabulary_is_refused(tiny_config):
    with pytest.raises(ValueError, match="ids 0 to 2, each once"):
        CdfOrder([0, 1, 1])
    with pytest.raises(ValueError, match="cdf_order has 3 ids, the vocabulary 13"):
        dataclasses.replace(tiny_config, cdf_order=CdfOrder([2, 0, 1]))


def test_shuffled_orders_are_the_same_everywhere_and_equal_ones_are_one_static_argument():
    assert CdfOrder.shuffled(6, seed=0).tokens_V.tolist() == [5, 2, 1, 3, 0, 4]
    assert CdfOrder.shuffled(6, 0) == CdfOrder([5, 2, 1, 3, 0, 4]) != CdfOrder.shuffled(6, 1)
    assert hash(CdfOrder.shuffled(6, 0)) == hash(CdfOrder([5, 2, 1, 3, 0, 4]))


def test_noise_features_are_cosines_then_sines_from_the_highest_frequency():
    frequencies = np.array([1.0, 0.1, 0.01, 0.001])
    angles = 2 * np.pi * 0.3 * frequencies
    expected = np.concatenate([np.cos(angles), np.sin(angles)])
    np.testing.assert_allclose(fourier_features(jnp.float32(0.3), 8), expected, atol=1e-6)


def test_bfloat16_blocks_keep_parameters_and_logits_in_f32(push_forward_lm, text, noise):
    model, params = push_forward_lm
    half = PushForwardLM(dataclasses.replace(model.cfg, dtype="bfloat16"))
    logits, kept = begin((half, params), text, noise, TAU)
    exact, _ = begin((model, params), text, noise, TAU)
    initial = jax.eval_shape(half.init, jax.random.key(0), text, noise, TAU)
    assert logits.dtype == jnp.float32
    assert kept.key.dtype == kept.value.dtype == jnp.bfloat16
    assert {leaf.dtype for leaf in jax.tree.leaves(initial)} == {jnp.dtype("float32")}
    assert 1e-4 < jnp.abs(logits - exact).max() < 1.0


def test_kept_keys_and_values_have_one_entry_per_layer_and_text_token(push_forward_lm, text, noise):
    _, kept = begin(push_forward_lm, text, noise, TAU)
    cfg = push_forward_lm[0].cfg
    assert isinstance(kept, KeyValue)
    assert kept.key.shape == kept.value.shape == (cfg.num_layers, BATCH, LENGTH, cfg.num_heads, cfg.head_width)


@pytest.mark.parametrize("kind", KINDS)
def test_documents_that_share_a_row_are_as_if_alone(request, kind, text, noise):
    """Logits, keys and values of segments of two and four tokens equal those of rows of their own."""
    model = request.getfixturevalue(kind)
    segments = jnp.broadcast_to(jnp.array([1, 1, 2, 2, 2, 2]), (BATCH, LENGTH))
    packed, kept = begin(model, text, noise, TAU, segments)
    for part in (slice(0, 2), slice(2, 6)):
        alone, kept_alone = begin(model, text[:, part], noise[:, part], TAU)
        np.testing.assert_allclose(packed[:, part], alone, atol=TOLERANCE)
        for a, b in zip(kept, kept_alone, strict=True):
            np.testing.assert_allclose(a[:, :, part], b, atol=TOLERANCE)


def test_positions_start_again_in_every_segment():
    segments = jnp.array([[1, 1, 2, 2, 2, 0], [1, 2, 3, 3, 0, 0]])
    assert text_positions((2, 6), segments).tolist() == [[0, 1, 0, 1, 2, 0], [0, 0, 0, 1, 0, 1]]
    assert text_positions((1, 3), None).tolist() == [[0, 1, 2]]


def test_the_exact_gelu_and_its_gradient():
    x = jnp.linspace(-6, 6, 101)
    expected = jax.vmap(jax.value_and_grad(lambda x: jax.nn.gelu(x, approximate=False)))(x)
    actual = jax.vmap(jax.value_and_grad(exact_gelu))(x)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), actual, expected)
