"""The notebook: what it carries, what its cells do, and all of it executed for real."""

import contextlib
import copy
import glob
import importlib.machinery
import importlib.util
import json
import os
import pathlib
import re
import runpy
import subprocess
import sys
import time
import types
from pathlib import Path

import jupyter_client
import nbclient
import nbformat
import pytest

from kforcing_jax.cli.config_file import read_config
from kforcing_jax.errors import RunError

REPOSITORY = Path(__file__).parents[2]
NOTEBOOK = REPOSITORY / "launch/colab.ipynb"
STAGES = ("ar", "k1", "k2", "k4", "k8")
WAYS = ("ar", "confident", "exact", "whole k8")


@pytest.fixture(scope="module")
def notebook():
    return nbformat.read(NOTEBOOK, as_version=4)


def code_cells(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def source(notebook, cell_id):
    return next(cell.source for cell in notebook.cells if cell.id == cell_id)


def texts(outputs, kind="text/plain"):
    """What a cell printed and displayed, as one text; without what images hold."""
    parts = [output.get("text", "") or output.get("data", {}).get(kind, "") for output in outputs]
    return re.sub(r"base64,[\w+/=]+", "", "\n".join(parts))


def test_the_stored_outputs_are_those_of_one_whole_run(notebook):
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    check_outputs({cell.id: cell.outputs for cell in cells})
    figures, config = texts(next(cell.outputs for cell in cells if cell.id == "results")), read_config("tiny", {})
    for stage in STAGES:
        steps = re.search(rf"^{stage} +([\d,]+) ", figures, re.M)
        assert steps, stage
        assert int(steps[1].replace(",", "")) == config.stages[stage].steps, "configs/tiny.py changed: run it again"


def test_the_stored_outputs_say_nothing_of_the_machine_and_stay_small(notebook):
    for cell in code_cells(notebook):
        for kind in ("text/plain", "text/html"):
            said = texts(cell.outputs, kind)
            assert not re.search(r"(?<![\w.:/])/(?:home|root|tmp|usr|opt|mnt|var|work|content|Users)\b", said), cell.id
            assert "Warning" not in said and "Traceback" not in said and "localhost" not in said
        assert not any(output.get("name") == "stderr" for output in cell.outputs)
    assert NOTEBOOK.stat().st_size < 1_000_000  # see .pre-commit-config.yaml


def test_the_badge_opens_this_file(notebook):
    opened = "https://colab.research.google.com/github/kforcing/kforcing_jax/blob/main/launch/colab.ipynb"
    assert f"({opened})" in source(notebook, "title")


def test_links_and_pictures_are_files_of_the_repository(notebook):
    linked = re.findall(
        r"kforcing/kforcing_jax/(?:blob/)?main/([\w./-]+)",
        "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown"),
    )
    assert len(linked) > 5
    assert [path for path in linked if not (REPOSITORY / path).exists()] == []


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
    """Runs a cell: what it printed or displayed, and its error as (name, lines shown), None if there was none."""
    printed, errors = [], []

    def collect(message):
        content = message["content"]
        if message["msg_type"] in ("stream", "display_data", "update_display_data"):
            text = content.get("text") or content["data"].get("text/plain", "")
            printed.append(text)
            on_text(text)
        elif message["msg_type"] == "error":
            errors.append((content["ename"], content["traceback"]))

    client.execute_interactive(code, timeout=600, output_hook=collect)
    return "".join(printed), errors[0] if errors else None


def test_too_little_memory_is_said_in_one_line(notebook):
    cell = source(notebook, "device")
    names = {"NEEDED_GB": 3, "RunError": RunError}
    exec(cell[cell.index("def check_memory") : cell.index("if pathlib")], names)
    names["check_memory"]("MemTotal: 16000000 kB\nMemAvailable:    4194304 kB\n")
    with pytest.raises(RunError, match=r"^this runtime has 1.0 GB of free memory, 3 are needed"):
        names["check_memory"]("MemTotal: 16000000 kB\nMemAvailable:    1048576 kB\n")


@pytest.mark.smoke
def test_a_short_run_goes_on_when_its_cell_was_interrupted_and_fills_every_cell(notebook, tmp_path):
    interrupted = []

    def interrupt(text):
        if "k1          compiling the training step" in text and not interrupted:  # the signal waits for that
            interrupted.append(text)
            manager.interrupt_kernel()

    notebook = with_steps(notebook, 30)
    compiled_fast = {name: value for name, value in os.environ.items() if name.startswith(("JAX_DISABLE", "XLA_"))}
    with kernel(tmp_path, **compiled_fast) as (manager, client):
        for cell in ("install", "device", "drive"):
            assert execute(client, source(notebook, cell))[1] is None
        printed, error = execute(client, source(notebook, "train"), on_text=interrupt)
        name, shown = error
        assert name == "RunError" and len(shown) == 1 and "run the cell again" in shown[0]
        assert "k1          done" not in printed
        outputs = run_all(notebook, manager, client)
    lines = texts(outputs["train"])
    assert "ar          finished, skipped" in lines and "k1          goes on from step" in lines
    assert "k1          done" in lines and lines.count("k8          step") == 1
    assert (tmp_path / "runs/tiny-30/report.html").exists()


