"""Agreement, chance and joint distributions against brute force, and the statistics against known answers."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from step_by_step import softmax, truncated

from kforcing_jax.data.packing import Batch
from kforcing_jax.evaluation.fidelity import agreement, compare_with_joint, exact_joint, student_counts
from kforcing_jax.evaluation.intervals import mean_interval
from kforcing_jax.models import CausalLM, ModelConfig, PushForwardLM, init_params
from kforcing_jax.noise import sample_uniform
from kforcing_jax.training.agreement import window_hidden

STATES = 3
CFG = ModelConfig(vocab_size=STATES + 1, mask_id=STATES, num_layers=2, d_model=16, num_heads=2)


def sharpened(model, seed):
    params = jax.jit(init_params, static_argnums=0)(model, jax.random.key(seed))
    return jax.tree.map(lambda leaf: 2.5 * leaf, params)


@pytest.fixture(scope="module")
def teacher():
    return CausalLM(CFG), sharpened(CausalLM(CFG), 0)


@pytest.fixture(scope="module")
def student():
    return PushForwardLM(CFG), sharpened(PushForwardLM(CFG), 1)


@functools.partial(jax.jit, static_argnums=0)
def window_logits(model, params, tokens, window):
    hidden = window_hidden(model, params, tokens, window)
    return model.apply({"params": params}, hidden, method="logits")


def test_window_logits_equal_a_full_forward_over_text_and_window(teacher):
    model, params = teacher
    tokens = jnp.array([[0, 2, 1, 1]])
    window = jax.random.randint(jax.random.key(3), (1, 4, 3), 0, STATES)
    fast = window_logits(model, params, tokens, window)
    for n in range(4):
        text = jnp.concatenate([tokens[:, : n + 1], window[:, n]], axis=1)
        full = jax.jit(model.apply)({"params": params}, text)[:, n : n + 3]
        np.testing.assert_allclose(fast[:, n], full, atol=1e-5)


def test_the_exact_joint_is_the_chain_rule_over_every_block(teacher):
    model, params = teacher
    contexts = jnp.array([[0, 1, 2, 0], [2, 2, 1, 0]])
    joint = exact_joint(model, params, contexts, 3)
    assert joint.shape == (2, STATES, STATES, STATES)
    np.testing.assert_allclose(joint.sum((1, 2, 3)), 1, atol=1e-6)
    probabilities = jax.jit(lambda text: jax.nn.softmax(model.apply({"params": params}, text)[0, :, :STATES]))
    for c, block in itertools.product(range(2), itertools.product(range(STATES), repeat=3)):
        p = np.asarray(probabilities(jnp.concatenate([contexts[c], jnp.array(block)])[None]))
        expected = np.prod([p[3 + j, token] for j, token in enumerate(block)])
        assert joint[(c, *block)] == pytest.approx(float(expected), rel=1e-4)


def test_the_joint_of_a_nucleus_is_the_chain_rule_over_truncated_conditionals(teacher):
    model, params = teacher
    contexts = jnp.array([[0, 1, 2, 0]])
    joint = exact_joint(model, params, contexts, 2, tau=0.8, top_p=0.7)
    for block in itertools.product(range(STATES), repeat=2):
        text = jnp.concatenate([contexts[0], jnp.array(block)])[None]
        scaled = np.asarray(model.apply({"params": params}, text)[0, 3:5, :STATES], np.float64) / 0.8
        p = [softmax(truncated(row - row.max(), 0, 0.7))[token] for row, token in zip(scaled, block, strict=True)]
        assert joint[(0, *block)] == pytest.approx(np.prod(p), rel=1e-4)
    assert (joint == 0).any()
    np.testing.assert_allclose(exact_joint(model, params, contexts, 1, tau=0.8, top_p=0.7), joint.sum(2), atol=1e-6)


def test_the_joint_of_one_token_is_the_next_token_distribution(teacher):
    model, params = teacher
    contexts = jnp.array([[0, 1, 2, 0], [2, 2, 1, 0]])
    expected = jax.nn.softmax(model.apply({"params": params}, contexts)[:, -1, :STATES])
    np.testing.assert_allclose(exact_joint(model, params, contexts, 1), expected, atol=1e-6)


def test_student_counts_follow_the_students_own_windows(student):
    model, params = student
    contexts = jnp.array([[0, 1, 2]])
    counts = student_counts(model, params, contexts, 2, 400, jax.random.key(5))
    noise = sample_uniform(jax.random.fold_in(jax.random.key(5), 0), (1, 400, 2))[0]
    windows = jnp.zeros((400, 3, 2)).at[:, -1].set(noise)
    logits = jax.jit(model.apply)({"params": params}, jnp.broadcast_to(contexts, (400, 3)), windows, jnp.ones(400))[
        :, -1
    ]
    expected = np.zeros((STATES, STATES))
    np.add.at(expected, tuple(np.asarray(logits.argmax(-1)).T), 1)
    np.testing.assert_array_equal(counts[0], expected)


def test_a_map_that_is_the_teachers_agrees_everywhere_and_chance_is_its_collision_probability(teacher):
    """The 'student' is the teacher itself: its window of one token is the teacher's draw."""
    model, params = teacher
    batches = jax.random.randint(jax.random.key(0), (2, 3, 5), 0, STATES)
    got = agreement(model, params, model, params, Batch(batches), jax.random.key(1), window=1, tau=1.0, eos_id=None)
    # But for the last position, after which no text goes on.
    p = jax.nn.softmax(jnp.stack([model.apply({"params": params}, b) for b in batches]))[:, :, :-1]
    assert got["agreement"] == [1.0] and got["block_agreement"] == 1.0
    assert got["chance"][0] == pytest.approx(float((p**2).sum(-1).mean()), rel=1e-5)


