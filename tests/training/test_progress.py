"""What a report says: rates, shares of a device's peak, the time left, numbers that are none."""

import json
import math
import re

import pytest

from kforcing_jax.errors import RunError
from kforcing_jax.training import spent as spent_module
from kforcing_jax.training.flops import peak_teraflops
from kforcing_jax.training.progress import StageLog, Workload, shortened
from kforcing_jax.training.spent import PARTS, Spent
from kforcing_jax.training.trackers import Trackers


class Clock:
    def __init__(self):
        self.now = 100.0

    def monotonic(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(spent_module, "time", clock)
    return clock


def make_log(tmp_path, spent, workload=None, steps=100, trackers=None, spacings=None):
    workload = workload or Workload(tokens=50)
    return StageLog(tmp_path / "metrics.jsonl", "k1", 0, steps, workload, spent, trackers or Trackers(), spacings)


def records(tmp_path):
    return [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]


def steps(log, clock, first, last, seconds):
    for step in range(first, last + 1):
        clock.now += seconds
        log.add(step, {"loss": 1.0 * step, "grad_norm": 1.0})


def test_compiling_validating_and_saving_are_in_no_rate(tmp_path, clock):
    spent = Spent()
    log = make_log(tmp_path, spent)
    for part, seconds in (("compiling", 1000), ("validating", 30), ("saving", 20)):
        with spent.on(part):
            clock.now += seconds
    steps(log, clock, 1, 10, seconds=2)
    log.report(10, {})
    (record,) = records(tmp_path)
    assert record["tokens_per_second"] == 25 and record["loss"] == 5.5
    assert [record[f"seconds_{part}"] for part in PARTS] == [1000, 0, 20, 30, 20]


def test_the_time_left_leaves_compilation_out_and_expects_as_much_saving_and_validating_as_so_far(
    tmp_path, clock, caplog
):
    caplog.set_level("INFO", "kforcing_jax")
    spent = Spent()
    log = make_log(tmp_path, spent)
    with spent.on("compiling"):
        clock.now += 1000
    steps(log, clock, 1, 10, seconds=2)
    log.report(10, {})
    assert caplog.messages[-1].endswith("ETA 3:00")  # 90 steps of 2 s
    for part, seconds in (("validating", 15), ("saving", 5)):
        with spent.on(part):
            clock.now += seconds
    steps(log, clock, 11, 20, seconds=2)
    log.report(20, {})
    assert caplog.messages[-1].endswith("ETA 4:00")  # 80 steps of 2 s, and 1 s a step beside them


def test_validations_that_come_oftener_than_checkpoints_are_expected_as_often(tmp_path, clock, caplog):
    caplog.set_level("INFO", "kforcing_jax")
    spent = Spent()
    log = make_log(tmp_path, spent, steps=1000, spacings={"validating": 25, "saving": 500})
    for first in (1, 26):
        steps(log, clock, first, first + 24, seconds=0.1)
        with spent.on("validating"):
            clock.now += 3
        log.report(first + 24, {})
    assert caplog.messages[-1].endswith("ETA 3:29")  # 950 steps of .1 s and 38 validations, no checkpoint yet


def test_the_share_of_peak_is_of_one_device(tmp_path, clock, caplog):
    caplog.set_level("INFO", "kforcing_jax")
    workload = Workload(50, 8e12, 4, 10.0, lambda step: 0.1 * step)
    log = make_log(tmp_path, Spent(), workload)
    steps(log, clock, 1, 5, seconds=0.5)
    log.report(5, {})
    (record,) = records(tmp_path)
    assert (record["teraflops_per_device"], record["peak_share"], record["learning_rate"]) == (4.0, 0.4, 0.4)
    assert "100 tokens/s  40% of peak  ETA" in caplog.messages[-1]


def test_where_the_peak_is_not_known_none_is_said(tmp_path, clock, caplog):
    caplog.set_level("INFO", "kforcing_jax")
    log = make_log(tmp_path, Spent(), Workload(50, 8e12, 4, peak_teraflops("cpu")))
    steps(log, clock, 1, 5, seconds=0.5)
    log.report(5, {})
    assert records(tmp_path)[0]["peak_share"] is None and "of peak" not in caplog.text


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        ("TPU v4", 275),
        ("TPU v5 lite", 197),
        ("TPU v5p", 459),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("cpu", None),
        ("NVIDIA GeForce RTX 4090", None),
    ],
)
def test_peaks_are_found_by_the_names_that_devices_have(kind, expected):
    assert peak_teraflops(kind) == expected


