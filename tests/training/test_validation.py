"""Validation in the loop against its definitions: the objective, evaluation.fidelity.agreement, decoding.generate."""

import dataclasses
import gc
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import count_compilations
from micro import micro_config_dict

from kforcing_jax.config import MeshConfig, StageConfig, parse
from kforcing_jax.data.packing import Batch
from kforcing_jax.decoding import generate
from kforcing_jax.errors import ConfigError, UserError
from kforcing_jax.evaluation.fidelity import agreement
from kforcing_jax.sharding import make_mesh, parameter_shardings, replicated
from kforcing_jax.training import curriculum
from kforcing_jax.training.objectives import distillation, language_modelling
from kforcing_jax.training.profiling import ProfiledSteps
from kforcing_jax.training.records import stage_progress
from kforcing_jax.training.validation import Comparison, MeanLoss, Sample, Validation
from kforcing_jax.workdir import Workdir

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
    loss = MeanLoss(
        distillation(student, teacher, STAGE, EOS), teacher_params, jax.device_put(KEY, replicated(mesh)), mesh
    )
    comparison = Comparison(teacher, teacher_params, student, WINDOW, 1.0, EOS, KEY)
    return Validation(loss, Batch(TOKENS), mesh, comparison, sample), params, mesh


@pytest.fixture(scope="module")
def sample_settings():
    return dict(
        prompt=[1, 2, 4], new_tokens=6, k=WINDOW, tau=1.0, seed=7, eos_id=None, decode=lambda ids: str(ids.tolist())
    )


@pytest.fixture(scope="module")
def figures(causal_lm, push_forward_lm):
    validation, params, mesh = student_validation(causal_lm, push_forward_lm)
    with jax.set_mesh(mesh):
        return validation(params)


def test_the_loss_is_that_against_the_stages_own_teacher_on_fixed_rows_and_noise(figures, causal_lm, push_forward_lm):
    objective = distillation(push_forward_lm[0], causal_lm[0], STAGE, EOS)

    @jax.jit
    def losses(params, teacher_params):
        inputs = [objective.draw_inputs(Batch(TOKENS[i]), jax.random.fold_in(KEY, i)) for i in range(len(TOKENS))]
        return [objective.losses(params, teacher_params, part)[0] for part in inputs]

    total, weight = np.sum(losses(push_forward_lm[1], causal_lm[1]), axis=0)
    assert figures["validation_loss"] == pytest.approx(total / weight, rel=1e-5)


def test_agreement_is_that_of_the_evaluation(figures, causal_lm, push_forward_lm):
    expected = agreement(
        *causal_lm, *push_forward_lm, Batch(jnp.asarray(TOKENS)), KEY, window=WINDOW, tau=1.0, eos_id=EOS
    )
    got = [figures[f"validation_agreement_{j}"] for j in (1, 2)]
    np.testing.assert_allclose(got, expected["agreement"], rtol=1e-5)
    assert figures["validation_block_agreement"] == pytest.approx(expected["block_agreement"], rel=1e-5)
    assert 0 < figures["validation_block_agreement"] < 1


def test_a_mesh_finds_the_same(figures, causal_lm, push_forward_lm, sample_settings):
    sizes, sample = MeshConfig(data=2, fsdp=2), Sample(push_forward_lm[0], **sample_settings)
    validation, params, mesh = student_validation(causal_lm, push_forward_lm, sizes, sample)
    with jax.set_mesh(mesh):
        found = validation(params)
    assert found.pop("sample").startswith("[1, 2, 4, ")
    assert found.keys() == figures.keys()
    for name, value in found.items():
        assert value == pytest.approx(figures[name], abs=1e-3), name


def test_the_ar_teacher_has_its_loss_on_text_alone(causal_lm):
    model, params = causal_lm
    mesh, params = on_mesh(params, ONE_DEVICE)
    validation = Validation(MeanLoss(language_modelling(model), {}, KEY, mesh), Batch(TOKENS), mesh)
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
        # They lie as a training step leaves them, not as this product would: other shardings are other programs, which
        # a worker may have compiled hundreds of tests ago or not.
        shardings = jax.tree.map(lambda x: x.sharding, params)
        trained = jax.jit(lambda params: jax.tree.map(lambda x: 0.5 * x, params), out_shardings=shardings)(params)
        with count_compilations() as compiled:
            changed = validation(trained)
    assert not compiled
    assert changed["validation_loss"] != first["validation_loss"]
    expected = generate(*push_forward_lm, [[1, 2, 4]], max_new_tokens=6, k=WINDOW, seeds=[7])
    assert first["sample"] == str(expected.tokens[0].tolist())


