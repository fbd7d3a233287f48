"""Chunks at the end of a cache, with windows that hang off their tokens, against full forward passes."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kforcing_jax.models import ModelConfig, PushForwardLM, cache, cached, init_params

WIDTH, KNOWN, LONGEST = 3, 4, 40
STARTS = (17, 5, 30)  # tokens in the cache, of every row
TAU = jnp.array([1.0, 0.5, 0.7])

PLAIN = ModelConfig(vocab_size=13, mask_id=9, num_layers=2, d_model=16, num_heads=2)
GATED = dataclasses.replace(PLAIN, adapter_rank=3)
LLAMA = ModelConfig(
    vocab_size=13,
    mask_id=None,
    num_layers=2,
    d_model=16,
    num_heads=4,
    num_kv_heads=2,
    d_head=64,
    d_mlp=24,
    mlp="swiglu",
    norm="rms_norm",
    qk_norm=True,
    tied_embeddings=True,
    output_bias=False,
    sliding_window=5,
    adapter_rank=2,
)


def random_params(model):
    """Deltas included."""
    rng, params = np.random.default_rng(0), jax.jit(lambda key: init_params(model, key))(jax.random.key(0))
    return jax.tree.map(lambda x: 2 * x + 0.2 * rng.normal(size=x.shape).astype(np.float32), params)


@pytest.fixture(scope="module")
def text():
    """(tokens_BxN, noise_BxN): a uniform for every position."""
    rng = np.random.default_rng(1)
    return rng.integers(0, 13, (len(STARTS), LONGEST)), rng.random((len(STARTS), LONGEST + WIDTH), np.float32)


def windowed(text):
    """noise_BxNxK of a window after every position."""
    return np.stack([text[1][:, 1 + offset : 1 + offset + LONGEST] for offset in range(WIDTH)], axis=2)


@pytest.fixture(scope="module")
def whole(text):
    """By configuration: (weights, hidden states of a pass over the text with a window after every position)."""

    @functools.cache
    def of(cfg):
        model = PushForwardLM(cfg)
        params = random_params(model)
        begin = jax.jit(functools.partial(model.apply, method="begin"))
        return cached.weights(cfg, params), begin({"params": params}, text[0], windowed(text), TAU)

    return of


def appended(model, weights, caches, tokens_BxN, start_B, live, noise_BxM=None, windows=None):
    """hidden_BxGxD of tokens and noise at the end of the caches, in one program; and the caches."""

    @jax.jit
    def program(weights, caches):
        x_BxGxD, is_noise_BxG = cached.call(model, weights, "embed", tokens_BxN), None
        if noise_BxM is not None:
            of_tau = cached.call(model, weights, "of_tau", TAU)
            noise = cached.call(model, weights, "embed_noise", noise_BxM, of_tau)
            x_BxGxD = jnp.concatenate([x_BxGxD, noise], axis=1)
            is_noise_BxG = jnp.broadcast_to(jnp.arange(x_BxGxD.shape[1]) >= tokens_BxN.shape[1], x_BxGxD.shape[:2])
        # All but the first: what is not wanted is left out in the last layer.
        wanted = jnp.broadcast_to(jnp.arange(1, x_BxGxD.shape[1]), (len(STARTS), x_BxGxD.shape[1] - 1))
        wanted = wanted if wanted.size else None
        return cached.append(model, weights, x_BxGxD, caches, start_B, live, wanted, is_noise_BxG, windows)

    return program(weights, caches)


@pytest.mark.parametrize(
    "cfg, platform",
    [(PLAIN, "cpu"), (GATED, "cpu"), (LLAMA, "cpu"), (GATED, "gpu"), (LLAMA, "gpu"), (LLAMA, "tpu")],
    ids=lambda x: x if isinstance(x, str) else {PLAIN: "plain", GATED: "gated", LLAMA: "llama"}[x],
)
def test_windows_off_tokens_of_a_chunk_are_those_of_a_full_forward_pass(whole, text, cfg, platform, monkeypatch):
    monkeypatch.setattr(cache, "platform", lambda: platform)
    model, (weights, expected) = PushForwardLM(cfg), whole(cfg)
    start_B, rows_Bx1 = np.array(STARTS), np.arange(len(STARTS))[:, None]
    empty = tuple(cache.allocate(len(STARTS), cfg.kv_heads, 128, cfg.head_width, "float32") for _ in range(2))
    # What lies after the first tokens of a row is of somebody else.
    _, filled = appended(model, weights, empty, text[0], jnp.zeros(len(STARTS), jnp.int32), 64)
    known_BxG = start_B[:, None] + np.arange(KNOWN)
    for anchors in ([(0, 1, 2, 3)] * 3, [(0, 2), (1, 3), (3, 3)]):
        anchor_BxW, windows = start_B[:, None] + np.array(anchors), cached.Windows(jnp.array(anchors), WIDTH)
        noise_BxM = windowed(text)[rows_Bx1, anchor_BxW].reshape(len(STARTS), -1)
        chunk = text[0][rows_Bx1, known_BxG], jnp.asarray(start_B), 128, noise_BxM, windows
        hidden, caches = appended(model, weights, filled, *chunk)
        of_known = expected.known.hidden[rows_Bx1, known_BxG, 0][:, 1:]
        of_noise = expected.noise.hidden[rows_Bx1, anchor_BxW].reshape(len(STARTS), -1, cfg.d_model)
        np.testing.assert_allclose(hidden[:, : KNOWN - 1], of_known, atol=3e-4)
        np.testing.assert_allclose(hidden[:, KNOWN - 1 :], of_noise, atol=3e-4)
    # The keys of the known tokens are those of the text: the next chunk builds on them, over the windows.
    last_BxG = start_B[:, None] + KNOWN + np.arange(2)
    hidden, _ = appended(model, weights, caches, text[0][rows_Bx1, last_BxG], jnp.asarray(start_B + KNOWN), 128)
    np.testing.assert_allclose(hidden, expected.known.hidden[rows_Bx1, last_BxG, 0][:, 1:], atol=3e-4)


def test_noise_rows_of_a_gated_student_have_logits_of_their_own_and_text_rows_the_teachers():
    model = PushForwardLM(GATED)
    params, hidden = random_params(model), jax.random.normal(jax.random.key(2), (3, 16))
    weights = cached.weights(model.cfg, params)
    for of in (model, model.text_model):
        expected = of.apply({"params": params}, hidden, method="ordered_logits")
        np.testing.assert_allclose(cached.ordered_logits(of, weights, hidden), expected, atol=1e-4)
    assert not np.allclose(*(cached.ordered_logits(of, weights, hidden) for of in (model, model.text_model)), atol=0.1)
