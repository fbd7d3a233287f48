"""Gated students in training: one pass over the text, and nothing but what is their own."""

import dataclasses
import json
import re

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import pytest
from micro import micro_config_dict
from trained_runs import train

from kforcing_jax.architecture import LLAMA
from kforcing_jax.config import StageConfig, parse
from kforcing_jax.data.packing import Batch
from kforcing_jax.errors import ConfigError, RunError
from kforcing_jax.models import ModelConfig, PushForwardLM, init_params
from kforcing_jax.models.gated import base_params, own_params, with_own
from kforcing_jax.sharding import make_mesh
from kforcing_jax.training import curriculum
from kforcing_jax.training.checkpoints import load_stage
from kforcing_jax.training.flops import delta_entries, step_flops
from kforcing_jax.training.objectives import distillation
from kforcing_jax.training.records import stage_progress
from kforcing_jax.training.rollout import rollout

V, B, N = 13, 2, 6
FIELDS = dict(vocab_size=V, mask_id=None, num_layers=2, d_model=12, num_heads=4, num_kv_heads=2, d_head=6, **LLAMA)
STUDENT = PushForwardLM(ModelConfig(adapter_rank=2, **FIELDS))


@pytest.fixture(scope="module")
def params():
    rng = np.random.default_rng(1)
    fresh = jax.jit(lambda: init_params(STUDENT, jax.random.key(0)))()
    return jax.tree.map(lambda x: x + 0.3 * rng.normal(size=x.shape).astype(np.float32), fresh)


def batch(segmented=False):
    rng = np.random.default_rng(0)
    segments = np.sort(rng.integers(1, 3, size=(B, N)), axis=1).astype(np.int32)
    return Batch(rng.integers(0, V, size=(B, N)).astype(np.int32), segments if segmented else None)


def loss_and_gradients(stage, teacher, teacher_params, params, rows):
    objective = distillation(STUDENT, teacher, stage, None)
    inputs = objective.draw_inputs(rows, jax.random.key(5))

    def total(params):
        loss, metrics = objective.losses(params, teacher_params, inputs)
        return loss.total / loss.weight, metrics

    (loss, metrics), gradients = jax.jit(jax.value_and_grad(total, has_aux=True))(params)
    return loss, gradients, metrics, inputs


@pytest.mark.parametrize("segmented", [False, True])
@pytest.mark.parametrize("teacher", [STUDENT.text_model, STUDENT], ids=["ar", "previous"])
def test_the_loss_is_that_of_two_passes_over_the_text(params, teacher, segmented):
    """The rollout of its own, and the student's whole pass, whose text rows are not trained."""
    stage, rows = StageConfig(window=2, teacher="ar"), batch(segmented)
    own = jax.tree.map(lambda x: 0.5 * x, own_params(params))
    loss, gradients, _, inputs = loss_and_gradients(stage, teacher, params, own, rows)
    assert jax.tree.structure(gradients) == jax.tree.structure(own)

    def apart(own):
        given = params, rows.tokens, inputs.noise_BxNxK, inputs.tau_B, 1, rows.segments
        targets = rollout(teacher, *given)
        whole = {"params": with_own(base_params(params), own)}
        result = STUDENT.apply(whole, rows.tokens, inputs.noise_BxNxK, inputs.tau_B, rows.segments, method="begin")
        log_probs = jax.nn.log_softmax(STUDENT.apply(whole, result.noise.hidden, method="logits"))
        nll = -jnp.take_along_axis(log_probs, targets[..., None], axis=-1)[..., 0]
        first = jnp.arange(N) if rows.segments is None else _positions(rows.segments)
        weights = first[..., None] + 1 + jnp.arange(2) < N
        return jnp.sum(nll * weights) / jnp.sum(jnp.broadcast_to(weights, nll.shape))

    expected, expected_gradients = jax.jit(jax.value_and_grad(apart))(own)
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), gradients, expected_gradients)


def _positions(segments):
    return np.stack([np.concatenate([np.arange(c) for c in np.unique(row, return_counts=True)[1]]) for row in segments])


def test_several_windows_after_a_position_are_as_many_batches(params):
    stage, own = StageConfig(window=2, teacher="ar", windows=3), own_params(params)
    whole, _, metrics, inputs = loss_and_gradients(stage, STUDENT.text_model, params, own, batch())
    assert inputs.noise_BxNxK.shape == (B, N, 6)
    objective = distillation(STUDENT, STUDENT.text_model, dataclasses.replace(stage, windows=1), None)
    parts = [inputs._replace(noise_BxNxK=noise) for noise in jnp.split(inputs.noise_BxNxK, 3, axis=2)]
    of_one_window = jax.jit(objective.losses)  # op by op it would compile for half a minute
    losses = [of_one_window(own, params, part) for part in parts]
    np.testing.assert_allclose(whole, np.mean([loss.total / loss.weight for loss, _ in losses]), rtol=1e-5)
    agreements = [found["agreement_2"] for _, found in losses]
    np.testing.assert_allclose(metrics["agreement_2"].value, np.mean([each.value for each in agreements]), rtol=1e-5)


