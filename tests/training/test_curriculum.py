"""The curriculum on a micro configuration: order, teachers, resuming, and what it writes."""

import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from micro import micro_config, micro_config_dict
from trained_runs import train

from kforcing_jax.config import parse
from kforcing_jax.errors import ConfigError, DataError, RunError
from kforcing_jax.noise import CdfOrder
from kforcing_jax.sharding import make_mesh
from kforcing_jax.training import curriculum
from kforcing_jax.training.checkpoints import finished_stages, load_stage
from kforcing_jax.training.profiling import ProfiledSteps
from kforcing_jax.training.recipes import predecessors
from kforcing_jax.training.records import stage_progress
from kforcing_jax.workdir import Workdir

K2_FROM_AR = {"k2-from-ar": dict(window=2, teacher="ar", steps=5, batch_size=4)}


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    return train(tmp_path_factory.mktemp("run"), micro_config(**K2_FROM_AR))


def weights(workdir, corpus, stage):
    return jax.tree.leaves(load_stage(workdir, stage, corpus)[1])


def test_every_stage_is_trained_in_order(finished):
    workdir, _ = finished
    lines = [json.loads(line) for line in workdir.metrics_path.read_text().splitlines()]
    order = list(dict.fromkeys(line["stage"] for line in lines))
    assert order == ["ar", "k1", "k2", "k2-from-ar"] == finished_stages(workdir)
    assert {"agreement_1", "agreement_2", "loss_2", "block_agreement"} <= lines[-1].keys()


def test_the_summary_holds_steps_seconds_and_validation_loss_of_every_stage(finished):
    workdir, _ = finished
    stages = workdir.summary()["stages"]
    assert stages.keys() == {"ar", "k1", "k2", "k2-from-ar"}
    assert all(s["steps"] == 5 and s["seconds"] > 0 and 0 < s["validation_loss"] < 10 for s in stages.values())


def test_a_second_run_skips_finished_stages(finished, monkeypatch):
    workdir, _ = finished
    monkeypatch.setattr(curriculum, "train", lambda *args: pytest.fail("a finished stage was trained again"))
    train(workdir.path, workdir.config)


def test_a_run_stopped_after_its_last_checkpoint_still_gets_its_summary(finished):
    workdir, _ = finished
    whole = workdir.summary()
    with workdir.changed_summary() as summary:
        del summary["stages"]["k2"]
    train(workdir.path, workdir.config)
    assert workdir.summary()["stages"]["k2"].keys() == whole["stages"]["k2"].keys()


def train_until(batches, path, corpus, monkeypatch):
    """A run that is stopped when it asks for more than that many batches."""
    real, budget = type(corpus).train_batches, iter(range(batches))

    def limited(self, *args):
        for batch in real(self, *args):
            if next(budget, None) is None:
                raise InterruptedError
            yield batch

    with monkeypatch.context() as patch:
        patch.setattr(type(corpus), "train_batches", limited)
        with pytest.raises(InterruptedError):
            train(path, micro_config())


def test_a_run_stopped_between_and_within_stages_ends_like_an_uninterrupted_one(finished, tmp_path, monkeypatch):
    whole, corpus = finished
    train_until(5 + 3, tmp_path / "cut", corpus, monkeypatch)  # all of ar, and k1 up to its third step
    resumed, _ = train(tmp_path / "cut", micro_config())
    for stage in ("ar", "k1", "k2"):
        for a, b in zip(weights(whole, corpus, stage), weights(resumed, corpus, stage), strict=True):
            np.testing.assert_array_equal(a, b)


def test_a_run_goes_on_with_another_mesh(finished, tmp_path, monkeypatch):
    """Stopped in the third step of k1 on one device, and resumed on four: the same run within rounding."""
    whole, corpus = finished
    train_until(5 + 3, tmp_path / "cut", corpus, monkeypatch)
    mesh = dataclasses.replace(micro_config().mesh, data=2, fsdp=2)
    resumed, _ = train(tmp_path / "cut", without_k2(dataclasses.replace(micro_config(), mesh=mesh)))
    for stage in ("ar", "k1"):
        for a, b in zip(weights(whole, corpus, stage), weights(resumed, corpus, stage), strict=True):
            np.testing.assert_allclose(a, b, atol=2e-3)


def test_a_student_starts_from_its_teachers_weights(finished):
    workdir, corpus = finished
    mesh = make_mesh(workdir.config.mesh)
    start, _ = curriculum._initial_params(workdir, corpus, "k2", mesh)
    for a, b in zip(jax.tree.leaves(start), weights(workdir, corpus, "k1"), strict=True):
        np.testing.assert_array_equal(a, b)
    first, _ = curriculum._initial_params(workdir, corpus, "k1", mesh)
    for a, b in zip(jax.tree.leaves(first["backbone"]), weights(workdir, corpus, "ar"), strict=True):
        np.testing.assert_array_equal(a, b)