def test_a_sample_leaves_no_copy_of_the_weights(push_forward_lm, sample_settings):
    """A stage's teacher lives as long as the stage, and so would what decoding makes of it."""
    model, params = push_forward_lm
    sample = Sample(model, **sample_settings)
    first, second = (jax.tree.map(jnp.copy, params) for _ in range(2))
    texts = [sample.text(first)]
    gc.collect()
    before = len(jax.live_arrays())
    sample.compile(second)
    texts.append(sample.text(second))
    gc.collect()
    assert len(jax.live_arrays()) <= before and texts[0] == texts[1]


def test_weights_that_are_no_numbers_have_a_loss_that_is_none_and_no_sample(
    causal_lm, push_forward_lm, sample_settings, caplog
):
    sample = Sample(push_forward_lm[0], **sample_settings)
    validation, params, mesh = student_validation(causal_lm, push_forward_lm, sample=sample)
    with jax.set_mesh(mesh):
        found = validation(jax.tree.map(lambda x: jnp.full_like(x, jnp.nan), params))
    assert np.isnan(found["validation_loss"]) and "sample" not in found
    assert "no sample: the logits" in caplog.text


@pytest.fixture(scope="module")
def looked_at(tmp_path_factory):
    """Work directories of the same short run: without a look at it, and with one after every step."""
    workdirs = []
    for logging in (dict(validate_every=0), dict(validate_every=1, sample_tokens=3, sample_prompt="01")):
        config = micro_config_dict(ar=dict(steps=2), k1=dict(steps=2))
        del config.stages["k2"]
        config.logging.update(logging)
        workdirs.append(Workdir.claim(tmp_path_factory.mktemp("run"), parse(config)))
        curriculum.run(workdirs[-1], workdirs[-1].corpus(), make_mesh(workdirs[-1].config.mesh))
    return workdirs


def records(workdir):
    lines = map(json.loads, workdir.metrics_path.read_text().splitlines())
    return {(line["stage"], line["step"]): line for line in lines}


def test_looking_at_a_run_changes_no_bit_of_it(looked_at):
    for name in ("ar", "k1"):
        without, each_step = (stage_progress(workdir, name)["weights"] for workdir in looked_at)
        assert without == each_step


def test_every_stage_of_a_run_tells_what_its_validation_finds(looked_at):
    found = {
        key: {n for n in record if n.startswith("validation") or n == "sample"}
        for key, record in records(looked_at[1]).items()
    }
    of_students = {"validation_loss", "validation_agreement_1", "validation_block_agreement", "sample"}
    assert found == {
        (name, step): {"validation_loss", "sample"} if name == "ar" else of_students
        for name in ("ar", "k1")
        for step in (1, 2)
    }
    record = records(looked_at[1])["k1", 2]
    assert record["sample"].replace(" ", "").startswith("01") and len(record["sample"].replace(" ", "")) == 5
    assert record["validation_loss"] == stage_progress(looked_at[1], "k1")["validation_loss"]
    assert record["teraflops_per_device"] > 0 and record["peak_share"] is None
    assert all(record[f"seconds_{part}"] > 0 for part in ("compiling", "validating", "stepping"))


def test_a_run_is_looked_at_once_a_stage_if_no_more_is_asked_for(looked_at):
    assert [key for key, record in records(looked_at[0]).items() if "validation_loss" in record] == [
        ("ar", 2),
        ("k1", 2),
    ]


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (
            dict(sample_prompt="01230123"),
            "logging.sample_prompt has 8 tokens; it should have fewer than data.seq_len = 8",
        ),
        (dict(sample_prompt="0X1"), "logging.sample_prompt = '0X1': the prompt has 'X'"),
    ],
)
def test_a_prompt_that_cannot_be_continued_is_refused_before_any_stage(looked_at, tmp_path, changes, says):
    config = dataclasses.replace(looked_at[1].config.logging, **changes)
    workdir = Workdir.claim(tmp_path, dataclasses.replace(looked_at[1].config, logging=config))
    with pytest.raises(UserError, match=says):
        curriculum.run(workdir, workdir.corpus(), make_mesh(ONE_DEVICE))
    assert not (tmp_path / "stages").exists()


def test_steps_to_profile_that_no_stage_has_are_refused_before_any_stage(looked_at, tmp_path):
    workdir = Workdir.claim(tmp_path, looked_at[0].config)
    with pytest.raises(ConfigError, match="profile = '3:4' begins after step 2, the last one of the longest stage"):
        curriculum.run(workdir, workdir.corpus(), make_mesh(ONE_DEVICE), ProfiledSteps(3, 4))
    assert not (tmp_path / "stages").exists()
