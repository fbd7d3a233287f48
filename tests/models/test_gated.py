"""Gated students: text rows are the teacher's, noise rows have deltas, for every kind of architecture."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kforcing_jax.architecture import LLAMA, Rope
from kforcing_jax.config import FULL_RANK
from kforcing_jax.models import CausalLM, ModelConfig, PushForwardLM, init_params
from kforcing_jax.models.gated import base_params, own_params, with_own
from kforcing_jax.models.keys import Causal, Known
from kforcing_jax.models.lm import consecutive
from kforcing_jax.noise import CdfOrder

V, B, N, K = 19, 2, 7, 3
PAPER = dict(vocab_size=V, mask_id=4, num_layers=2, d_model=16, num_heads=2)
GROUPED = dict(vocab_size=V, mask_id=None, num_layers=2, d_model=12, num_heads=4, num_kv_heads=2, d_head=6, d_mlp=20)
QWEN3 = GROUPED | LLAMA | dict(qk_norm=True, tied_embeddings=True, rope=Rope(base=5e5))
ARCHITECTURES = {
    "paper": PAPER,
    "qwen3, tied, shuffled": QWEN3 | {"cdf_order": CdfOrder.shuffled(V, 1)},
    "qwen2, sliding": GROUPED | LLAMA | {"qkv_bias": True, "sliding_window": 4},
}


def student(fields, rank):
    """(gated student, its parameters with deltas that are not small)."""
    model = PushForwardLM(ModelConfig(adapter_rank=rank, **fields))
    params = jax.jit(functools.partial(init_params, model))(jax.random.key(0))
    rng = np.random.default_rng(1)
    return model, jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32), params)


@pytest.fixture(params=ARCHITECTURES.values(), ids=ARCHITECTURES)
def fields(request):
    return request.param


@pytest.fixture
def inputs(rng):
    tokens = jnp.asarray(rng.integers(0, V, size=(B, N)), jnp.int32)
    return tokens, jnp.asarray(rng.random((B, N, K)), jnp.float32), jnp.array([0.6, 1.0])


@functools.partial(jax.jit, static_argnames=("model", "method"))
def call(model, params, method, *args):
    return model.apply({"params": params}, *args, method=method)


@pytest.mark.parametrize("rank", [2, FULL_RANK])
def test_text_rows_are_the_teachers_to_the_last_bit_whatever_the_deltas(fields, inputs, rank):
    model, params = student(fields, rank)
    tokens, noise, tau = inputs
    mine = call(model, params, "begin", tokens, noise, tau)
    theirs = call(model.text_model, base_params(params), "begin", tokens)
    jax.tree.map(np.testing.assert_array_equal, mine.known, theirs.known)
    untrained = with_own(params, jax.tree.map(jnp.zeros_like, own_params(params)))
    jax.tree.map(np.testing.assert_array_equal, mine.known, call(model, untrained, "begin", tokens, noise, tau).known)
    assert not np.allclose(
        mine.noise.hidden, call(model, untrained, "begin", tokens, noise, tau).noise.hidden, atol=0.1
    )


def test_the_text_model_is_the_teacher_with_the_students_parameters(fields, inputs):
    model, params = student(fields, 2)
    teacher = CausalLM(ModelConfig(**fields))
    assert model.text_model == teacher
    logits = call(teacher, params, "__call__", inputs[0])
    np.testing.assert_array_equal(logits, call(teacher, base_params(params), "__call__", inputs[0]))


def test_a_fresh_students_noise_rows_have_the_teachers_weights(fields, inputs):
    """Deltas begin at zero: what the noise encoder gives goes through the teacher as a token would."""
    gated = PushForwardLM(ModelConfig(adapter_rank=2, **fields))
    ordinary = PushForwardLM(ModelConfig(**fields))
    params = jax.jit(functools.partial(init_params, gated))(jax.random.key(0))
    logits = call(ordinary, params, "__call__", *inputs)
    np.testing.assert_allclose(call(gated, params, "__call__", *inputs), logits, atol=2e-5)


def test_one_pass_over_text_and_windows_equals_two(fields, inputs):
    """A window after a known prefix, of noise alone and with a token before it, sees what a whole pass shows it."""
    model, params = student(fields, 2)
    tokens, noise, tau = inputs
    whole = call(model, params, "begin", tokens, noise, tau)
    resumed = call(model, params, "resume", whole.known, noise, tau)
    np.testing.assert_allclose(resumed.noise.hidden, whole.noise.hidden, atol=1e-5)
    # The token at every position again, as a known one after the prefix that ends before it, with its window.
    at_BxN = jnp.broadcast_to(jnp.arange(1, N), (B, N - 1))
    prefix = Known(jax.tree.map(lambda kv: kv[:, :, :-1], whole.text_keys), Causal())
    groups = tokens[:, 1:, None], noise[:, 1:], tau, consecutive(at_BxN, 1 + K), prefix
    again = call(model, params, "extend", *groups)
    np.testing.assert_allclose(again.noise.hidden, whole.noise.hidden[:, 1:], atol=1e-5)
    np.testing.assert_allclose(again.known.hidden, whole.known.hidden[:, 1:], atol=1e-5)


def test_own_parameters_and_the_teachers_are_apart_and_together_all(fields):
    _, params = student(fields, 2)
    own, base = own_params(params), base_params(params)
    assert jax.tree.structure(base) == jax.tree.structure(
        jax.eval_shape(lambda: init_params(CausalLM(ModelConfig(**fields)), jax.random.key(0)))
    )
    jax.tree.map(np.testing.assert_array_equal, with_own(base, own), params)
    matrices = {name for name in base["backbone"]["blocks"] if "norm" not in name}
    assert {f"{name}_delta" for name in matrices} == set(own["backbone"]["blocks"])
    assert set(own) == {"backbone", "noise_encoder"} and "output_delta" in own["backbone"]


def test_a_rank_is_the_rank_of_what_is_added():
    model, params = student(PAPER, 2)
    delta = params["backbone"]["blocks"]["mlp_in_delta"]
    added = np.einsum("IPR,PRO->IO", delta["down"][0], delta["up"][0])
    assert np.linalg.matrix_rank(added, tol=1e-4) == 2
    of_qkv = params["backbone"]["blocks"]["attn_qkv_delta"]
    assert of_qkv["down"].shape == (2, 16, 3, 2) and of_qkv["up"].shape == (2, 3, 2, 16)  # each of q, k and v its own
    with pytest.raises(ValueError, match="adapter_rank = -2 should be at least -1"):
        dataclasses.replace(model.cfg, adapter_rank=-2)
