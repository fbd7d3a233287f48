"""`rollout` against a slow loop that shows the whole model its own tokens."""

import functools

import jax
import numpy as np
import pytest
from step_by_step import truncated

from kforcing_jax.training.rollout import rollout

LENGTH = 5
PADDED = LENGTH + 8
TAU = np.array([0.6, 1.3], np.float32)


@pytest.fixture
def text(rng, tiny_config):
    return rng.integers(0, tiny_config.vocab_size, size=(2, LENGTH)).astype(np.int32)


def uniforms(rng, window):
    return rng.random((2, LENGTH, window), np.float32)


_rollout = jax.jit(rollout, static_argnames=("model", "chunk", "top_p"))


def rolled_out(model_and_params, text, noise, tau, chunk, **settings):
    model, params = model_and_params
    return np.asarray(_rollout(model, params, text, noise, tau, chunk, **settings))


@functools.partial(jax.jit, static_argnames="model")
def _logits(model, params, *args):
    return model.apply({"params": params}, *args)


def logits_after(model_and_params, context, *noise_and_tau):
    """Logits of a whole pass over one row, at the end of the context."""
    padded = np.pad(context, (0, PADDED - len(context)))[None]
    return np.asarray(_logits(*model_and_params, padded, *noise_and_tau))[0, len(context) - 1]


def inverse_cdf_oracle(logits_V, u, tau, mask_id, top_p=1.0):
    scaled = np.where(np.arange(len(logits_V)) == mask_id, -np.inf, logits_V.astype(np.float64) / tau)
    weights = np.exp(truncated(scaled - scaled.max(), 0, top_p))
    return np.searchsorted(weights.cumsum() / weights.sum(), u, side="right")


def looped(next_tokens, text, noise, chunk):
    """Tokens generated after every position, one row and one position at a time.

    `next_tokens(row, context, u)` gives the tokens after a context of real and own tokens, one for each u.
    """
    out = np.zeros(noise.shape, np.int32)
    for row, position in np.ndindex(noise.shape[:2]):
        context = text[row, : position + 1]
        for u in noise[row, position].reshape(-1, chunk):
            context = np.concatenate([context, next_tokens(row, context, u)])
        out[row, position] = context[position + 1 :]
    return out


@pytest.mark.parametrize("window, top_p", [(1, 1.0), (4, 1.0), (4, 0.6)])
def test_a_causal_lm_rolls_out_its_own_samples(rng, causal_lm, text, window, top_p):
    noise, mask_id = uniforms(rng, window), causal_lm[0].cfg.mask_id

    def next_tokens(row, context, u):
        return [inverse_cdf_oracle(logits_after(causal_lm, context), u[0], TAU[row], mask_id, top_p)]

    expected = looped(next_tokens, text, noise, 1)
    assert len(np.unique(expected)) > 3
    np.testing.assert_array_equal(rolled_out(causal_lm, text, noise, TAU, chunk=1, top_p=top_p), expected)


def test_a_nucleus_changes_what_a_teacher_draws_and_not_what_a_student_does(rng, causal_lm, push_forward_lm, text):
    noise = uniforms(rng, 4)
    for teacher, changes in ((causal_lm, True), (push_forward_lm, False)):
        whole, nucleus = (rolled_out(teacher, text, noise, TAU, chunk=1, top_p=top_p) for top_p in (1.0, 0.5))
        assert (whole != nucleus).any() == changes


@pytest.mark.parametrize("chunk, window", [(1, 1), (1, 4), (2, 6), (4, 4), (4, 8)])
def test_a_push_forward_lm_rolls_out_on_its_own_tokens(rng, push_forward_lm, text, chunk, window):
    noise = uniforms(rng, window)

    def next_tokens(row, context, u):
        everywhere = np.broadcast_to(u, (1, PADDED, chunk))
        return logits_after(push_forward_lm, context, everywhere, TAU[row : row + 1]).argmax(-1)

    expected = looped(next_tokens, text, noise, chunk)
    assert len(np.unique(expected)) > 3
    np.testing.assert_array_equal(rolled_out(push_forward_lm, text, noise, TAU, chunk), expected)


@pytest.mark.parametrize("chunk, window", [(2, 3), (4, 2)])
def test_a_chunk_that_does_not_divide_the_window_is_refused(rng, push_forward_lm, text, chunk, window):
    model, params = push_forward_lm
    with pytest.raises(ValueError, match=f"chunk = {chunk} does not divide the window of {window}"):
        rollout(model, params, text, uniforms(rng, window), TAU, chunk)


@pytest.mark.parametrize("teacher, chunk", [("causal_lm", 1), ("push_forward_lm", 2)])
def test_a_row_does_not_depend_on_its_neighbours(rng, request, text, teacher, chunk):
    teacher, noise = request.getfixturevalue(teacher), uniforms(rng, 4)
    tokens = rolled_out(teacher, text, noise, TAU, chunk)
    swapped = rolled_out(teacher, text[::-1], noise[::-1], TAU[::-1], chunk)
    new_neighbour = rolled_out(teacher, text[[0, 0]], noise[[0, 0]], TAU[[0, 0]], chunk)
    np.testing.assert_array_equal(tokens, swapped[::-1])
    np.testing.assert_array_equal(new_neighbour, tokens[[0, 0]])


@pytest.mark.parametrize("teacher, chunk", [("causal_lm", 1), ("push_forward_lm", 2)])
def test_tokens_after_a_position_do_not_depend_on_later_text(rng, request, text, teacher, chunk):
    teacher, noise = request.getfixturevalue(teacher), uniforms(rng, 4)
    other = text.copy()
    other[:, 3:] = (other[:, 3:] + 1) % 9
    first, second = (rolled_out(teacher, x, noise, TAU, chunk) for x in (text, other))
    np.testing.assert_array_equal(first[:, :3], second[:, :3])
    assert (first[:, 3:] != second[:, 3:]).any()


@pytest.mark.parametrize("teacher, chunk", [("causal_lm", 1), ("push_forward_lm", 2)])
def test_a_rollout_never_leaves_its_segment(rng, request, text, teacher, chunk):
    """Documents of two and three tokens in one row are rolled out as they are in rows of their own."""
    model, noise = request.getfixturevalue(teacher), uniforms(rng, 4)
    segments = np.broadcast_to([1, 1, 2, 2, 2], text.shape)
    packed = np.asarray(_rollout(*model, text, noise, TAU, chunk, segments))
    for part in (slice(0, 2), slice(2, 5)):
        alone = rolled_out(model, text[:, part], noise[:, part], TAU, chunk)
        np.testing.assert_array_equal(packed[:, part], alone)