def with_steps(notebook, steps):
    """The notebook with so many steps of every stage."""
    notebook = copy.deepcopy(notebook)
    cell = next(cell for cell in notebook.cells if cell.id == "train")
    assert cell.source.count("STEPS = 0") == 1
    cell.source = cell.source.replace("STEPS = 0", f"STEPS = {steps}")
    return notebook


def run_all(notebook, manager, client):
    """The outputs of every cell, executed in order, by its name."""
    notebook = copy.deepcopy(notebook)
    nbclient.NotebookClient(notebook, timeout=2400, km=manager, kc=client).execute()
    outputs = {cell.id: cell.outputs for cell in code_cells(notebook)}
    check_outputs(outputs)
    return outputs


def check_outputs(outputs):
    """No cell failed, and each shows what is to be seen."""
    assert all(outputs.values())
    assert not any(output.output_type == "error" for cell in outputs.values() for output in cell)
    assert texts(outputs["results"], "text/html").count("<tr><th>") == 1 + len(STAGES)
    assert "k8 c=0.3" in texts(outputs["tradeoff"])
    for cell in ("curves", "tradeoff"):
        assert any("image/png" in output.get("data", {}) for output in outputs[cell])
    assert "<iframe srcdoc=" in texts(outputs["report"], "text/html")
    check_ways(outputs)


def check_ways(outputs):
    """Four ways to decode each prompt: the exact one gives the teacher's text, whole windows take the fewest passes."""
    prompts = texts(outputs["generate"]).split("Prompt (noise seed ")[1:]
    assert len(prompts) == 3
    for prompt in prompts:
        written = {way: re.search(rf"^{way}  (.*)$", re.sub(r" +(?=  )", "", prompt), re.M)[1] for way in WAYS[:3]}
        assert written["exact"] == written["ar"]
        passes = dict(re.findall(r"([a-z][a-z0-9 ]*) (\d+)(?:,|$)", prompt.split("passes: ")[1].strip()))
        assert int(passes["ar"]) == 44 and int(passes["whole k8"]) == 6
    assert texts(outputs["windows"], "text/html").count("<tr>") == 1 + len(WAYS)


@pytest.fixture
def bare_runtime(monkeypatch, tmp_path):
    """A folder without the package, and what was called in it; what git would clone is a package."""
    called = []

    def run(command, check):
        called.append(command[0])
        package = Path(command[-1]) / "kforcing_jax"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(subprocess, "run", run)
    monkeypatch.setattr(runpy, "run_path", lambda path, run_name: called.append(path))
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    return called


def install(notebook):
    exec(source(notebook, "install"), {})


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
    script = "kforcing_jax/launch/install.py"
    assert bare_runtime == ["git", "git", script, script]
    assert (REPOSITORY / script.partition("/")[2]).exists()


@pytest.fixture
def colab(monkeypatch):
    """The parts of google.colab that the notebook uses, and the folders that were mounted."""
    mounted = []
    drive = types.SimpleNamespace(mount=mounted.append)
    files = types.SimpleNamespace(upload=lambda: {"a novel.txt": b"Once upon a time.", "other.txt": b"And then."})
    module = types.SimpleNamespace(drive=drive, files=files)
    monkeypatch.setitem(sys.modules, "google.colab", module)
    return mounted


def test_runs_are_kept_in_drive_where_that_is_wanted(notebook, colab):
    cell = source(notebook, "drive")
    for wanted, runs in (("False", "runs"), ("True", "/content/drive/MyDrive/kforcing_jax/runs")):
        names = {"pathlib": pathlib}
        exec(cell.replace("DRIVE = False", f"DRIVE = {wanted}"), names)
        assert names["RUNS"] == Path(runs)
    assert colab == ["/content/drive"]


def test_uploaded_text_is_trained_on_with_a_quarter_of_the_steps(notebook, colab, tmp_path):
    trained = []

    def train(name, settings):
        trained.append((name, read_config("tiny", settings)))
        return None, {}

    names = {"pathlib": pathlib, "RUNS": tmp_path / "runs", "STAGES": STAGES, "read_config": read_config}
    names |= {"train": train, "show_stages": print, "samples_text": str}
    cell = source(notebook, "mine")
    exec(cell, names)
    assert trained == []
    exec(cell.replace("UPLOAD = False", "UPLOAD = True"), names)
    ((name, config),) = trained
    assert name == "mine" and config.data.source == "text_files"
    assert config.stages["k1"].steps == read_config("tiny", {}).stages["k1"].steps // 4
    assert sorted(Path(path).name for path in glob.glob(config.data.path)) == ["a novel.txt", "other.txt"]


@pytest.mark.full
def test_the_whole_notebook_runs_in_time_and_its_students_follow_their_teacher(notebook, tmp_path):
    with kernel(tmp_path) as (manager, client):
        start = time.monotonic()
        run_all(notebook, manager, client)
        minutes = (time.monotonic() - start) / 60
    assert (tmp_path / "runs/tiny/report.html").stat().st_size > 10_000
    assert minutes < 20
    stages = json.loads((tmp_path / "runs/tiny/summary.json").read_text())["stages"]
    k1, ar = stages["k1"], stages["ar"]
    assert k1["agreement"][0] >= max(0.6, 1.8 * k1["chance"][0])
    for name in ("k4", "k8"):
        for agreement, chance in zip(stages[name]["agreement"], stages[name]["chance"], strict=True):
            assert agreement >= 1.15 * chance
    assert abs(k1["sample_entropy"] / ar["sample_entropy"] - 1) <= 0.1