def test_teachers_and_origins_follow_the_recipe():
    config = micro_config(**K2_FROM_AR, k4=dict(window=4), **{"k4-from-ar": dict(window=4, teacher="ar")})
    assert predecessors(config, "ar") == (None, None)
    assert predecessors(config, "k1") == ("ar", "ar")
    assert predecessors(config, "k2") == ("k1", "k1")
    assert predecessors(config, "k2-from-ar") == ("ar", "k1")
    assert predecessors(config, "k4") == ("k2", "k2")
    assert predecessors(config, "k4-from-ar") == ("ar", "k2-from-ar")


def test_a_batch_larger_than_the_corpus_is_refused_before_any_stage(tmp_path):
    with pytest.raises(DataError, match=r"stages\.k2\.batch_size = 49 is more than the 48 training rows"):
        train(tmp_path, micro_config(k2=dict(batch_size=49)))


def test_a_stage_that_trains_nothing_has_no_batch_and_no_steps_to_profile(finished, tmp_path):
    raw = micro_config_dict(ar=dict(init_from=str(finished[0].path), steps=0, batch_size=49))
    raw.stages = {"ar": raw.stages.ar}
    assert train(tmp_path / "ar", parse(raw))[0].summary()["stages"]["ar"]["steps"] == 0
    imported = Workdir.claim(tmp_path / "imported", micro_config(ar=dict(checkpoint="x.ckpt", steps=1000)))
    with pytest.raises(ConfigError, match="begins after step 5, the last one of the longest stage"):
        curriculum.run(imported, finished[1], make_mesh(imported.config.mesh), ProfiledSteps(20, 25))
    assert not (tmp_path / "stages").exists()


def test_a_directory_of_another_config_is_refused_by_field(finished):
    workdir, _ = finished
    before = (workdir.path / "config.json").read_text()
    with pytest.raises(RunError, match=r"belongs to a different config: stages\.k1\.learning_rate = 0\.01 there, 0\.5"):
        Workdir.claim(workdir.path, micro_config(**K2_FROM_AR, k1=dict(learning_rate=0.5)))
    assert (workdir.path / "config.json").read_text() == before


def test_what_has_left_no_trace_yet_may_change(finished, tmp_path):
    workdir, _ = finished
    evaluation = dataclasses.replace(workdir.config.evaluation, rows=5)
    joined = micro_config(**K2_FROM_AR, k4=dict(window=4))
    Workdir.claim(workdir.path, dataclasses.replace(joined, evaluation=evaluation))
    Workdir.claim(workdir.path, micro_config(**K2_FROM_AR, k4=dict(window=4, learning_rate=0.5)))
    Workdir.claim(workdir.path, workdir.config)

    Workdir.claim(tmp_path, dataclasses.replace(joined, seed=1))
    Workdir.claim(tmp_path, dataclasses.replace(joined, seed=2))
    (tmp_path / "data").mkdir()
    (tmp_path / "data/manifest.json").write_text("{}")
    with pytest.raises(RunError, match="seed = 2 there, 3 here"):
        Workdir.claim(tmp_path, dataclasses.replace(joined, seed=3))


def test_an_unfinished_or_foreign_directory_cannot_be_opened(tmp_path):
    with pytest.raises(RunError, match="is not a run directory"):
        Workdir.open(tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RunError, match="is damaged"):
        Workdir.open(tmp_path)


def test_what_was_measured_of_other_weights_is_not_kept(finished, tmp_path):
    workdir = Workdir(shutil.copytree(finished[0].path, tmp_path / "run"), finished[0].config)
    with workdir.changed_summary() as summary:
        summary["stages"]["k1"] |= {"weights": "of another k1", "sample_nll": 9.0}
        summary["stages"]["k8"] = {"steps": 3}
    train(workdir.path, workdir.config)
    after = workdir.summary()["stages"]
    assert "sample_nll" not in after["k1"] and after["k1"]["weights"] != "of another k1" and "k8" not in after


def test_a_run_made_before_stages_kept_their_origin_goes_on(finished, tmp_path, caplog):
    workdir = Workdir(shutil.copytree(finished[0].path, tmp_path / "run"), finished[0].config)
    for path in workdir.path.glob("stages/*/checkpoints/*/progress/metadata"):
        path.write_text('{"seconds": 1.0}')
    shutil.rmtree(workdir.path / "stages/k2")
    train(workdir.path, workdir.config)
    assert "k1          does not say what it came from" in caplog.text
    weights = stage_progress(finished[0], "k2")["weights"]
    assert stage_progress(workdir, "k2")["weights"] == weights


def test_weights_keep_the_order_in_which_tokens_lie_on_the_unit_interval(tmp_path, monkeypatch):
    """Also where a later version would shuffle otherwise."""
    raw = micro_config_dict(ar=dict(steps=2), k1=dict(steps=2))
    raw.model.cdf_order = "shuffled"
    workdir, corpus = train(tmp_path / "run", without_k2(parse(raw)))
    order = CdfOrder.shuffled(corpus.vocab_size, raw.seed)
    monkeypatch.setattr(CdfOrder, "shuffled", lambda *args: pytest.fail("a new order for weights that are there"))
    for tokens in (corpus, workdir.tokenizer()):
        assert all(load_stage(workdir, name, tokens)[0].cfg.cdf_order == order for name in ("ar", "k1"))
    shutil.rmtree(workdir.path / "stages/k1")
    train(workdir.path, workdir.config)
    assert stage_progress(workdir, "k1")["made_from"]["cdf_order"] == order.tokens_V.tolist()


