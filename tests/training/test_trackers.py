"""Trackers: what they write is read back; what is missing is said before compute, what fails later ends nothing."""

import json
import os
import struct
import subprocess
import sys
from typing import ClassVar

import pytest
from commands import run_command
from micro import CONFIG_FILE, micro_config_dict

from kforcing_jax.config import parse
from kforcing_jax.errors import ConfigError, RunError
from kforcing_jax.registry import TRACKERS
from kforcing_jax.training.trackers import TrackedRun, Trackers, check_trackers, open_trackers


class Fake:
    """Somebody's own tracker: `test_trackers:Fake`."""

    made: ClassVar[list] = []

    def __init__(self):
        self.run, self.reports, self.is_closed = None, [], False
        self.made.append(self)

    def start(self, run):
        self.run = run

    def write(self, stage, step, scalars, texts):
        self.reports.append((stage, step, dict(scalars), dict(texts)))

    def close(self):
        self.is_closed = True


class Failing(Fake):
    def write(self, *arguments):
        raise OSError(28, "No space left on device")

    def close(self):
        raise ConnectionError("no network")


class Unstartable(Fake):
    def start(self, run):
        raise ValueError("no key\nis given")


@pytest.fixture(autouse=True)
def own_module(monkeypatch):
    """As a user's file in the current folder is."""
    monkeypatch.setitem(sys.modules, "test_trackers", sys.modules[__name__])
    monkeypatch.setattr(Fake, "made", [])


@pytest.fixture
def tracked_run(tmp_path):
    return TrackedRun(tmp_path, "tiny", {"seed": 0})


def test_a_tracker_of_ones_own_is_told_of_the_run_its_reports_and_its_end(tracked_run):
    with open_trackers(["test_trackers:Fake"], tracked_run) as trackers:
        record = {"stage": "k1", "step": 4, "time": "2026-11-30", "loss": 2, "peak_share": None, "sample": "to be"}
        trackers.write("k1", 4, record)
    (fake,) = Fake.made
    assert fake.run == tracked_run and fake.is_closed
    assert fake.reports == [("k1", 4, {"loss": 2.0}, {"sample": "to be"})]


def test_a_tracker_that_fails_is_said_once_and_the_others_go_on(tracked_run, caplog):
    with open_trackers(["test_trackers:Failing", "test_trackers:Fake"], tracked_run) as trackers:
        trackers.write("k1", 1, {"loss": 2.0})
        trackers.write("k1", 2, {"loss": 1.0})
    assert [step for _, step, _, _ in Fake.made[1].reports] == [1, 2]
    assert caplog.text.count("tracker test_trackers:Failing fails ([Errno 28] No space left on device)") == 1
    assert "no network" not in caplog.text and "training goes on" in caplog.text


def test_one_that_cannot_start_ends_the_run_in_one_line_and_closes_the_others(tracked_run):
    with pytest.raises(RunError, match=r"^tracker test_trackers:Unstartable cannot start: no key is given$"):
        open_trackers(["test_trackers:Fake", "test_trackers:Unstartable"], tracked_run)
    assert Fake.made[0].is_closed


