"""The library computes the same functions as the released PyTorch code (recorded; see README.md)."""

import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kforcing_jax import noise
from kforcing_jax.decoding import generate
from kforcing_jax.interop import official
from kforcing_jax.models import CausalLM, PushForwardLM
from kforcing_jax.models.keys import Known, UpTo
from kforcing_jax.models.lm import consecutive
from kforcing_jax.training.losses import loss_and_agreement
from kforcing_jax.training.rollout import rollout

_HERE = Path(__file__).parent
_WINDOWS = (1, 2, 4)
_LOGIT_TOLERANCE = 1e-4
_RELATIVE_TOLERANCE = 2.0**-22  # an ulp or two: matters only for the mask id, whose logit is -1000


@functools.cache
def recorded():
    return dict(np.load(_HERE / "official_small.npz"))


@functools.cache
def released(name):
    """(model, params) of `ar`, `pflm1`, `pflm2` or `pflm4`."""
    return official.from_state_dict(dict(np.load(_HERE / f"weights_{name}.npz")))


@functools.partial(jax.jit, static_argnames=("model", "method"))
def _apply(model, method, params, *args):
    return model.apply({"params": params}, *args, method=method)


def run(name, method, *args):
    """What a method gives, hidden states turned into logits."""
    model, params = released(name)
    out = _apply(model, method, params, *args)
    return out if method == "__call__" else (_apply(model, "logits", params, model.drawable(out)), out.text_keys)


def tokens():
    return jnp.asarray(recorded()["tokens"], jnp.int32)


def ones():
    return jnp.ones(len(tokens()))


def assert_logits_equal(actual, key):
    np.testing.assert_allclose(actual, recorded()[key], rtol=_RELATIVE_TOLERANCE, atol=_LOGIT_TOLERANCE)


@pytest.mark.parametrize("name, kind", [("ar", CausalLM), *((f"pflm{k}", PushForwardLM) for k in _WINDOWS)])
def test_sizes_are_read_from_the_weights(name, kind):
    model, _ = released(name)
    cfg = model.cfg
    sizes = (cfg.d_model, cfg.num_heads, cfg.num_layers, cfg.vocab_size, cfg.mask_id)
    assert isinstance(model, kind)
    assert sizes == tuple(recorded()["meta/d,h,L,V,mask"])


def test_teacher_logits_and_log_probs():
    logits = run("ar", "__call__", tokens())
    assert_logits_equal(logits, "ar/logits")
    assert_logits_equal(jax.nn.log_softmax(logits), "ar/log_probs")


def test_a_teacher_step_on_a_cache():
    step = tokens().shape[1] // 2
    _, prefix = run("ar", "begin", tokens()[:, :step])
    at, known = at_the_end_of(prefix, 1)
    logits, _ = run("ar", "extend", tokens()[:, step][:, None, None], None, None, at, known)
    assert_logits_equal(jax.nn.log_softmax(logits)[:, 0], "ar/cached_step_log_probs")


def at_the_end_of(keys, group):
    """(positions of a group after all keys, what it sees)"""
    length_BxA = jnp.full((len(tokens()), 1), keys.key.shape[2])
    return consecutive(length_BxA, group), Known(keys, UpTo(length_BxA))


@pytest.mark.parametrize("k", _WINDOWS)
@pytest.mark.parametrize("tau, suffix", [(1.0, ""), (0.7, "_tau0.7")])
def test_student_logits_of_every_window_in_one_pass(k, tau, suffix):
    logits = run(f"pflm{k}", "__call__", tokens(), recorded()[f"pflm{k}/noise"], tau * ones())
    assert_logits_equal(logits, f"pflm{k}/train_logits{suffix}")


@pytest.mark.parametrize("k", _WINDOWS)
def test_noise_encoder(k):
    model, params = released(f"pflm{k}")
    u = recorded()[f"pflm{k}/noise"]
    out = model.apply({"params": params}, u, jnp.ones_like(u), method=lambda m, u, tau: m.noise_encoder(u, tau))
    assert_logits_equal(out, f"pflm{k}/noise_encoder_out")


@pytest.mark.parametrize("k", _WINDOWS)
def test_student_prefill_and_a_step_on_its_cache(k):
    u, name = recorded()[f"pflm{k}/noise"], f"pflm{k}"
    length = tokens().shape[1] - 3

    prefill_logits, prefix = run(name, "begin", tokens()[:, :length], u[:, :length], ones())
    assert_logits_equal(prefill_logits[:, -1], f"pflm{k}/prefill_logits")

    at, known = at_the_end_of(prefix, 3 + k)
    step_logits, _ = run(name, "extend", tokens()[:, None, length:], u[:, -1:], ones(), at, known)
    assert_logits_equal(step_logits[:, 0], f"pflm{k}/cached_step_logits")


def targets(name, text, u, chunk):
    model, params = released(name)
    return jax.jit(functools.partial(rollout, model, chunk=chunk))(params, text, u, ones())


@pytest.mark.parametrize("name, chunk", [("ar", 1), ("pflm1", 1), ("pflm2", 2)])
def test_rollout_gives_the_recorded_targets(name, chunk):
    actual = targets(name, tokens(), recorded()[f"teacher_{name}/noise"], chunk)
    np.testing.assert_array_equal(actual, recorded()[f"teacher_{name}/tokens"])


def test_loss_and_agreement_of_a_student_with_its_teacher():
    u = recorded()["loss4/noise"]
    text = tokens()[:, : u.shape[1]]
    target = targets("pflm2", text, u, 2)
    logits = run("pflm4", "__call__", text, u, ones())
    loss, agreement = loss_and_agreement(logits, target)
    for j in range(4):
        assert_logits_equal(loss[..., j], f"loss4/loss_{j + 1}")
        np.testing.assert_array_equal(agreement[..., j], recorded()[f"loss4/acc_{j + 1}"])
    np.testing.assert_array_equal(agreement.all(-1), recorded()["loss4/acc_total"])


def test_noise_inversion_in_order_of_descending_probability():
    logits, targets = recorded()["ar/logits"][:, :-1], recorded()["tokens"][:, 1:]
    order = np.argsort(-logits, axis=-1, kind="stable")
    rank = np.argsort(order, axis=-1)
    u = noise.noise_within_bins(
        jnp.asarray(np.take_along_axis(logits, order, axis=-1)),
        jnp.asarray(np.take_along_axis(rank, targets[..., None], axis=-1)[..., 0]),
        recorded()["noise_inversion/in_bin_uniform"].astype(np.float32),
    )
    np.testing.assert_allclose(u, recorded()["noise_inversion/noise"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("k", _WINDOWS)
@pytest.mark.parametrize("penalty", [0.0, 0.5])
def test_decoding_emits_the_recorded_tokens(k, penalty):
    key, prompt, new = f"sample{k}_fp{penalty}", 5, 11
    u = recorded()[f"{key}/noise"]
    model, params = released(f"pflm{k}")
    decoded = generate(
        model,
        params,
        np.asarray(tokens()[:, :prompt]),
        max_new_tokens=new,
        k=k,
        seeds=None,
        noise_BxT=u.reshape(len(u), -1)[:, :new],
        frequency_penalty=penalty,
    )
    np.testing.assert_array_equal(decoded.tokens, recorded()[f"{key}/tokens"])
