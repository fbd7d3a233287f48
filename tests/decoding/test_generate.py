"""Decoding against full forward passes, and what a request may and may not depend on."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kforcing_jax.decoding import generate
from kforcing_jax.errors import ConfigError, DataError
from kforcing_jax.models import CausalLM
from kforcing_jax.noise import position_noise

NEW = 7
PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5]]
SEEDS = [11, 22, 33]


def noise_of(seed, prompt):
    positions = np.arange(len(prompt), len(prompt) + NEW)[None]
    return np.asarray(position_noise(jnp.array([seed], jnp.uint32), positions))[0]


@functools.partial(jax.jit, static_argnames="model")
def full_forward(model, params, tokens_1xN, window_1xNxK, tau_1):
    """One pass over text padded to a fixed length, so that the oracle compiles once per window."""
    if isinstance(model, CausalLM):
        return model.apply({"params": params}, tokens_1xN)[:, :, None]
    return model.apply({"params": params}, tokens_1xN, window_1xNxK, tau_1)


def decode_without_cache(model, params, prompt, noise_T, k, tau=1.0):
    """The oracle: a full forward pass over the whole text for every window."""
    text, longest = list(prompt), 5 + NEW
    noise_T = np.pad(noise_T, (0, k))
    for done in range(0, NEW, k):
        u_K = jnp.asarray(noise_T[done : done + k])
        tokens = jnp.array([text + [0] * (longest + k - len(text))])
        logits = full_forward(model, params, tokens, jnp.broadcast_to(u_K, (*tokens.shape, k)), jnp.full(1, tau))
        text += np.asarray(model.pick(logits[0, len(text) - 1], u_K, jnp.float32(tau))).tolist()
    return text[: len(prompt) + NEW]


@pytest.mark.parametrize("tau", [1.0, 0.5])
@pytest.mark.parametrize("k", [1, 3, 4])
def test_a_students_cached_decoding_matches_full_forward_passes(student, k, tau):
    decoded = generate(*student, PROMPTS, max_new_tokens=NEW, k=k, tau=tau, seeds=SEEDS)
    for row, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        expected = decode_without_cache(*student, prompt, noise_of(seed, prompt), k, tau)
        assert decoded.tokens[row, : decoded.lengths[row]].tolist() == expected


@pytest.mark.parametrize("tau", [1.0, 0.5])
def test_a_teachers_cached_decoding_matches_full_forward_passes(teacher, tau):
    decoded = generate(*teacher, PROMPTS, max_new_tokens=NEW, tau=tau, seeds=SEEDS)
    for row, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        expected = decode_without_cache(*teacher, prompt, noise_of(seed, prompt), 1, tau)
        assert decoded.tokens[row, : decoded.lengths[row]].tolist() == expected


@pytest.mark.parametrize("k", [1, 4])
def test_a_requests_output_does_not_depend_on_its_batch(student, k):
    together = generate(*student, PROMPTS, max_new_tokens=NEW, k=k, seeds=SEEDS)
    for row, (prompt, seed) in enumerate(zip(PROMPTS, SEEDS, strict=True)):
        alone = generate(*student, [prompt], max_new_tokens=NEW, k=k, seeds=[seed])
        length = together.lengths[row]
        assert together.tokens[row, :length].tolist() == alone.tokens[0, :length].tolist()


def test_different_seeds_give_different_texts(teacher):
    decoded = generate(*teacher, [PROMPTS[0]] * 4, max_new_tokens=NEW, seeds=range(4))
    assert len({tuple(row) for row in decoded.tokens.tolist()}) > 1


def test_tokens_hold_prompt_then_continuation_then_padding(student):
    decoded = generate(*student, PROMPTS, max_new_tokens=NEW, k=2, seeds=SEEDS)
    assert decoded.tokens.shape == (3, 5 + NEW)
    assert decoded.lengths.tolist() == [len(prompt) + NEW for prompt in PROMPTS]
    assert decoded.passes.tolist() == [4, 4, 4]
    assert (decoded.tokens[1, 2 + NEW :] == student[0].cfg.mask_id).all()
    assert decoded.tokens[1, :2].tolist() == PROMPTS[1]


def test_a_request_stops_at_eos_and_its_neighbours_go_on(teacher):
    free = generate(*teacher, PROMPTS, max_new_tokens=NEW, seeds=SEEDS)
    eos = int(free.tokens[0, len(PROMPTS[0]) + 2])
    stopped = generate(*teacher, PROMPTS, max_new_tokens=NEW, seeds=SEEDS, eos_id=eos)
    for row, prompt in enumerate(PROMPTS):
        new = free.tokens[row, len(prompt) : len(prompt) + NEW].tolist()
        expected = new[: new.index(eos) + 1] if eos in new else new
        assert stopped.tokens[row, len(prompt) : stopped.lengths[row]].tolist() == expected
        assert stopped.passes[row] == len(expected)
        assert (stopped.tokens[row, stopped.lengths[row] :] == eos).all()


def test_a_frequency_penalty_counts_every_generated_token_and_no_prompt_token(student):
    model, params = student
    plain = generate(model, params, PROMPTS[:1], max_new_tokens=NEW, k=4, seeds=[1])
    penalised = generate(model, params, PROMPTS[:1], max_new_tokens=NEW, k=4, seeds=[1], frequency_penalty=1e6)
    new = penalised.tokens[0, len(PROMPTS[0]) :].tolist()
    assert len(set(new)) == len(new)
    assert new[0] == plain.tokens[0, len(PROMPTS[0])]


def test_given_noise_replaces_seeds(student):
    noise = np.stack([noise_of(seed, prompt) for seed, prompt in zip(SEEDS, PROMPTS, strict=True)])
    by_seed = generate(*student, PROMPTS, max_new_tokens=NEW, k=4, seeds=SEEDS)
    by_noise = generate(*student, PROMPTS, max_new_tokens=NEW, k=4, noise_BxT=noise)
    assert (by_seed.tokens == by_noise.tokens).all()


def test_a_teacher_ignores_k(teacher):
    one = generate(*teacher, PROMPTS, max_new_tokens=NEW, seeds=SEEDS)
    four = generate(*teacher, PROMPTS, max_new_tokens=NEW, k=4, seeds=SEEDS)
    none = generate(*teacher, PROMPTS, max_new_tokens=NEW, k=0, seeds=SEEDS)
    assert (one.tokens == four.tokens).all() and (one.tokens == none.tokens).all()
    assert four.passes.tolist() == [NEW] * 3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"prompts": []}, "no prompts"),
        ({"prompts": [[]]}, "prompt 0 is empty"),
        ({"prompts": [[1], [2, 13]]}, r"prompt 1 has 13, which is not in \[0, 13\)"),
        ({"prompts": [[-1]]}, "prompt 0 has -1"),
        ({"prompts": [[3.9]]}, r"prompt 0 should be a list of integers, not \[3.9\]"),
        ({"prompts": [["a"]]}, "prompt 0 should be a list of integers"),
        ({"prompts": [[[1]]]}, "prompt 0 should be a list of integers"),
        ({"seeds": None}, "one seed for each of 1 prompts"),
        ({"seeds": [1, 2]}, "one seed for each of 1 prompts is needed, 2 given"),
        ({"seeds": [-1]}, r"seeds has -1, which is not in \[0, 4294967296\)"),
        ({"seeds": [2**63]}, f"seeds has {2**63}"),
        ({"seeds": [0.7]}, "seeds should be a list of integers"),
        ({"seeds": [[1]]}, "seeds should be a list of integers"),
        ({"noise_BxT": np.zeros((1, NEW + 1))}, r"noise has shape \(1, 8\), expected \(1, 7\)"),
        ({"noise_BxT": np.ones((1, NEW))}, "noise holds 1.0; uniforms are in"),
        ({"noise_BxT": np.full((1, NEW), np.nan)}, "noise holds nan"),
        ({"noise_BxT": [["x"] * NEW]}, "noise has dtype <U1; expected numbers"),
        ({"k": 0}, "k = 0"),
        ({"tau": 0.0}, "tau = 0.0 is not in"),
        ({"tau": 1e-38}, "tau = 1e-38 is not in"),
        ({"tau": 1001.0}, "tau = 1001.0 is not in"),
        ({"tau": [1.0, 2.0]}, r"tau = \[1.0, 2.0\] should be one number, or one for each of 1 prompts"),
        ({"tau": "x"}, "tau = 'x' should be one number"),
        ({"frequency_penalty": np.nan}, "frequency_penalty = nan should be a finite number"),
    ],
)
def test_bad_requests_are_refused_by_name(student, change, says):
    request = {"prompts": [[1]], "max_new_tokens": NEW, "k": 1, "seeds": [0]} | change
    with pytest.raises((DataError, ConfigError), match=says):
        generate(*student, **request)


@pytest.mark.parametrize("kind", ["teacher", "student"])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_logits_that_are_not_finite_are_an_error_and_never_a_token(request, kind, value):
    model, params = request.getfixturevalue(kind)
    bias = params["backbone"]["output"]["bias"].at[3].set(value)
    damaged = params | {"backbone": params["backbone"] | {"output": params["backbone"]["output"] | {"bias": bias}}}
    with pytest.raises(DataError, match="the logits of prompt 0 are not finite"):
        generate(model, damaged, PROMPTS, max_new_tokens=NEW, k=2, seeds=SEEDS)
