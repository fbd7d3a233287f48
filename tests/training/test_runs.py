"""A run opened as an object, on a micro run that is trained once."""

import dataclasses
import logging

import jax
import numpy as np
import pytest
from micro import micro_config

import kforcing_jax
from kforcing_jax.decoding import generate
from kforcing_jax.errors import DataError, RunError
from kforcing_jax.sharding import make_mesh
from kforcing_jax.training import curriculum
from kforcing_jax.training.runs import load_run
from kforcing_jax.workdir import Workdir


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A work directory whose k2 stage has checkpoints of steps 4 and 5, of 5; the others are finished."""
    config = micro_config()
    workdir = Workdir.claim(tmp_path_factory.mktemp("runs"), config)
    curriculum.run(workdir, workdir.corpus(), make_mesh(config.mesh))
    return workdir.path


@pytest.fixture(scope="module")
def run(folder):
    return load_run(folder)


def test_the_student_of_the_largest_window_is_opened_by_default(run):
    assert (run.stage, run.step, run.window, run.tau_range) == ("k2", 5, 2, (1.0, 1.0))
    assert run.config.stages["k2"].steps == 5 and run.eos_id == run.tokenizer.eos_id


def test_a_stage_and_a_step_can_be_named(folder, run):
    ar, before = load_run(folder, "ar"), load_run(folder, step=4)
    assert (ar.stage, ar.window, ar.tau_range) == ("ar", 1, None)
    assert before.step == 4 and before.stage == "k2"
    pairs = zip(jax.tree.leaves(before.params), jax.tree.leaves(run.params), strict=True)
    assert not all(np.array_equal(first, second) for first, second in pairs)


@pytest.mark.parametrize(
    ("named", "says"),
    [
        ({"stage": "k8"}, "no stage 'k8' that has a checkpoint; there are: ar, k1, k2"),
        ({"step": 3}, "no checkpoint of step 3"),
    ],
)
def test_what_is_not_there_is_named(folder, named, says):
    with pytest.raises(RunError, match=says):
        load_run(folder, **named)


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(RunError, match="is not a run directory"):
        load_run(tmp_path)


def test_while_no_student_is_finished_one_that_has_begun_decodes(folder, monkeypatch):
    monkeypatch.setattr("kforcing_jax.training.runs.finished_stages", lambda workdir: ["ar"])
    monkeypatch.setattr("kforcing_jax.training.runs.begun_stages", lambda workdir: ["ar", "k1"])
    assert load_run(folder).stage == "k1"


def test_texts_and_ids_are_continued_alike_as_decoding_does(run):
    texts = run.generate(["012", "3"], max_new_tokens=4)
    assert texts.lengths.tolist() == [7, 5] and texts.passes.tolist() == [2, 2]
    again = generate(
        run.model,
        run.params,
        [run.encode("012"), run.encode("3")],
        max_new_tokens=4,
        k=2,
        seeds=[0, 1],
        eos_id=run.eos_id,
    )
    np.testing.assert_array_equal(texts.tokens, again.tokens)
    assert run.decode(texts.tokens[0, :3]) == "012"


def test_the_teacher_of_the_run_draws_and_checks(folder, run):
    exact = run.generate(["012"], max_new_tokens=4, mode="exact", seeds=[3])
    alone = load_run(folder, "ar").generate(["012"], max_new_tokens=4, seeds=[3])
    np.testing.assert_array_equal(exact.tokens, alone.tokens)
    assert exact.teacher_passes[0] > 0 and run.teacher is run.teacher


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"prompts": "012"}, "prompts = '012' should be a list"),
        ({"prompts": ["0x"]}, "'x'"),
        ({"k": 3}, "k = 3 is above the window that stage k2 was trained with, 2"),
        ({"tau": 0.5}, "tau = 0.5 is not a temperature that stage k2 was trained with: 1.0"),
        ({"tau": [1.0, 2.0], "prompts": ["0", "1"]}, "tau = 2.0 is not a temperature"),
        ({"top_p": 0.9}, r"top_p = 0\.9 is none that the student was trained with \(1\)"),
    ],
)
def test_what_the_stage_was_not_trained_for_is_refused(run, given, says):
    with pytest.raises(DataError, match=says):
        run.generate(**{"prompts": ["0"], "max_new_tokens": 2} | given)


def test_the_usual_temperature_is_the_nearest_that_is_known(run):
    stages = {name: dataclasses.replace(run.config.stages[name], tau_min=0.2, tau_max=0.7) for name in ("k1", "k2")}
    config = dataclasses.replace(run.config, stages=run.config.stages | stages)
    cool = dataclasses.replace(run, workdir=Workdir(run.workdir.path, config))
    assert cool.tau_range == (0.2, 0.7)
    usual, same = (cool.generate(["0"], max_new_tokens=4, **given).tokens for given in ({}, {"tau": 0.7}))
    np.testing.assert_array_equal(usual, same)
    with pytest.raises(DataError, match=r"trained with: 0\.2 to 0\.7"):
        cool.generate(["0"], max_new_tokens=4, tau=1.0)


def test_all_modes_are_at_the_temperature_and_nucleus_of_the_students_by_default(folder, run):
    stages = {
        name: dataclasses.replace(run.config.stages[name], top_p=0.6, tau_min=0.7, tau_max=0.7) for name in ("k1", "k2")
    }
    config = dataclasses.replace(run.config, stages=run.config.stages | stages)
    narrow = dataclasses.replace(run, workdir=Workdir(run.workdir.path, config))
    assert narrow.top_p == 0.6 and run.top_p == 1
    prompts = ["0", "1", "2", "3"]
    exact = narrow.generate(prompts, max_new_tokens=4, mode="exact").tokens
    nucleus, whole = (
        narrow.generate(prompts, max_new_tokens=4, mode="ar", tau=0.7, top_p=p).tokens for p in (0.6, 1.0)
    )
    np.testing.assert_array_equal(exact, nucleus)
    assert (exact != whole).any()
    alone = dataclasses.replace(load_run(folder, "ar"), workdir=narrow.workdir)
    for ar in (narrow.generate(prompts, max_new_tokens=4, mode="ar"), alone.generate(prompts, max_new_tokens=4)):
        np.testing.assert_array_equal(ar.tokens, exact)
    np.testing.assert_array_equal(
        *(narrow.generate(prompts, max_new_tokens=4, **given).tokens for given in ({}, {"top_p": 0.6}))
    )


def test_texts_longer_than_those_of_training_are_said(run, caplog):
    with caplog.at_level(logging.WARNING, logger="kforcing_jax"):
        logging.getLogger("kforcing_jax").propagate = True
        run.generate(["012"], max_new_tokens=4)
        assert not caplog.records
        run.generate(["012"], max_new_tokens=6)
    assert "texts of up to 9 tokens: stage k2 was trained on 8 (data.seq_len)" in caplog.text


def test_the_package_offers_both_by_name():
    assert kforcing_jax.load_run is load_run and kforcing_jax.generate is generate
    assert {"generate", "load_run", "__version__"} <= set(dir(kforcing_jax))
    with pytest.raises(AttributeError, match="no attribute 'lode_run'"):
        _ = kforcing_jax.lode_run
