"""What is checked before a stage takes its weights from another run; test_curriculum.py trains from them."""

import json

import pytest
from micro import micro_config, micro_config_dict

from kforcing_jax.config import parse, successors
from kforcing_jax.errors import ConfigError, RunError
from kforcing_jax.noise import CdfOrder
from kforcing_jax.training.init_from import check_source, check_sources
from kforcing_jax.workdir import Workdir


class Tokens:
    """What is looked at of a corpus."""

    vocab_size, mask_id, eos_id, vocabulary_digest = 5, 4, None, "a" * 64


def config(model=(), **stages):
    raw = micro_config_dict(**stages)
    raw.model.update(dict(model))
    return parse(raw)


def run_with(path, run_config, **progress):
    """A run whose stages have a checkpoint of step 5 that says so of itself."""
    workdir = Workdir.claim(path, run_config)
    for stage in ("ar", "k1", "k2"):
        folder = workdir.checkpoints_path(stage) / "5/progress"
        folder.mkdir(parents=True)
        said = {"vocabulary": Tokens.vocabulary_digest, "cdf_order": None} | progress
        (folder / "metadata").write_text(json.dumps({"made_from": said}))
    return workdir


def starting(tmp_path, stage="k1", source="other", model=(), **fields):
    fields = {"init_from": str(tmp_path / source)} | fields
    return Workdir.at(tmp_path / "run", config(model, **{stage: fields}))


def test_a_stage_of_the_same_model_and_vocabulary_is_taken(tmp_path):
    run_with(tmp_path / "other", config())
    for stage in ("ar", "k1", "k2"):
        check_source(starting(tmp_path, stage, steps=0), stage, Tokens)
    check_source(starting(tmp_path, "k1", "other/ar"), "k1", Tokens)
    check_source(starting(tmp_path, "k2", "other/k1"), "k2", Tokens)


def test_arithmetic_may_differ_and_the_first_size_that_does_is_named(tmp_path):
    run_with(tmp_path / "other", config(dict(remat="nothing", attention="dense", precision="default")))
    check_sources(starting(tmp_path))
    with pytest.raises(RunError, match=r"stages\.k1\.init_from = '.*other': model\.num_layers = 2 there, 3 here"):
        check_sources(starting(tmp_path, model=dict(num_layers=3)))
    with pytest.raises(RunError, match=r"model\.cdf_order = 'vocabulary' there, 'shuffled' here"):
        check_sources(starting(tmp_path, model=dict(cdf_order="shuffled")))
    check_sources(starting(tmp_path, "ar", model=dict(cdf_order="shuffled")))  # an AR model is bound to no order


def test_a_stage_that_is_not_there_is_named_with_those_that_are(tmp_path):
    run_with(tmp_path / "other", config())
    with pytest.raises(RunError, match=r"other/k9': k9 is no stage of that run; .* with a checkpoint: ar, k1, k2"):
        check_sources(starting(tmp_path, source="other/k9"))
    Workdir.claim(tmp_path / "new", config())
    with pytest.raises(RunError, match=r"new': k1 has no checkpoint yet; .* none of its stages has a checkpoint"):
        check_sources(starting(tmp_path, source="new"))


def test_what_cannot_be_without_training_is_refused(tmp_path):
    run_with(tmp_path / "other", config())
    for source in ("other/ar", "other/k1"):
        with pytest.raises(RunError, match=r"too small for 2 without training; give it steps"):
            check_sources(starting(tmp_path, "k2", source, steps=0))
    check_sources(starting(tmp_path, "k1", "other/k2", steps=0))
    with pytest.raises(RunError, match=r"k1 was trained with tau_min, tau_max = 1, 1, and here it is 0\.5, 1"):
        check_sources(starting(tmp_path, "k1", steps=0, tau_min=0.5))
    with pytest.raises(RunError, match=r"k2 was trained with top_p = 1, and here it is 0\.9 without training"):
        fields = {"k1": {"top_p": 0.9}, "k2": {"top_p": 0.9, "steps": 0, "init_from": str(tmp_path / "other")}}
        check_sources(Workdir.at(tmp_path / "run", config(**fields)))
    with pytest.raises(RunError, match=r"k2 is a student, and the teacher starts from an AR model"):
        check_sources(starting(tmp_path, "ar", "other/k2"))


def test_another_vocabulary_is_refused_with_what_would_be_shared(tmp_path):
    run_with(tmp_path / "other", config(), vocabulary="b" * 64)
    with pytest.raises(
        RunError, match=r"another vocabulary \(bbbbbbbb\) than .*\(aaaaaaaa\); share its data .*other/data"
    ):
        check_source(starting(tmp_path), "k1", Tokens)


def test_a_student_is_bound_to_its_order_and_a_teacher_to_none(tmp_path):
    shuffled = dict(cdf_order="shuffled")
    theirs, ours = [4, 3, 2, 1, 0], [1, 0, 2, 3, 4]
    run_with(tmp_path / "other", config(shuffled), cdf_order=theirs)
    check_source(starting(tmp_path, model=shuffled), "k1", Tokens)  # nothing is trained here: the order comes with it
    begun = run_with(tmp_path / "run", config(shuffled), cdf_order=ours)
    for stage in ("ar", "k1"):
        (begun.checkpoints_path(stage) / "5").rename(tmp_path / f"moved {stage}")
    check_source(starting(tmp_path, "ar", model=shuffled), "ar", Tokens)
    with pytest.raises(RunError, match="a student for another order of tokens"):
        check_source(starting(tmp_path, model=shuffled), "k1", Tokens)
    assert CdfOrder(theirs) != CdfOrder(ours)


def test_a_stage_that_has_begun_needs_the_other_run_no_longer(tmp_path):
    run_with(tmp_path / "run", config())
    check_sources(starting(tmp_path, source="gone"))


def test_steps_and_windows_follow_where_the_weights_come_from():
    with pytest.raises(ConfigError, match=r"stages\.k1\.steps = 0 should be at least 1"):
        micro_config(k1=dict(steps=0))
    with pytest.raises(ConfigError, match=r"stages\.k8\.window = 8 does not double"):
        micro_config(k8=dict(window=8, init_from="x"))
    assert micro_config(k8=dict(window=8, init_from="x", steps=0)).students["k8"].steps == 0
    assert micro_config(k8_from_ar=dict(window=8, init_from="x", teacher="ar")).students["k8-from-ar"].window == 8


def test_a_stage_that_is_only_what_another_run_made_of_it_comes_from_nothing_here():
    stages = micro_config(k2=dict(init_from="x", steps=0))
    assert successors(stages, "k1") == [] and successors(micro_config(), "k1") == ["k2"]
