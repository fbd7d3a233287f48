"""What may go wrong around a run: other runs beside it, changed origins, damaged files, flags that do not fit."""

import contextlib
import errno
import fcntl
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import commands
import jax
import numpy as np
import pytest
from commands import REPOSITORY, refused, run_command
from jax.experimental import multihost_utils
from micro import CONFIG_FILE

from kforcing_jax import workdir as workdir_module
from kforcing_jax.cli import processes
from kforcing_jax.errors import RunError
from kforcing_jax.evaluation import suite
from kforcing_jax.workdir import Workdir

# Futures of tensorstore outlive the loop of a reading that has failed.
pytestmark = pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning")


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(config file, run directory) of a finished run."""
    folder = tmp_path_factory.mktemp("faults")
    (folder / "config.py").write_text(CONFIG_FILE)
    done = run_command("main", f"--config={folder / 'config.py'}", f"--workdir={folder / 'run'}")
    assert done.status == 0, done.err
    return folder / "config.py", folder / "run"


@pytest.fixture
def copy(trained, tmp_path):
    """(config file, a copy of the run that a test may change)."""
    config, run = trained
    return config, Path(shutil.copytree(run, tmp_path / "run"))


def main(config, run, *given):
    return run_command("main", f"--config={config}", f"--workdir={run}", *given)


def summary_of(run):
    return json.loads((run / "summary.json").read_text())


def damage(run, stage, step):
    """Cuts the weights of a checkpoint short."""
    for path in (run / f"stages/{stage}/checkpoints/{step}/ema").glob("**/d/*"):
        os.truncate(path, 10)


def change_progress(run, stage, change):
    path = run / f"stages/{stage}/checkpoints/5/progress/metadata"
    content = json.loads(path.read_text())
    change(content)
    path.write_text(json.dumps(content))


@contextlib.contextmanager
def locked_by_another(run):
    """A lock on another open file is as good as one of another process."""
    with (run / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


@pytest.mark.parametrize("command", ["main", "prepare"])
def test_of_two_runs_in_a_directory_the_second_changes_nothing(trained, command):
    config, run = trained
    before = (run / "config.json").read_text()
    with locked_by_another(run):
        done = run_command(command, f"--config={config}", f"--workdir={run}", "--config.evaluation.rows=5")
    refused(done, f"{run} is in use: another process trains there")
    assert (run / "config.json").read_text() == before


def test_a_run_holds_its_directory_to_its_report(copy, monkeypatch):
    config, run = copy
    refusals = []

    def start_another(path):
        with (run / ".lock").open("a") as file, pytest.raises(BlockingIOError) as refusal:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        refusals.append(refusal)

    monkeypatch.setattr(suite, "write_report", start_another)
    assert main(config, run).status == 0 and len(refusals) == 1


def test_a_teacher_cannot_change_under_its_students(copy):
    config, run = copy
    shutil.rmtree(run / "stages/ar")
    done = main(config, run, "--config.stages.ar.learning_rate=0.05")
    refused(done, "stages.ar.learning_rate = 0.01 there, 0.05 here", "delete what came from it (stages/k1, stages/k2)")
    assert not (run / "stages/ar").exists()


def test_a_teacher_trained_again_is_the_same_to_its_students(copy):
    config, run = copy
    before = summary_of(run)["stages"]["ar"]
    shutil.rmtree(run / "stages/ar")
    done = main(config, run)
    assert done.status == 0 and "k1          finished, skipped" in done.err
    assert "ar          step      5/5" in done.err
    assert summary_of(run)["stages"]["ar"]["weights"] == before["weights"]


@pytest.mark.parametrize("command", ["main", "generate", "evaluate", "export"])
def test_a_student_of_another_teacher_is_refused_by_name(copy, command):
    config, run = copy
    change_progress(run, "k2", lambda progress: progress["made_from"]["teacher"].update(weights="0" * 64))
    given = {
        "main": [f"--config={config}"],
        "export": [f"--output={run / 'x.safetensors'}"],
        "generate": ["--prompt=0"],
    }
    done = run_command(command, f"--workdir={run}", *given.get(command, []))
    assert done.status == 2 and "Traceback" not in done.err
    assert f"stage k2 of {run} was trained from another k1 (00000000;" in done.err.splitlines()[-1]


def test_data_of_another_vocabulary_is_refused_and_the_config_kept(copy, tmp_path):
    config, run = copy
    other = Path(shutil.copytree(run / "data", tmp_path / "other"))
    tokenizer = (other / "tokenizer.json").read_text()
    (other / "tokenizer.json").write_text(tokenizer.replace('"0"', '"x"').replace('"1"', '"0"').replace('"x"', '"1"'))
    before = (run / "config.json").read_text()
    done = main(config, run, f"--config.data.prepared={other}")
    assert done.status == 2 and "stage ar of" in done.err and "was trained with another vocabulary" in done.err
    assert (run / "config.json").read_text() == before


def test_a_damaged_last_checkpoint_is_made_again_and_everything_else_stays(copy):
    config, run = copy
    damage(run, "k1", 5)
    shutil.rmtree(run / "stages/ar/checkpoints/5")
    done = main(config, run)
    assert done.status == 0 and "Traceback" not in done.err
    assert "ar          goes on from step 4/5" in done.err and "checkpoints/5 is damaged" in done.err
    assert "k1          goes on from step 4/5" in done.err and "k2          finished, skipped" in done.err


def test_a_damaged_last_checkpoint_is_passed_over_by_generate(copy):
    _, run = copy
    damage(run, "k2", 5)
    done = run_command("generate", f"--workdir={run}", "--prompt=012")
    assert done.status == 0 and done.out.startswith("012")
    assert "k2/checkpoints/5 is damaged" in done.err and "taking that of step 4" in done.err
    damage(run, "k2", 4)
    done = run_command("generate", f"--workdir={run}", "--prompt=012")
    assert done.status == 2 and "no good one before it" in done.err.splitlines()[-1]


def test_a_stage_that_still_trains_is_decoded_and_evaluated_at_its_newest_checkpoint(copy):
    config, run = copy
    shutil.rmtree(run / "stages/k2/checkpoints/5")
    before = {path: path.stat().st_mtime_ns for path in (run / "stages").rglob("*")}
    named = run_command("generate", f"--workdir={run}", "--prompt=012", "--stage=k2")
    assert named.status == 0 and named.out.startswith("012") and len(named.out.strip()) == 8
    assert named.err.splitlines()[0] == "k2 at step 4 of 5, not finished"
    by_itself = run_command("generate", f"--workdir={run}", "--prompt=012")
    assert by_itself.status == 0 and by_itself.err.startswith("k1, ")
    earlier = run_command("generate", f"--workdir={run}", "--prompt=012", "--step=4")
    assert earlier.status == 0 and earlier.err.startswith("k1 at step 4, not its last, 5")
    refused(
        run_command("generate", f"--workdir={run}", "--prompt=012", "--step=3"), "no checkpoint of step 3, but of 4, 5"
    )

    done = run_command("evaluate", f"--workdir={run}")
    assert done.status == 0 and "\nk2@4 " in done.out and "k2 at step 4 of 5, not finished" in done.err
    assert {path: path.stat().st_mtime_ns for path in (run / "stages").rglob("*")} == before
    summary = summary_of(run)
    assert summary["stages"].keys() == {"ar", "k1"} and summary["unfinished"].keys() == {"k2"}
    running = summary["unfinished"]["k2"]
    assert (running["step"], running["steps"], len(running["agreement"])) == (4, 5, 2)

    assert main(config, run).status == 0
    assert summary_of(run)["stages"].keys() == {"ar", "k1", "k2"} and "unfinished" not in summary_of(run)


@pytest.mark.parametrize("content", ['{"stages": {"ar"', "[]", '{"stages": 3}', ""])
def test_a_damaged_summary_is_written_anew(copy, content):
    _, run = copy
    workdir = Workdir.open(run)
    workdir.summary_path.write_text(content)
    with workdir.changed_summary() as summary:
        assert summary == {"stages": {}}
        summary["stages"]["ar"] = {"steps": 1}
    assert workdir.summary() == {"stages": {"ar": {"steps": 1}}}


def test_evaluation_builds_a_damaged_summary_and_keeps_what_training_adds_meanwhile(copy, monkeypatch):
    _, run = copy
    (run / "summary.json").write_text('{"stages": {')
    measure = suite.measure

    def training_goes_on(*args):
        with Workdir.open(run).changed_summary() as summary:
            weights = json.loads((run / "stages/k1/checkpoints/5/progress/metadata").read_text())["weights"]
            summary["stages"]["k1"] = {"validation_loss": 1.5, "weights": weights}
        return measure(*args)

    monkeypatch.setattr(suite, "measure", training_goes_on)
    done = run_command("evaluate", f"--workdir={run}")
    assert done.status == 0 and "summary.json is damaged" in done.err
    stages = summary_of(run)["stages"]
    assert stages["ar"]["steps"] == 5 and stages["ar"]["seconds"] > 0
    assert stages["k1"]["validation_loss"] == 1.5 and "sample_nll" in stages["k1"]


def test_evaluation_of_a_read_only_run_prints_its_table(trained, monkeypatch):
    _, run = trained

    def read_only(path, text):
        raise OSError(errno.EROFS, "Read-only file system", str(path))

    monkeypatch.setattr(workdir_module, "write_text", read_only)
    monkeypatch.setattr(Workdir, "is_writable", lambda self: False)
    done = run_command("evaluate", f"--workdir={run}")
    assert done.status == 0 and "\nk2 " in done.out
    assert done.err.splitlines()[0] == f"{run} is not writable: what is measured will not be kept"
    assert "Read-only file system" in done.err.splitlines()[-1]


def test_a_mesh_that_does_not_fit_is_refused_before_the_text_is_read(trained, tmp_path):
    refused(main(trained[0], tmp_path / "run", "--config.mesh.data=3"), "batch_size = 4", "3")
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--prompt=01", "--prompt_ids=1,2"], "--prompt has no effect with --prompt_ids"),
        (["--mode=ar", "--k=1"], "--k has no effect with --mode=ar"),
        (["--stage=ar", "--k=1"], "--k has no effect with --stage=ar"),
        (["--mode=ar", "--stage=k1"], "--stage=k1 is a student, and --mode=ar decodes the teacher"),
        (["--tau=1e-7"], "--tau = 1e-07 is not in [1e-6, 1000]"),
        (["--tau=0.5"], "--tau=0.5 is not a temperature that this student was trained with: 1.0"),
        (["--prefix_file=no.jsonl"], "--prefix_file=no.jsonl cannot be read"),
        (["--prompt=0", "--max_new_tokens=400"], "exceed the cache of 8 positions"),
        (["--prompt_ids="], "--prompt_ids is missing: its value is empty"),
        (["--prompt=0ìú"], r"'\xec' (U+00EC)"),
    ],
)
def test_generate_refuses_what_it_would_ignore(trained, monkeypatch, given, says):
    """On a terminal that knows ASCII alone."""
    stream = io.TextIOWrapper
    monkeypatch.setattr(commands, "_stream", lambda: stream(io.BytesIO(), encoding="ascii", write_through=True))
    refused(run_command("generate", f"--workdir={trained[1]}", *given), says)


def test_the_teacher_takes_every_temperature(trained):
    _, run = trained
    done = run_command("generate", f"--workdir={run}", "--mode=ar", "--tau=1e-6", "--prompt=012")
    assert done.status == 0 and len(done.out.strip()) == 8


@pytest.mark.parametrize("command", ["main", "prepare", "generate", "evaluate", "export"])
def test_an_empty_flag_is_a_missing_one(command, tmp_path):
    refused(run_command(command, "--workdir=", cwd=tmp_path), "--workdir is missing")
    assert not list(tmp_path.iterdir())


def test_paths_may_hold_a_tilde_or_a_colon(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "t10:30").mkdir()
    text = CONFIG_FILE.replace("get_config()", "get_config(variant='plain')") + "    assert variant == 'plain'\n"
    (tmp_path / "t10:30/c.py").write_text(text)
    for config in ("~/t10:30/c.py", "~/t10:30/c.py:plain"):
        done = run_command("prepare", f"--config={config}", "--workdir=~/run", cwd=tmp_path)
        assert done.status == 0, done.err
    assert (tmp_path / "run/data/manifest.json").exists() and not (tmp_path / "~").exists()


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (["--config=no:such.py"], "--config=no: no such file"),
        (["--config={}:v"], "TypeError"),
        (
            ["--config={}", "--config.data.seq_le=9"],
            "data.seq_le is not a field of the configuration; did you mean data.seq",
        ),
        (["--config={}", "--config.model", "3"], "model = 3 should be a group of fields"),
        (["--config={}", "--config.model.d_model=100.5"], "model.d_model = 100.5 should be of type int"),
        (["--config={}", "--config.stages.k1.skip_after_eos=maybe"], "'maybe' should be of type bool"),
        (["--config={}", "--config.stages.k1.learning_rate=fast"], "'fast' should be of type float"),
    ],
)
def test_a_configuration_that_cannot_be_read_is_said_in_one_line(trained, given, says, tmp_path):
    given = [word.format(trained[0]) for word in given]
    refused(run_command("prepare", *given, f"--workdir={tmp_path / 'run'}"), says)
    assert not (tmp_path / "run").exists()


def test_a_full_disk_is_one_line(trained, tmp_path, monkeypatch):
    from kforcing_jax.training.checkpoints import ocp

    def full(*args, **settings):
        raise ValueError("RESOURCE_EXHAUSTED: Error writing\nNo space left on device")

    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    done = main(trained[0], tmp_path / "run")
    assert done.status == 2 and "Traceback" not in done.err
    assert done.err.splitlines()[-1].endswith(
        "ar/checkpoints cannot be written: RESOURCE_EXHAUSTED: Error writing No space left on device"
    )


def test_what_fails_in_one_process_fails_in_all(monkeypatch):
    others = np.zeros(processes._LONGEST_ERROR, np.uint8)
    others[:4] = list(b"full")
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(multihost_utils, "process_allgather", lambda words: np.stack([words, others]))
    with pytest.raises(RunError, match=r"^full$"):
        processes.together(lambda: 3)


def test_several_processes_do_not_prepare(trained, tmp_path, monkeypatch):
    workdir = Workdir.at(tmp_path / "run", Workdir.open(trained[1]).config)
    monkeypatch.setattr(jax, "process_count", lambda: 2)
    with pytest.raises(RunError, match=r"run python -m kforcing_jax\.prepare"):
        workdir.corpus()


def test_a_command_runs_again_in_the_same_interpreter(trained):
    """As in a notebook, where nothing is reset between two cells. In a process where nobody has imported it."""
    script = """if True:
        import contextlib, io, runpy, sys
        said = io.StringIO()
        for _ in range(2):
            with contextlib.suppress(SystemExit), contextlib.redirect_stderr(said):
                runpy.run_module("kforcing_jax.generate", run_name="__main__")
        print(said.getvalue())
    """
    command = [sys.executable, "-c", script, f"--workdir={trained[1]}", "--k=9"]
    done = subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True, timeout=300)
    assert done.stdout.count("--k=9 exceeds the largest trained window, 2") == 2, (done.stdout, done.stderr)