@pytest.mark.parametrize(("name", "package"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_missing_package_is_one_line_with_what_installs_it(name, package, monkeypatch):
    monkeypatch.setitem(sys.modules, package, None)
    monkeypatch.delitem(sys.modules, TRACKERS[name].partition(":")[0], raising=False)
    expected = f"logging.trackers = {name} needs the package {package}; pip install 'kforcing-jax[{name}]'"
    with pytest.raises(ConfigError) as raised:
        check_trackers([name])
    assert str(raised.value) == expected


@pytest.mark.parametrize("name", ["tensorbord", "test_trackers:Missing", "nowhere:Tracker"])
def test_a_tracker_that_is_none_is_refused_by_name(name):
    config = micro_config_dict()
    config.logging.trackers = (name,)
    with pytest.raises(ConfigError, match=name.split(":")[-1]):
        check_trackers(parse(config).logging.trackers)


def test_without_trackers_nothing_happens():
    with Trackers() as trackers:
        trackers.write("k1", 1, {"loss": 1.0})


def events(folder):
    """Of all event files of a folder, the oldest file first: records are length, its checksum, data, its checksum."""
    from tensorboardX.proto.event_pb2 import Event

    for path in sorted(folder.glob("events.out.tfevents.*"), key=lambda path: path.name.split(".")[-1]):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            yield Event.FromString(content[12 : 12 + length])
            content = content[16 + length :]


def scalars(folder):
    return [
        (e.step, v.tag, v.simple_value) for e in events(folder) for v in e.summary.value if not v.HasField("tensor")
    ]


def test_tensorboard_has_a_curve_per_stage_and_the_sample(tracked_run):
    with open_trackers(["tensorboard"], tracked_run) as trackers:
        trackers.write("k1", 5, {"loss": 2.0, "sample": "to be"})
        assert scalars(tracked_run.folder / "tensorboard/k1") == [(5, "loss", 2.0)]  # at once, not at the end
        trackers.write("k2", 5, {"loss": 3.0})
    assert scalars(tracked_run.folder / "tensorboard/k2") == [(5, "loss", 3.0)]
    texts = [v.tensor.string_val for e in events(tracked_run.folder / "tensorboard/k1") for v in e.summary.value]
    assert [b"to be"] in [list(text) for text in texts]


def test_tensorboard_forgets_what_a_restart_repeats(tracked_run):
    for steps in ((5, 10), (10, 15)):
        with open_trackers(["tensorboard"], tracked_run) as trackers:
            for step in steps:
                trackers.write("k1", step, {"loss": 1.0 * step})
    starts = [e.step for e in events(tracked_run.folder / "tensorboard/k1") if e.HasField("session_log")]
    assert starts == [5, 10]


def test_tensorboard_survives_a_full_disk(tracked_run, caplog, monkeypatch):
    from kforcing_jax.training.trackers import tensorboard

    with open_trackers(["tensorboard"], tracked_run) as trackers:
        trackers.write("k1", 5, {"loss": 2.0})
        with monkeypatch.context() as patch:

            def full(*arguments):
                raise OSError(28, "No space left on device")

            patch.setattr(tensorboard.EventsWriter, "flush", full)
            trackers.write("k1", 10, {"loss": 1.5})
        trackers.write("k1", 15, {"loss": 1.0})
    assert scalars(tracked_run.folder / "tensorboard/k1")[-1] == (15, "loss", 1.0)
    assert "tracker tensorboard fails" in caplog.text


@pytest.mark.extras
def test_weights_and_biases_keeps_a_run_offline_and_goes_on_with_the_same_one(tmp_path):
    """The real package in a process of its own, which it leaves threads and children in."""
    pytest.importorskip("wandb")
    program = """
import sys
from pathlib import Path
from kforcing_jax.training.trackers import TrackedRun, open_trackers
first = int(sys.argv[2])
with open_trackers(["wandb"], TrackedRun(Path(sys.argv[1]), "tiny", {"seed": 3})) as trackers:
    for stage in ("ar", "k1"):
        for step in (first, first + 5):
            trackers.write(stage, step, {"loss": 1.0 * step, "sample": "<to be>"})
"""
    environment = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"}
    for first in (5, 10):
        command = [sys.executable, "-c", program, str(tmp_path), str(first)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0 and "fails" not in done.stderr, done.stderr
    run_id = (tmp_path / "wandb/run_id").read_text().strip()
    folders = sorted((tmp_path / "wandb").glob("offline-run-*"))
    assert len(folders) == 2 and all(folder.name.endswith(run_id) for folder in folders)
    history = wandb_history(folders[1])
    assert [(row["k1/step"], row["k1/loss"]) for row in history if "k1/step" in row] == [(10, 10.0), (15, 15.0)]
    assert all("ar/loss" not in row for row in history if "k1/step" in row)


def wandb_history(folder):
    """The rows of an offline run's log: blocks of 32 KiB after a header of 7 bytes, as LevelDB writes logs."""
    from wandb.proto.wandb_internal_pb2 import Record

    (path,) = folder.glob("*.wandb")
    content, at, data, rows = path.read_bytes(), 7, b"", []
    while at + 7 <= len(content):
        if 32768 - at % 32768 < 7:
            at += 32768 - at % 32768
        _, length, kind = struct.unpack("<IHB", content[at : at + 7])
        data, at = data + content[at + 7 : at + 7 + length], at + 7 + length
        if kind in (1, 4):  # whole, or the last part
            record, data = Record.FromString(data), b""
            items = record.history.item
            rows.append({item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items})
    return rows


def test_a_run_without_the_package_of_its_tracker_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    monkeypatch.delitem(sys.modules, TRACKERS["wandb"].partition(":")[0], raising=False)
    (tmp_path / "config.py").write_text(CONFIG_FILE)
    flags = f"--config={tmp_path / 'config.py'}", f"--workdir={tmp_path / 'run'}", "--config.logging.trackers=wandb"
    done = run_command("main", *flags)
    assert done.status == 2 and "pip install 'kforcing-jax[wandb]'" in done.err
    assert not (tmp_path / "run").exists()