def without_k2(config, **stages):
    """`config` without k2, which would take time, and with other fields of the stages that are left."""
    kept = {name: dataclasses.replace(stage, **stages.get(name, {})) for name, stage in config.stages.items()}
    return dataclasses.replace(config, stages={name: kept[name] for name in ("ar", "k1")})


def test_a_stage_ends_at_a_checkpoint_it_has_and_goes_on_from_where_it_was(finished, tmp_path, caplog):
    caplog.set_level("INFO", "kforcing_jax")
    path = shutil.copytree(finished[0].path, tmp_path / "run")
    for name in ("k2", "k2-from-ar"):
        shutil.rmtree(path / "stages" / name)
    whole = finished[0].summary()["stages"]["k1"]

    shorter, corpus = train(path, without_k2(micro_config(), k1=dict(steps=4)))
    assert "checkpoints past its end are put aside, and come back where it is longer again: 5" in caplog.text
    assert "steps was 5 and is 4: as if it had been so from the start" in caplog.text
    summary = shorter.summary()["stages"]["k1"]
    assert summary["steps"] == 4 and summary["weights"] not in (None, whole["weights"])
    assert stage_progress(shorter, "k1")["lengths"] == [[0, 5], [4, 4]]
    lines = [json.loads(line) for line in shorter.metrics_path.read_text().splitlines()]
    assert max(line["step"] for line in lines if line["stage"] == "k1") == 4
    assert load_stage(shorter, "k1", corpus) and finished_stages(shorter) == ["ar", "k1"]

    again, _ = train(path, without_k2(micro_config()))
    assert again.summary()["stages"]["k1"]["weights"] == whole["weights"]


def test_an_order_of_another_vocabulary_is_refused_as_another_vocabulary(tmp_path):
    raw = micro_config_dict()
    raw.model.cdf_order = "shuffled"
    other = Workdir.claim(tmp_path / "other", parse(raw))
    progress = other.checkpoints_path("ar") / "5/progress"
    progress.mkdir(parents=True)
    (progress / "metadata").write_text('{"made_from": {"vocabulary": "bbbbbbbb", "cdf_order": [2, 0, 1]}}')
    raw.stages.ar.update(init_from=str(other.path), steps=0)
    with pytest.raises(RunError, match=r"stages\.ar\.init_from = '.*other': it has another vocabulary \(bbbbbbbb\)"):
        train(tmp_path / "run", parse(raw))


def test_weights_of_another_run_are_a_stage_or_where_one_starts(finished, tmp_path):
    """Also from a stage that is not finished, at its newest checkpoint."""
    other = Workdir(shutil.copytree(finished[0].path, tmp_path / "other"))
    shutil.rmtree(other.checkpoints_path("k1") / "5")
    config = micro_config(
        ar=dict(init_from=str(tmp_path / "other"), steps=0), k1=dict(init_from=str(tmp_path / "other"), steps=1)
    )
    workdir, corpus = train(tmp_path / "run", without_k2(config))
    digest = stage_progress(other, "ar")["weights"]
    assert stage_progress(workdir, "ar")["weights"] == digest
    assert workdir.summary()["stages"]["ar"]["steps"] == 0
    origin = stage_progress(workdir, "ar")["made_from"]
    assert origin["init_from"] == {"run": str(tmp_path / "other"), "stage": "ar", "step": 5, "weights": digest}
    assert "data" not in origin
    trained = stage_progress(workdir, "k1")["made_from"]
    assert (trained["init_from"]["step"], trained["teacher"]["weights"]) == (4, digest) and "origin" not in trained

    start, _ = curriculum._initial_params(Workdir.at(tmp_path / "new", config), corpus, "k1", make_mesh(config.mesh))
    for a, b in zip(jax.tree.leaves(start), weights(other, corpus, "k1"), strict=True):
        np.testing.assert_array_equal(a, b)

    path = other.checkpoints_path("ar") / "5/progress/metadata"
    path.write_text(path.read_text().replace(digest, "0" * 64))
    with pytest.raises(
        RunError, match=r"stage ar of .*run started from another ar of .*other .*; there is 00000000 now"
    ):
        train(tmp_path / "run", without_k2(config))
    shutil.rmtree(tmp_path / "other")
    train(tmp_path / "run", without_k2(config))  # it is needed no longer

    shutil.rmtree(workdir.path / "stages/k1")
    longer = micro_config(ar=dict(init_from=str(tmp_path / "other"), steps=1))
    start, source = curriculum._initial_params(Workdir.at(workdir.path, longer), corpus, "ar", make_mesh(config.mesh))
    for a, b in zip(jax.tree.leaves(start), weights(workdir, corpus, "ar"), strict=True):
        np.testing.assert_array_equal(a, b)
    trained_on, _ = train(workdir.path, without_k2(longer))
    assert stage_progress(trained_on, "ar")["made_from"]["init_from"] == source["init_from"] == origin["init_from"]
