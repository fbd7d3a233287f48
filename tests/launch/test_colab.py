"""The notebook, executed for real; its run is the one whose figures configs/tiny.py promises."""

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

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


def test_too_little_memory_ends_with_one_line(notebook):
    names = {"pathlib": __import__("pathlib"), "print": lambda *_: None}
    exec(source(notebook, "memory"), names)
    enough = "MemTotal: 16000000 kB\nMemAvailable:    4194304 kB\n"
    assert names["check_memory"](enough) == 4
    with pytest.raises(
        SystemExit, match=r"^this runtime has 1\.0 GB of free memory, 3 are needed: choose a larger one$"
    ):
        names["check_memory"](enough.replace("4194304", "1048576"))


@pytest.mark.parametrize(("device", "extra"), [("cpu", ""), ("tpu", "[tpu]"), ("gpu", "[cuda]")])
def test_a_bare_runtime_clones_and_installs_for_its_device(notebook, tmp_path, monkeypatch, device, extra):
    called = []

    def run(command, check):
        called.append(command)
        if command[0] == "git":
            (tmp_path / "kforcing_jax" / "kforcing_jax").mkdir(parents=True)
            (tmp_path / "kforcing_jax" / "kforcing_jax" / "__init__.py").write_text('__version__ = "0"')

    import glob
    import importlib.util

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(glob, "glob", lambda pattern: ["/dev/accel0"] if device == "tpu" and "accel" in pattern else [])
    monkeypatch.setattr(shutil, "which", lambda name: "/usr/bin/nvidia-smi" if device == "gpu" else None)
    exec(source(notebook, "install"), {})
    clone, install = called
    assert clone[:2] == ["git", "clone"] and clone[-1] == "kforcing_jax"
    assert install[-2:] == ["-e", f"./kforcing_jax{extra}"]


@pytest.mark.slow
def test_the_whole_notebook_runs_in_time_and_its_students_follow_their_teacher(notebook, tmp_path):
    nbclient = pytest.importorskip("nbclient")
    # As a user's kernel: without the settings that make other tests compile faster, and this one train slower.
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("XLA_", "JAX_DISABLE"))}
    client = nbclient.NotebookClient(
        notebook, timeout=1200, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    )
    start = time.monotonic()
    client.execute(env=environment | {"PYTHONPATH": str(REPOSITORY)})
    minutes = (time.monotonic() - start) / 60
    _check_outputs(notebook)
    _check_figures(json.loads((tmp_path / "runs/tiny/summary.json").read_text())["stages"])
    assert (tmp_path / "runs/tiny/report.html").stat().st_size > 10_000
    assert minutes < 12


def _check_outputs(notebook):
    outputs = {cell.id: cell.outputs for cell in notebook.cells if cell.cell_type == "code"}
    assert not any(output.output_type == "error" for cell in outputs.values() for output in cell)
    table = next(output.data["text/html"] for output in outputs["compare"] if "text/html" in output.get("data", {}))
    for stage in ("ar", "k1", "k2", "k4"):
        assert table.count(f"<td>{stage}</td>") == 3
    for cell in ("curves", "figures"):
        assert any("image/png" in output.get("data", {}) for output in outputs[cell])
    assert "<mark>" in table and "10 passes" in table and "40 passes" in table


def _check_figures(stages):
    k1, k4, ar = stages["k1"], stages["k4"], stages["ar"]
    assert k1["agreement"][0] >= max(0.6, 1.8 * k1["chance"][0])
    for agreement, chance in zip(k4["agreement"], k4["chance"], strict=True):
        assert agreement >= 1.15 * chance
    assert abs(k1["sample_entropy"] / ar["sample_entropy"] - 1) <= 0.1
