"""Validation in the loop against its definitions: mean_loss, evaluation.fidelity.agreement, decoding.generate."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import count_compilations

from kforcing_jax.config import MeshConfig, StageConfig
from kforcing_jax.data.packing import Batch
from kforcing_jax.decoding import generate
from kforcing_jax.evaluation.fidelity import agreement
from kforcing_jax.sharding import make_mesh, parameter_shardings, put_validation, replicated
from kforcing_jax.training.objectives import distillation, language_modelling, mean_loss
from kforcing_jax.training.validation import Comparison, Sample, Validation

WINDOW, EOS = 2, 3
STAGE = StageConfig(window=WINDOW, teacher="ar")
TOKENS = np.random.default_rng(0).integers(0, 9, (2, 16, 8)).astype(np.int32)  # (I, B, N)
KEY = jax.random.key(5)
ONE_DEVICE = MeshConfig(data=1)


def on_mesh(tree, sizes):
    mesh = make_mesh(sizes, jax.devices()[: sizes.data * sizes.fsdp * sizes.tensor])
    return mesh, jax.device_put(tree, parameter_shardings(tree, mesh))


def student_validation(causal_lm, push_forward_lm, sizes=ONE_DEVICE, sample=None):
    """(validation of a student against the AR teacher, its parameters, the mesh)"""
    (teacher, teacher_params), (student, params) = causal_lm, push_forward_lm
    mesh, (teacher_params, params) = on_mesh((teacher_params, params), sizes)
    objective = distillation(student, teacher, STAGE, EOS)
    comparison = Comparison(teacher, teacher_params, student, WINDOW, 1.0, EOS)
    batches = put_validation(Batch(TOKENS), mesh)
    key = jax.device_put(KEY, replicated(mesh))
    return Validation(objective, teacher_params, batches, key, comparison, sample), params, mesh


@pytest.fixture(scope="module")
def sample_settings():
    return dict(
        prompt=[1, 2, 4], new_tokens=6, k=WINDOW, tau=1.0, seed=7, eos_id=None, decode=lambda ids: str(list(ids))
    )


@pytest.fixture(scope="module")
def figures(causal_lm, push_forward_lm):
    validation, params, mesh = student_validation(causal_lm, push_forward_lm)
    with jax.set_mesh(mesh):
        return validation(params)


def test_the_loss_is_that_against_the_stages_own_teacher_on_fixed_rows_and_noise(figures, causal_lm, push_forward_lm):
    objective = distillation(push_forward_lm[0], causal_lm[0], STAGE, EOS)
    loss = jax.jit(lambda s, t: mean_loss(objective, s, t, Batch(jnp.asarray(TOKENS)), KEY))
    assert figures["validation_loss"] == pytest.approx(float(loss(push_forward_lm[1], causal_lm[1])), rel=1e-5)


def test_agreement_is_that_of_the_evaluation(figures, causal_lm, push_forward_lm):
    expected = agreement(
        *causal_lm, *push_forward_lm, Batch(jnp.asarray(TOKENS)), KEY, window=WINDOW, tau=1.0, eos_id=EOS
    )
    got = [figures[f"validation_agreement_{j}"] for j in (1, 2)]
    np.testing.assert_allclose(got, expected["agreement"], rtol=1e-5)
    assert figures["validation_block_agreement"] == pytest.approx(expected["block_agreement"], rel=1e-5)
    assert 0 < figures["validation_block_agreement"] < 1


def test_a_mesh_finds_the_same(figures, causal_lm, push_forward_lm):
    validation, params, mesh = student_validation(causal_lm, push_forward_lm, MeshConfig(data=2, fsdp=2))
    with jax.set_mesh(mesh):
        found = validation(params)
    assert found.keys() == figures.keys()
    for name, value in found.items():
        assert value == pytest.approx(figures[name], abs=1e-3), name


def test_the_ar_teacher_has_its_loss_on_text_alone(causal_lm):
    model, params = causal_lm
    mesh, params = on_mesh(params, ONE_DEVICE)
    validation = Validation(language_modelling(model), {}, put_validation(Batch(TOKENS), mesh), KEY)
    with jax.set_mesh(mesh):
        found = validation(params)
    log_probs = jax.nn.log_softmax(jax.jit(model.apply)({"params": params}, TOKENS.reshape(32, 8)))[:, :-1]
    expected = -np.take_along_axis(np.asarray(log_probs), TOKENS.reshape(32, 8)[:, 1:, None], -1).mean()
    assert found == {"validation_loss": pytest.approx(expected, rel=1e-4)}


def test_later_validations_compile_nothing_and_the_sample_is_that_of_generate(
    causal_lm, push_forward_lm, sample_settings
):
    sample = Sample(push_forward_lm[0], **sample_settings)
    validation, params, mesh = student_validation(causal_lm, push_forward_lm, sample=sample)
    with jax.set_mesh(mesh):
        validation.compile(params)
        first = validation(params)
        with count_compilations() as compiled:
            changed = validation(jax.tree.map(lambda x: 0.5 * x, params))
    assert len(compiled) <= len({x.shape for x in jax.tree.leaves(params)})  # those of the halving
    assert changed["validation_loss"] != first["validation_loss"]
    expected = generate(*push_forward_lm, [[1, 2, 4]], max_new_tokens=6, k=WINDOW, seeds=[7])
    assert first["sample"] == str(list(expected.tokens[0]))


def test_weights_that_are_no_numbers_have_a_loss_that_is_none_and_no_sample(
    causal_lm, push_forward_lm, sample_settings, caplog
):
    sample = Sample(push_forward_lm[0], **sample_settings)
    validation, params, mesh = student_validation(causal_lm, push_forward_lm, sample=sample)
    with jax.set_mesh(mesh):
        found = validation(jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params))
    assert np.isnan(found["validation_loss"]) and "sample" not in found
    assert "no sample: the logits" in caplog.text


def test_a_sample_keeps_to_its_settings(sample_settings):
    """Nothing of it can change between two validations."""
    with pytest.raises(dataclasses.FrozenInstanceError):
        Sample(None, **sample_settings).seed = 8
