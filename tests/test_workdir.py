"""The run directory: opening it, and what may change in it when."""

import dataclasses
import json

import pytest
from micro import micro_config, micro_config_dict

from kforcing_jax.config import Config, parse
from kforcing_jax.errors import RunError
from kforcing_jax.workdir import Workdir


def begun(path, config, **steps):
    """A run directory whose stages have checkpoints of these steps, as far as their names go."""
    workdir = Workdir.claim(path, config)
    for stage, there in steps.items():
        for step in there:
            (workdir.checkpoints_path(stage.replace("_", "-")) / str(step)).mkdir(parents=True)
    return path


def other(config: Config, **stages) -> Config:
    """With other fields of stages; None takes a stage out."""
    changed = {name: dataclasses.replace(config.stages[name], **fields) for name, fields in stages.items() if fields}
    kept = {name: stage for name, stage in config.stages.items() if stages.get(name, {}) is not None}
    return dataclasses.replace(config, stages=kept | changed)


def test_a_path_opens_the_run_that_is_there(tmp_path):
    config = micro_config()
    begun(tmp_path / "run", config)
    for path in (tmp_path / "run", str(tmp_path / "run")):
        assert Workdir(path).config == Workdir.open(path).config == config
    with pytest.raises(RunError, match="is not a run directory"):
        Workdir(tmp_path)


def test_a_stage_may_be_longer_or_shorter_while_nothing_came_from_its_end(tmp_path):
    config = micro_config()
    begun(tmp_path, config, ar=[5], k1=[2, 4])
    Workdir.claim(tmp_path, other(config, k1=dict(steps=50)))
    Workdir.claim(tmp_path, other(config, k1=dict(steps=4)))
    Workdir.claim(tmp_path, other(config, k1=dict(steps=3), k2=dict(steps=1, learning_rate=0.5)))


def test_what_came_from_the_end_of_a_stage_has_to_go_before_the_end_moves(tmp_path):
    config = micro_config(k4=dict(window=4), k4_from_ar=dict(window=4, teacher="ar"))
    begun(tmp_path, config, ar=[5], k1=[5], k2=[5], k4=[2])
    with pytest.raises(RunError) as refusal:
        Workdir.claim(tmp_path, other(config, k2=dict(steps=9)))
    assert str(refusal.value) == (
        f"stages.k2.steps = 5 in {tmp_path}, 9 here: k4 came from k2 at step 5; set it back, or delete what would have "
        f"to be trained again ({tmp_path}/stages/k4)"
    )
    with pytest.raises(RunError, match=r"k1, k2, k4 came from ar at step 5; .*stages/k1, .*stages/k2, .*stages/k4\)"):
        Workdir.claim(tmp_path, other(config, ar=dict(steps=9)))


def test_a_stage_does_not_end_before_its_first_checkpoint(tmp_path):
    config = micro_config(k2=dict(steps=800))
    begun(tmp_path, config, ar=[5], k1=[5], k2=[600, 700])
    with pytest.raises(
        RunError, match=r"stages\.k2\.steps = 599: .* has no checkpoint so early, only at steps 600, 700"
    ):
        Workdir.claim(tmp_path, other(config, k2=dict(steps=599)))


def test_other_fields_of_a_stage_that_has_begun_stay_and_the_refusal_says_what_may_change(tmp_path):
    config = micro_config()
    begun(tmp_path, config, ar=[5], k1=[4])
    with pytest.raises(RunError) as refusal:
        Workdir.claim(tmp_path, other(config, k1=dict(learning_rate=0.5)))
    for words in ("stages.k1.learning_rate = 0.01 there, 0.5 here", "(stages/k1)", "only stages.k1.steps may change"):
        assert words in str(refusal.value)


def test_a_field_is_held_by_what_came_from_it_alone(tmp_path):
    """k2-from-ar starts from k1 and learns from ar: k2 is nothing to it."""
    config = micro_config(k2_from_ar=dict(window=2, teacher="ar"))
    begun(tmp_path, config, ar=[5], k1=[5], k2_from_ar=[5])
    Workdir.claim(tmp_path, other(config, k2=dict(learning_rate=0.5)))
    with pytest.raises(RunError, match=r"delete what came from it \(stages/k1, stages/k2-from-ar\)"):
        Workdir.claim(tmp_path, other(config, k1=dict(learning_rate=0.5)))