def config(rank=2, **stages):
    plain = micro_config_dict(**stages)
    plain.model.update(adapter_rank=rank, num_kv_heads=1, **LLAMA)
    return parse(plain)


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return train(tmp_path_factory.mktemp("run"), config(k2=dict(window=2, windows=2, steps=5, batch_size=4)))


def test_checkpoints_hold_what_is_the_students_own_and_loading_adds_the_teacher(finished):
    workdir, corpus = finished
    _, ar = load_stage(workdir, "ar", corpus)
    for name in ("k1", "k2"):
        model, whole = load_stage(workdir, name, corpus)
        assert model.cfg.is_gated
        jax.tree.map(np.testing.assert_array_equal, base_params(whole), ar)
        kept = ocp.StandardCheckpointer().metadata(workdir.checkpoints_path(name).resolve() / "5" / "ema").item_metadata
        assert jax.tree.structure(dict(kept.tree)) == jax.tree.structure(own_params(whole))
        assert stage_progress(workdir, name)["made_from"]["base"]["stage"] == "ar"
    trained = own_params(load_stage(workdir, "k2", corpus)[1])
    assert any(np.abs(leaf).max() > 0 for leaf in jax.tree.leaves(trained["backbone"]["blocks"]["mlp_out_delta"]["up"]))


def test_a_gated_student_starts_from_the_one_before(finished):
    workdir, corpus = finished
    mesh = make_mesh(workdir.config.mesh)
    ar = load_stage(workdir, "ar", corpus)[1]
    start, _ = curriculum._initial_params(workdir, corpus, "k2", mesh, ar)
    jax.tree.map(np.testing.assert_array_equal, start, own_params(load_stage(workdir, "k1", corpus)[1]))
    first, _ = curriculum._initial_params(workdir, corpus, "k1", mesh, ar)
    assert not any(np.any(delta["up"]) for delta in first["backbone"]["blocks"].values())


def test_a_gated_run_goes_on_where_it_was_stopped_and_looks_at_itself(finished, tmp_path, monkeypatch):
    whole, corpus = finished
    steps = iter(range(5 + 3))
    real = type(corpus).train_batches

    def limited(self, *args):
        for rows in real(self, *args):
            if next(steps, None) is None:
                raise InterruptedError
            yield rows

    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(type(corpus), "train_batches", limited)
        train(tmp_path / "cut", whole.config)
    resumed, _ = train(tmp_path / "cut", whole.config)
    for name in ("k1", "k2"):
        trees = [load_stage(run, name, corpus)[1] for run in (whole, resumed)]
        jax.tree.map(np.testing.assert_array_equal, *trees)
    lines = [json.loads(line) for line in whole.metrics_path.read_text().splitlines()]
    assert "validation_block_agreement" in lines[-1]


def test_a_student_of_another_teacher_is_refused(finished, tmp_path):
    """Its deltas were trained beside other weights."""
    workdir, _ = finished
    plain = config(k1=dict(window=1, steps=0, init_from=str(workdir.path)))
    stages = {name: plain.stages[name] for name in ("ar", "k1")}  # without k2, which would take time
    data = dataclasses.replace(plain.data, prepared=str(workdir.data_path.absolute()))
    settings = dataclasses.replace(plain, data=data, stages=stages)
    with pytest.raises(RunError, match=r"k1 was trained on another AR teacher \(\w{8}; here it is \w{8}\)"):
        ar = dataclasses.replace(stages["ar"], learning_rate=0.02)
        train(tmp_path / "other", dataclasses.replace(settings, stages=stages | {"ar": ar}))
    ar = dataclasses.replace(stages["ar"], steps=0, init_from=str(workdir.path))
    run, corpus = train(tmp_path / "same", dataclasses.replace(settings, stages=stages | {"ar": ar}))
    trees = [load_stage(each, "k1", corpus)[1] for each in (workdir, run)]
    jax.tree.map(np.testing.assert_array_equal, *trees)


def test_a_teacher_that_was_trained_again_is_noticed(finished):
    workdir, corpus = finished
    progress = workdir.checkpoints_path("k2") / "5" / "progress" / "metadata"
    before = progress.read_text()
    said = json.loads(before)
    said["made_from"]["base"]["weights"] = "0" * 64
    progress.write_text(json.dumps(said))
    with pytest.raises(RunError, match="was trained from another ar"):
        load_stage(workdir, "k2", corpus)
    progress.write_text(before)


def test_windows_are_for_gated_students():
    with pytest.raises(ConfigError, match=re.escape("stages.k2.windows = 2 should be 1: only gated students")):
        config(rank=0, k2=dict(window=2, windows=2))


def test_a_gated_step_needs_fewer_flops_than_an_ordinary_one():
    """No gradients of matrices, one text pass less; deltas are a few columns."""
    gated, ordinary = config(rank=1), config(rank=0)
    assert step_flops(gated, "k2", 4) < step_flops(ordinary, "k2", 4)
    blocks = 2 * (16 * 16 + 2 * 16 * 8 + 16 * 16 + 3 * 16 * 64)
    assert delta_entries(dataclasses.replace(gated.model, adapter_rank=-1), 4) == blocks + 16 * 4
