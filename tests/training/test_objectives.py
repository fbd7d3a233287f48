"""Objectives on answers alone."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from kforcing_jax.config import StageConfig
from kforcing_jax.data.packing import Batch
from kforcing_jax.training.objectives import distillation, language_modelling

TOKENS = np.random.default_rng(0).integers(0, 9, (2, 6)).astype(np.int32)
ANSWERS = np.array([[0, 1, 1, 0, 0, 1], [0, 0, 0, 1, 1, 0]], bool)


def loss_of(objective, params, teacher_params, answers):
    inputs = objective.draw_inputs(Batch(TOKENS, answers=answers), jax.random.key(3))
    loss, _ = jax.jit(objective.losses)(params, teacher_params, inputs)
    return np.array(loss)


def test_an_ar_model_learns_the_tokens_of_answers_alone(causal_lm):
    model, params = causal_lm
    total, weight = loss_of(language_modelling(model), params, {}, ANSWERS)
    log_probs = jax.nn.log_softmax(model.apply({"params": params}, jnp.asarray(TOKENS)))
    nll = -np.take_along_axis(np.asarray(log_probs)[:, :-1], TOKENS[:, 1:, None], axis=-1)[..., 0]
    assert weight == ANSWERS[:, 1:].sum() and total == pytest.approx(nll[ANSWERS[:, 1:]].sum(), rel=1e-5)


@pytest.mark.parametrize("name", ["ar", "k2"])
def test_the_losses_on_answers_and_on_all_else_add_up_to_that_on_all(causal_lm, push_forward_lm, name):
    (teacher, teacher_params), (student, params) = causal_lm, push_forward_lm
    if name == "ar":
        objective, given = language_modelling(teacher), (teacher_params, {})
    else:
        objective = distillation(student, teacher, StageConfig(window=2, teacher="ar"), 3)
        given = params, teacher_params
    whole, some, others = (loss_of(objective, *given, answers) for answers in (None, ANSWERS, ~ANSWERS))
    np.testing.assert_allclose(some + others, whole, rtol=1e-5)
    assert 0 < some[1] < whole[1]
    np.testing.assert_array_equal(loss_of(objective, *given, np.ones_like(ANSWERS)), whole)
