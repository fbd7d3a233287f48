"""The notebook, executed for real; its run is the one whose figures configs/tiny.py promises."""

import contextlib
import copy
import glob
import importlib.machinery
import importlib.util
import json
import os
import pathlib
import subprocess
import sys
import time
from pathlib import Path

import jupyter_client
import nbclient
import nbformat
import pytest

REPOSITORY = Path(__file__).parents[2]
NOTEBOOK = REPOSITORY / "launch/colab.ipynb"


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def source(notebook, cell_id):
    return next(cell.source for cell in notebook.cells if cell.id == cell_id)


def test_the_notebook_is_valid_and_carries_no_output(notebook):
    nbformat.validate(notebook)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            assert cell.outputs == [] and cell.execution_count is None
            compile(cell.source, cell.id, "exec")
    assert notebook.metadata.accelerator == "TPU"


@contextlib.contextmanager
def kernel(folder, **environment):
    """A kernel as a user has it: without the settings that let tests compile faster, and train slower."""
    inherited = {name: value for name, value in os.environ.items() if not name.startswith(("XLA_", "JAX_DISABLE"))}
    environment = inherited | {"PYTHONPATH": str(REPOSITORY)} | environment
    manager, client = jupyter_client.manager.start_new_kernel(cwd=str(folder), env=environment)
    try:
        yield manager, client
    finally:
        client.stop_channels()
        manager.shutdown_kernel(now=True)


def execute(client, code, on_text=lambda text: None):
    """Runs a cell: what it printed, and its error as (name, lines shown), None if there was none."""
    printed, errors = [], []

    def collect(message):
        content = message["content"]
        if message["msg_type"] == "stream":
            printed.append(content["text"])
            on_text(content["text"])
        elif message["msg_type"] == "error":
            errors.append((content["ename"], content["traceback"]))

    client.execute_interactive(code, timeout=600, output_hook=collect)
    return "".join(printed), errors[0] if errors else None


def test_too_little_memory_is_said_in_one_line(notebook, tmp_path):
    with kernel(tmp_path) as (_, client):
        printed, error = execute(client, source(notebook, "memory"))
        assert error is None and printed.endswith("GB of free memory\n")
        _, error = execute(client, 'check_memory("MemTotal: 16000000 kB\\nMemAvailable:    1048576 kB\\n")')
    name, shown = error
    assert name == "TooLittleMemory"
    assert shown == ["this runtime has 1.0 GB of free memory, 3 are needed: choose a larger one"]


@pytest.mark.smoke
def test_a_short_run_goes_on_when_its_cell_was_interrupted_and_fills_every_cell(notebook, tmp_path):
    def interrupt(text):
        if "k1          step     25/" in text:
            manager.interrupt_kernel()

    compiled_fast = {name: value for name, value in os.environ.items() if name.startswith(("JAX_DISABLE", "XLA_"))}
    with kernel(tmp_path, KFORCING_COLAB_STEPS="30", **compiled_fast) as (manager, client):
        for cell in ("memory", "install", "device"):
            assert execute(client, source(notebook, cell))[1] is None
        printed, error = execute(client, source(notebook, "train"), on_text=interrupt)
        assert error[0] == "KeyboardInterrupt" and "k1          done" not in printed
        outputs = run_all(notebook, manager, client)
    printed = "".join(output.text for output in outputs["train"] if output.output_type == "stream")
    assert "ar          finished, skipped" in printed and "k1          goes on from step" in printed
    assert "k1          done" in printed and "vs AR" in printed


def run_all(notebook, manager, client):
    """The outputs of every cell, executed in order, by its name: none failed, and what is to be seen is there."""
    notebook = copy.deepcopy(notebook)
    nbclient.NotebookClient(notebook, timeout=1200, km=manager, kc=client).execute()
    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    assert not any(output.output_type == "error" for cell in outputs.values() for output in cell)
    table = next(output.data["text/html"] for output in outputs["compare"] if "text/html" in output.get("data", {}))
    for stage in ("ar", "k1", "k2", "k4"):
        assert table.count(f"<td>{stage}</td>") == 3
    for cell in ("curves", "figures"):
        assert any("image/png" in output.get("data", {}) for output in outputs[cell])
    assert "<mark>" in table and "10 passes" in table and "40 passes" in table
    return outputs


@pytest.fixture
def bare_runtime(monkeypatch, tmp_path):
    """A folder without the package, and the commands that were run in it; what git would clone is a package."""
    called = []

    def run(command, check):
        assert check
        called.append(command)
        if command[0] == "git":
            package = Path(command[-1]) / "kforcing_jax"
            package.mkdir(parents=True)
            (package / "__init__.py").write_text("")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    return called


def install(notebook):
    exec(source(notebook, "install"), {"pathlib": pathlib})


@pytest.mark.parametrize(("device", "extra"), [("", ""), ("/dev/accel", "[tpu]"), ("/dev/nvidia", "[cuda]")])
def test_a_bare_runtime_clones_and_installs_for_its_device(
    notebook, bare_runtime, tmp_path, monkeypatch, device, extra
):
    monkeypatch.setattr(glob, "glob", lambda pattern: [f"{device}0"] if device and pattern.startswith(device) else [])
    install(notebook)
    clone, pip = bare_runtime
    assert clone[:2] == ["git", "clone"]
    assert pip[-2:] == ["-e", f"./kforcing_jax{extra}"]
    assert [path.name for path in tmp_path.iterdir()] == ["kforcing_jax"]


def test_an_interrupted_installation_is_done_again(notebook, bare_runtime, tmp_path, monkeypatch):
    run = subprocess.run

    def interrupted(command, check):
        run(command, check)
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "run", interrupted)
    with pytest.raises(KeyboardInterrupt):
        install(notebook)
    assert list(tmp_path.iterdir()) == []
    monkeypatch.setattr(subprocess, "run", run)
    install(notebook)
    # A clone that was not installed is a folder on the path: found, but not as the package.
    found = importlib.machinery.ModuleSpec("kforcing_jax", None, is_package=True)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: found)
    install(notebook)
    assert [command[0] for command in bare_runtime] == ["git", "git", sys.executable, sys.executable]


@pytest.mark.full
def test_the_whole_notebook_runs_in_time_and_its_students_follow_their_teacher(notebook, tmp_path):
    with kernel(tmp_path) as (manager, client):
        start = time.monotonic()
        run_all(notebook, manager, client)
        minutes = (time.monotonic() - start) / 60
    assert (tmp_path / "runs/tiny/report.html").stat().st_size > 10_000
    assert minutes < 12
    stages = json.loads((tmp_path / "runs/tiny/summary.json").read_text())["stages"]
    k1, k4, ar = stages["k1"], stages["k4"], stages["ar"]
    assert k1["agreement"][0] >= max(0.6, 1.8 * k1["chance"][0])
    for agreement, chance in zip(k4["agreement"], k4["chance"], strict=True):
        assert agreement >= 1.15 * chance
    assert abs(k1["sample_entropy"] / ar["sample_entropy"] - 1) <= 0.1