def test_time_of_a_report_is_in_utc(tmp_path, clock):
    log = make_log(tmp_path, Spent())
    steps(log, clock, 1, 1, seconds=1)
    log.report(1, {})
    assert re.fullmatch(r"20\d\d-\d\d-\d\dT\d\d:\d\d:\d\dZ", records(tmp_path)[0]["time"])


def test_a_validation_is_joined_with_the_report_of_its_step_and_said(tmp_path, clock, caplog):
    caplog.set_level("INFO", "kforcing_jax")
    log = make_log(tmp_path, Spent())
    steps(log, clock, 1, 1, seconds=1)
    found = {"validation_loss": 2.5, "validation_agreement_1": 0.5, "validation_block_agreement": 0.25}
    log.report(1, found | {"sample": f"to be\n\n{'or not ' * 50}"})
    (record,) = records(tmp_path)
    assert found.items() <= record.items() and len(record["sample"]) > 300
    assert caplog.messages[1] == "k1          validation loss 2.5000  agreement with ar 0.50  block 0.25"
    assert caplog.messages[2].startswith("k1          sample: to be or not") and len(caplog.messages[2]) < 120


def test_what_is_no_number_is_null_in_json(tmp_path, clock):
    log = make_log(tmp_path, Spent())
    clock.now += 1
    log.add(1, {"loss": 1.0, "grad_norm": 1.0, "loss_1": math.nan, "agreement_1": math.inf})
    log.report(1, {"validation_loss": math.nan})
    (record,) = records(tmp_path)
    assert record["loss_1"] is record["agreement_1"] is record["validation_loss"] is None


def test_a_loss_that_is_no_number_stops_the_stage(tmp_path, clock):
    log = make_log(tmp_path, Spent())
    log.add(3, {"loss": math.inf, "grad_norm": 1.0})
    with pytest.raises(RunError, match="stage k1, step 3: loss is inf"):
        log.check()


def test_trackers_are_told_numbers_and_texts_of_the_record(tmp_path, clock):
    told = []

    class Told:
        def write(self, *arguments):
            told.append(arguments)

        def close(self):
            pass

    log = make_log(tmp_path, Spent(), trackers=Trackers({"told": Told()}))
    steps(log, clock, 1, 1, seconds=1)
    log.report(1, {"validation_loss": math.nan, "sample": "to be"})
    ((stage, step, scalars, texts),) = told
    assert (stage, step, texts) == ("k1", 1, {"sample": "to be"})
    assert scalars["loss"] == 1 and scalars.keys().isdisjoint({"stage", "step", "time", "validation_loss"})


def test_seconds_go_on_from_those_before_an_interruption(clock):
    spent = Spent()
    spent.go_on_from(70.0, {"compiling": 30.0, "stepping": 40.0})
    with spent.on("compiling"):
        clock.now += 5
    clock.now += 2
    assert spent.parts == {"compiling": 35, "restoring": 0, "saving": 0, "validating": 0, "stepping": 42}
    assert spent.total == 77


def test_seconds_of_checkpoints_that_did_not_tell_them_apart_are_those_of_steps(clock):
    spent = Spent()
    spent.go_on_from(70.0)
    assert spent.parts["stepping"] == 70


@pytest.mark.parametrize(
    ("text", "expected"), [("a\n  b", "a b"), ("abcdefghij", "abcdefghij"), ("abcdefghijk", "abcdefghi…")]
)
def test_a_sample_is_shortened_to_one_line(text, expected):
    assert shortened(text, 10) == expected
