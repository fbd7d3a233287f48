"""Several processes as one run: real processes on this machine, gloo between them."""

import contextlib
import fcntl
import json
import os
import random
import re
import signal
import socket
import subprocess
import sys
import time

import jax
import numpy as np
import pytest
from commands import REPOSITORY, run_command
from compiling import FAST_FLAGS

from kforcing_jax.training.checkpoints import load_stage
from kforcing_jax.workdir import Workdir

CONFIG = """
import os, time
from micro import micro_config_dict

if "IS_SLOW" in os.environ:
    from kforcing_jax.training.interruption import Interruption
    asked = Interruption.is_asked_for
    Interruption.is_asked_for = lambda self, step: time.sleep(0.2) or asked(self, step)

def get_config():
    config = micro_config_dict(**{
        name: dict(window=window, batch_size=8, steps=steps, learning_rate=1e-2)
        for name, window, steps in (("ar", 0, 5), ("k1", 1, 40), ("k2", 2, 4))
    })
    config.mesh.data = -1
    return config
"""
STAGES = ("ar", "k1", "k2")

pytestmark = pytest.mark.multiprocess


def prepared(folder):
    """A work directory with the data that several processes want to find there."""
    (folder / "config.py").write_text(CONFIG)
    assert run_command("prepare", f"--config={folder / 'config.py'}", f"--workdir={folder / 'run'}").status == 0
    return folder / "run"


def start(workdir, processes, devices, *flags, **settings):
    """The processes of a run with that many devices each; `settings` are variables of their environment."""
    (workdir.parent / "config.py").write_text(CONFIG)
    environment = os.environ | settings
    environment |= {
        "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices} {FAST_FLAGS}",
    }
    command = [sys.executable, "-m", "kforcing_jax.main", f"--config={workdir.parent / 'config.py'}"]
    command += [f"--workdir={workdir}", *flags]
    if processes > 1:
        command += [f"--coordinator_address=localhost:{free_port()}", f"--num_processes={processes}"]
    ranks = [[f"--process_id={i}"] if processes > 1 else [] for i in range(processes)]
    return [
        subprocess.Popen(command + rank, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for rank in ranks
    ]


def free_port():
    """Not one of those that systems give to whoever asks for any: it would be gone before the coordinator takes it."""
    for port in random.sample(range(20_000, 30_000), 100):
        with contextlib.suppress(OSError), socket.socket() as listener:
            listener.bind(("", port))
            return port
    raise AssertionError("no port is free")


def finish(processes):
    """(stdout, stderr) of every process, all of which end well."""
    outputs = [process.communicate(timeout=600) for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs
    return outputs


def weights_of_both(*workdirs):
    """(stage, leaf of the first run, leaf of the second run) of all weights."""
    runs = [Workdir.open(workdir) for workdir in workdirs]
    vocabulary = runs[0].corpus()
    for name in STAGES:
        leaves = [jax.tree.leaves(load_stage(run, name, vocabulary)[1]) for run in runs]
        yield from ((name, *pair) for pair in zip(*leaves, strict=True))


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {(line["stage"], line["step"]): line["loss"] for line in lines}


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """(workdir, outputs) of a run in two processes of two devices each, saved by time: after every report."""
    workdir = prepared(tmp_path_factory.mktemp("two"))
    settings = "checkpoint_every=1000", "checkpoint_seconds=0.001", "keep_newest=1", "keep_every=2", "sample_tokens=3"
    return workdir, finish(start(workdir, 2, 2, *(f"--config.logging.{setting}" for setting in settings)))


def test_two_processes_train_what_one_process_trains(two_processes, tmp_path):
    finish(start(tmp_path / "run", processes=1, devices=8))
    expected, actual = losses(tmp_path / "run"), losses(two_processes[0])
    assert actual.keys() == expected.keys()
    np.testing.assert_allclose(list(actual.values()), list(expected.values()), rtol=2e-3)
    for name, got, wanted in weights_of_both(two_processes[0], tmp_path / "run"):
        np.testing.assert_allclose(got, wanted, atol=2e-3, err_msg=name)


def test_processes_agree_on_when_to_save_by_time(two_processes):
    folder = two_processes[0] / "stages/k1/checkpoints"
    assert sorted(int(path.name) for path in folder.iterdir()) == list(range(2, 41, 2))


def test_one_process_speaks_and_writes(two_processes):
    workdir, ((first, first_log), (second, second_log)) = two_processes
    assert "Report:" in first and "k2" in first_log
    assert "Report:" not in second  # gloo itself greets on stdout
    assert not any(line.startswith(STAGES) for line in second_log.splitlines())
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == len(set(lines)) == len(losses(workdir))
    samples = [record["stage"] for record in map(json.loads, lines) if len(record.get("sample", "")) == 6]
    assert samples == list(STAGES)
    assert (workdir / "report.html").exists()


def test_where_the_first_process_is_refused_the_others_do_not_wait(tmp_path):
    workdir = prepared(tmp_path)
    with (workdir / ".lock").open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        logs = [process.communicate(timeout=120)[1] for process in start(workdir, processes=2, devices=1)]
    assert all(f"error: {workdir} is in use: another process trains there" in log for log in logs)


def test_a_run_that_was_told_to_end_and_then_killed_ends_like_one_that_was_not(two_processes, tmp_path):
    """First as a machine is told that is about to be taken away: one process has the signal, both stop after a step.

    JAX looks for signals once a second: the steps must not be over by then.
    """
    workdir = prepared(tmp_path)
    processes = start(workdir, processes=2, devices=2, IS_SLOW="1")
    wait_for_step(workdir, "k1", 6, processes)
    processes[1].send_signal(signal.SIGTERM)
    for process in processes:
        _, log = process.communicate(timeout=120)
        assert process.returncode == 2 and "interrupted; the same command goes on" in log, log
    reached = max(step for stage, step in losses(workdir) if stage == "k1")

    processes = start(workdir, processes=2, devices=2, IS_SLOW="1")
    wait_for_step(workdir, "k1", reached + 4, processes)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    logs = [process.communicate()[1] for process in processes]
    assert all(process.returncode == -signal.SIGKILL for process in processes)
    kept = int(re.search(r"k1 +goes on from step (\d+)/40", logs[0])[1])
    assert reached <= kept < 40

    (_, log), _ = finish(start(workdir, processes=2, devices=2))
    assert "ar          finished, skipped" in log
    assert kept <= int(re.search(r"k1 +goes on from step (\d+)/40", log)[1]) < 40
    for name, got, wanted in weights_of_both(workdir, two_processes[0]):
        np.testing.assert_array_equal(got, wanted, err_msg=name)


def wait_for_step(workdir, stage, step, processes):
    metrics, deadline = workdir / "metrics.jsonl", time.monotonic() + 240
    while time.monotonic() < deadline:
        if metrics.exists() and any(s == stage and n >= step for s, n in losses_so_far(metrics)):
            return
        assert all(process.poll() is None for process in processes), [p.communicate() for p in processes]
        time.sleep(0.01)
    raise AssertionError(f"{stage} did not reach step {step}")


def losses_so_far(metrics):
    """(stage, step) of the lines that are there; the last one may be half written."""
    for line in metrics.read_text().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            return
        yield record["stage"], record["step"]
