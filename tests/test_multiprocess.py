"""Several processes as one run: real processes on this machine, gloo between them."""

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

from kforcing_jax.workdir import Workdir

REPOSITORY = Path(__file__).parents[1]
CONFIG = """
from micro import micro_config_dict
def get_config():
    config = micro_config_dict(**{
        name: dict(window=window, batch_size=8, steps=steps, learning_rate=1e-2)
        for name, window, steps in (("ar", 0, 5), ("k1", 1, 30), ("k2", 2, 4))
    })
    config.mesh.data = -1
    return config
"""
STAGES = ("ar", "k1", "k2")

pytestmark = pytest.mark.multiprocess


def start(workdir, processes, devices, *flags):
    """The processes of a run with that many devices each."""
    (workdir.parent / "config.py").write_text(CONFIG)
    environment = os.environ | {
        "PYTHONPATH": f"{REPOSITORY}{os.pathsep}{REPOSITORY / 'tests'}",
        "XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}",
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
    with socket.socket() as listener:
        listener.bind(("localhost", 0))
        return listener.getsockname()[1]


def finish(processes):
    """(stdout, stderr) of every process, all of which end well."""
    outputs = [process.communicate(timeout=300) for process in processes]
    assert all(process.returncode == 0 for process in processes), outputs
    return outputs


def weights(workdir):
    run = Workdir.open(workdir)
    return {name: jax.tree.leaves(run.load(name, run.corpus())[1]) for name in STAGES}


def losses(workdir):
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    return {(line["stage"], line["step"]): line["loss"] for line in lines}


def assert_same_weights(actual, expected):
    for name in STAGES:
        for got, wanted in zip(actual[name], expected[name], strict=True):
            np.testing.assert_allclose(got, wanted, atol=2e-3, err_msg=name)


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """(workdir, outputs) of a run in two processes of two devices each."""
    workdir = tmp_path_factory.mktemp("two") / "run"
    return workdir, finish(
        start(
            workdir,
            processes=2,
            devices=2,
        )
    )


@pytest.mark.parametrize("devices", [1, 8])
def test_two_processes_train_what_one_process_trains(two_processes, tmp_path, devices):
    finish(start(tmp_path / "run", processes=1, devices=devices))
    expected, actual = losses(tmp_path / "run"), losses(two_processes[0])
    assert actual.keys() == expected.keys()
    np.testing.assert_allclose(list(actual.values()), list(expected.values()), rtol=2e-3)
    assert_same_weights(weights(two_processes[0]), weights(tmp_path / "run"))


def test_one_process_speaks_and_writes(two_processes):
    workdir, ((first, first_log), (second, second_log)) = two_processes
    assert "Report:" in first and "k2" in first_log
    assert "Report:" not in second  # gloo itself greets on stdout
    assert not any(line.startswith(STAGES) for line in second_log.splitlines())
    lines = (workdir / "metrics.jsonl").read_text().splitlines()
    assert len(lines) == len(set(lines)) == len(losses(workdir))
    assert (workdir / "report.html").exists()


def test_a_killed_run_of_two_processes_resumes_and_ends_the_same(two_processes, tmp_path):
    workdir = tmp_path / "run"
    processes = start(workdir, processes=2, devices=2)
    wait_for_step(workdir, "k1", 6, processes)
    for process in processes:
        process.send_signal(signal.SIGKILL)
    for process in processes:
        process.communicate()
    assert all(process.returncode == -signal.SIGKILL for process in processes)
    before = losses(workdir)
    assert max(step for stage, step in before if stage == "k1") < 30

    (_, log), _ = finish(start(workdir, processes=2, devices=2))
    assert "ar          finished, skipped" in log
    for stage, after in weights(workdir).items():
        for got, wanted in zip(after, weights(two_processes[0])[stage], strict=True):
            np.testing.assert_array_equal(got, wanted, err_msg=stage)


def test_a_run_of_two_processes_that_is_told_to_end_keeps_its_last_step(two_processes, tmp_path):
    """As a machine that is about to be taken away is told: one process has the signal, all stop after the same step."""
    workdir = tmp_path / "run"
    processes = start(workdir, processes=2, devices=2)
    wait_for_step(workdir, "k1", 6, processes)
    processes[1].send_signal(signal.SIGTERM)
    for process in processes:
        _, log = process.communicate(timeout=120)
        assert process.returncode == 2 and "interrupted; the same command goes on" in log
    reached = max(step for stage, step in losses(workdir) if stage == "k1")
    (_, log), _ = finish(start(workdir, processes=2, devices=2))
    step = int(re.search(r"k1 +goes on from step (\d+)/30", log)[1])
    assert reached <= step < 30
    for stage, after in weights(workdir).items():
        for got, wanted in zip(after, weights(two_processes[0])[stage], strict=True):
            np.testing.assert_array_equal(got, wanted, err_msg=stage)


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


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--num_processes=2"], "--coordinator_address and --process_id missing"),
        (
            ["--coordinator_address=here", "--num_processes=2", "--process_id=0"],
            "--coordinator_address=here should be host:port",
        ),
        (
            ["--coordinator_address=localhost:1", "--num_processes=2", "--process_id=2"],
            "--process_id=2 should be below --num_processes=2",
        ),
    ],
)
def test_flags_that_do_not_fit_are_one_line(tmp_path, flags, message):
    (process,) = start(tmp_path / "run", 1, 1, *flags)
    _, log = process.communicate(timeout=60)
    assert process.returncode == 2 and log.startswith("error: ") and message in log
    assert not (tmp_path / "run").exists()