def test_another_config_altogether_is_named_by_what_the_whole_run_shares(tmp_path):
    config = micro_config()
    begun(tmp_path, config, ar=[5], k1=[5])
    with pytest.raises(RunError, match=r"belongs to a different config: seed = 0 there, 7 here"):
        Workdir.claim(tmp_path, dataclasses.replace(other(config, ar=dict(steps=9)), seed=7))


def test_a_file_in_place_of_a_work_directory_is_called_one(tmp_path):
    (tmp_path / "run").touch()
    with pytest.raises(RunError, match=r"run is a file; a work directory is a folder"):
        Workdir.claim(tmp_path / "run", micro_config())


def test_a_trained_stage_does_not_leave_unseen(tmp_path):
    config = micro_config()
    begun(tmp_path, config, ar=[5], k1=[5])
    Workdir.claim(tmp_path, other(config, k2=None))
    begun(tmp_path, config, k2=[1])
    with pytest.raises(RunError, match=r"has trained stages\.k2, which is not in this config; leave it in"):
        Workdir.claim(tmp_path, other(config, k2=None))


def test_how_a_run_is_saved_may_change_at_any_time(tmp_path):
    config = micro_config()
    begun(tmp_path, config, ar=[5])
    logging = dataclasses.replace(config.logging, checkpoint_seconds=60.0, keep_best=3, keep_every=1000)
    Workdir.claim(tmp_path, dataclasses.replace(config, logging=logging))


def sourced(path, init_from, name="k1"):
    return Workdir.at(path, other(micro_config(), **{name: dict(init_from=init_from)}))


def test_weights_come_from_a_run_or_from_a_stage_of_it(tmp_path, monkeypatch):
    begun(tmp_path / "a/run", micro_config())
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path / "a")
    for text, stage in (
        ("run", "k1"),
        ("run/k2", "k2"),
        ("~/a/run", "k1"),
        (f"{tmp_path}/a/run/k2_from_ar", "k2-from-ar"),
    ):
        run, named = sourced(tmp_path / "b", text).source("k1")
        assert run.path.resolve() == tmp_path / "a/run" and named == stage
    assert Workdir.at(tmp_path / "b", micro_config()).source("k1") is None


def test_a_source_that_is_no_run_or_this_one_is_refused_by_field(tmp_path):
    with pytest.raises(RunError, match=r"stages\.k1\.init_from = 'no/run': neither no/run nor no is a run directory"):
        sourced(tmp_path, "no/run").source("k1")
    begun(tmp_path / "run", micro_config())
    with pytest.raises(RunError, match=r"is this run; name another one"):
        sourced(tmp_path / "run", f"{tmp_path}/run/k2").source("k1")


def test_prepared_data_serves_several_runs(tmp_path):
    raw = micro_config_dict()
    raw.data.prepared = str(tmp_path / "shared")
    config = parse(raw)
    with pytest.raises(
        RunError, match=r"data\.prepared = '.*shared' is not there; run python -m kforcing_jax\.prepare"
    ):
        Workdir.claim(tmp_path / "a", config).corpus()
    own = Workdir.claim(tmp_path / "own", micro_config())
    digest = own.corpus().data_digest
    own.data_path.rename(tmp_path / "shared")
    for name in ("a", "b"):
        workdir = Workdir.claim(tmp_path / name, config)
        with workdir.locked():
            assert workdir.corpus().data_digest == digest
        assert not (workdir.path / "data").exists()
    raw.data.seq_len = 12
    raw.evaluation.new_tokens = 4
    with pytest.raises(RunError, match=r"shared.*seq_len"):
        Workdir.claim(tmp_path / "c", parse(raw)).corpus()


def test_a_config_that_is_kept_is_the_one_that_is_opened(tmp_path):
    workdir = Workdir.claim(tmp_path, micro_config())
    assert json.loads((tmp_path / "config.json").read_text())["stages"]["k2"]["window"] == 2
    assert Workdir(tmp_path).config == workdir.config