def test_agreement_and_chance_are_of_the_nucleus_that_a_student_was_taught(teacher, student):
    tokens = jax.random.randint(jax.random.key(0), (1, 2, 4), 0, STATES)
    got = agreement(*teacher, *student, Batch(tokens), jax.random.key(1), window=1, tau=0.9, eos_id=None, top_p=0.6)
    noise = sample_uniform(jax.random.fold_in(jax.random.key(1), 0), (2, 4, 1))
    drawn = student[0].apply({"params": student[1]}, tokens[0], noise, jnp.full(2, 0.9)).argmax(-1)[:, :3]
    scaled = np.asarray(teacher[0].apply({"params": teacher[1]}, tokens[0]), np.float64)[:, :3, :STATES] / 0.9
    p = np.array([[softmax(truncated(row - row.max(), 0, 0.6)) for row in rows] for rows in scaled])
    taught = (p.cumsum(-1) > np.asarray(noise)[:, :3]).argmax(-1)
    assert got["agreement"] == [pytest.approx(np.mean(taught == np.asarray(drawn)[..., 0]))]
    assert got["chance"] == [pytest.approx((p**2).sum(-1).mean(), rel=1e-5)]


def test_agreement_is_on_answers_where_these_are_what_is_learnt(teacher, student):
    tokens = jax.random.randint(jax.random.key(0), (1, 2, 4), 0, STATES)
    answers = jnp.array([[[False, True, True, False], [False, False, False, True]]])
    settings = {"window": 1, "tau": 1.0, "eos_id": None}
    got = agreement(*teacher, *student, Batch(tokens, answers=answers), jax.random.key(1), **settings)
    noise = sample_uniform(jax.random.fold_in(jax.random.key(1), 0), (2, 4, 1))
    drawn = student[0].apply({"params": student[1]}, tokens[0], noise, jnp.ones(2)).argmax(-1)
    hits = np.asarray(teacher[0].pick(window_logits(*teacher, tokens[0], drawn), noise, jnp.ones((1, 1, 1))) == drawn)
    assert got["agreement"] == [pytest.approx(hits[[0, 0, 1], [0, 1, 2]].mean())]


def test_agreement_counts_by_hand(teacher, student):
    tokens = jax.random.randint(jax.random.key(0), (1, 2, 4), 0, STATES)
    got = agreement(*teacher, *student, Batch(tokens), jax.random.key(1), window=2, tau=1.0, eos_id=None)
    noise = sample_uniform(jax.random.fold_in(jax.random.key(1), 0), (2, 4, 2))
    logits = jax.jit(student[0].apply)({"params": student[1]}, tokens[0], noise, jnp.ones(2))
    drawn = logits.argmax(-1)
    teacher_draws = teacher[0].pick(window_logits(*teacher, tokens[0], drawn), noise, jnp.ones((1, 1, 1)))
    hits = np.asarray(teacher_draws == drawn)
    # Offset j of position n is token n + 1 + j, of four.
    np.testing.assert_allclose(got["agreement"], [hits[:, :3, 0].mean(), hits[:, :2, 1].mean()], rtol=1e-6)
    agreeing_R = hits[:, :2].all(-1).sum(1)
    assert got["block_agreement"] == pytest.approx(agreeing_R.sum() / 4)
    assert got["block_agreement_interval"] == pytest.approx(mean_interval(agreeing_R, [2, 2]))


def test_what_follows_an_eos_is_not_counted(teacher, student):
    tokens = jax.random.randint(jax.random.key(0), (2, 2, 4), 0, STATES)
    with_eos = agreement(*teacher, *student, Batch(tokens), jax.random.key(1), window=2, tau=1.0, eos_id=0)
    without = agreement(*teacher, *student, Batch(tokens), jax.random.key(1), window=2, tau=1.0, eos_id=None)
    assert with_eos["agreement"][0] == without["agreement"][0]
    assert with_eos["block_agreement"] >= without["block_agreement"]


def test_a_sample_of_the_joint_is_as_far_from_it_as_the_null():
    joint = np.random.default_rng(0).dirichlet(np.ones(64), 4).reshape(4, 8, 8)
    rng = np.random.default_rng(1)
    counts = np.stack([rng.multinomial(5000, p.ravel()).reshape(8, 8) for p in joint])
    result = compare_with_joint(counts, joint, seed=2)
    assert result["joint_tv"] == pytest.approx(result["joint_tv_null"], rel=0.15)
    assert result["joint_g_test"]["p_value"] > 0.001
    assert result["joint_g_test"]["degrees_of_freedom"] <= 4 * 63


def test_a_wrong_distribution_is_told_apart():
    joint = np.full((1, 4), 0.25)
    result = compare_with_joint(np.array([[1000, 0, 500, 500]]), joint, seed=0)
    assert result["joint_tv"] == pytest.approx(0.25)
    assert result["joint_g_test"]["p_value"] < 1e-6 < result["joint_g_test_null"]["p_value"]


def test_the_g_statistic_has_its_textbook_value():
    result = compare_with_joint(np.array([[30.0, 70.0]]), np.array([[0.5, 0.5]]), seed=0)
    assert result["joint_g_test"]["statistic"] == pytest.approx(2 * (30 * np.log(0.6) + 70 * np.log(1.4)))
    assert result["joint_g_test"]["degrees_of_freedom"] == 1


def test_a_zero_count_where_the_joint_is_zero_is_no_evidence():
    result = compare_with_joint(np.array([[50.0, 50.0, 0.0]]), np.array([[0.5, 0.5, 0.0]]), seed=0)
    assert result["joint_tv"] == 0 and result["joint_g_test"]["statistic"] == pytest.approx(0)
