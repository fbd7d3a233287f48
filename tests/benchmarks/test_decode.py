"""The benchmark of decoding: programs in turns, and figures with what they are compared to."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

from kforcing_jax.decoding.costs import pass_cost
from kforcing_jax.decoding.passes import Models
from kforcing_jax.models import CausalLM, ModelConfig, PushForwardLM

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "decode.py"
SMALL = ("--shape=1,16,2,13", "--batches=1,2", "--contexts=24", "--new_tokens=8", "--rounds=1")


def test_the_last_line_is_one_object_with_device_date_and_hashes(tmp_path):
    plot = tmp_path / "speed.svg"
    command = [sys.executable, str(BENCHMARK), *SMALL, "--json", f"--plot={plot}"]
    done = subprocess.run(command, cwd=BENCHMARK.parents[1], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert "cpu" in report["device"] and len(report["date"]) == 10 and "decode.py" in report["command"]
    assert [result["batch"] for result in report["results"]] == [1, 2]
    for result in report["results"]:
        figures = result["programs"]
        assert {name: each["passes"] for name, each in figures.items()} == {"ar": 8, "k2": 4, "k4": 2}
        assert figures["ar"]["speed_up"]["median"] == 1
        assert all(len(each["tokens_sha256"]) == 16 for each in figures.values())
    assert "k = 4 stops paying" in done.stderr and plot.read_text().count("k4")


def test_a_gated_student_is_exact_in_all_forms_before_a_ratio_is_told():
    command = [sys.executable, str(BENCHMARK), *SMALL, "--rank=2", "--batches=1", "--json"]
    done = subprocess.run(command, cwd=BENCHMARK.parents[1], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])["results"][0]["programs"]
    forms = ["exact", "exact-2", "exact-1", "exact-0", "exact-apart"]
    assert list(figures) == ["ar", "k2", "k4", *forms]
    assert {figures[name]["tokens_sha256"] for name in forms} == {figures["ar"]["tokens_sha256"]}
    assert figures["exact-0"]["passes"] == figures["exact-apart"]["passes"]
    flops = [figures[name]["pass_over_ar"]["flops"] for name in forms]
    assert flops[0] > flops[1] > flops[2] > 1 and flops[4] > flops[3] > 1
    assert figures["exact-apart"]["bytes_a_pass"] > figures["exact"]["bytes_a_pass"]


def test_what_a_pass_of_a_gated_student_costs_by_hand():
    cfg = ModelConfig(vocab_size=10, mask_id=9, num_layers=1, d_model=4, num_heads=2, adapter_rank=1)
    models = Models(PushForwardLM(cfg), None, 2, exact_windows=2)
    ar = pass_cost(models, "ar", slots=3, live=5)
    assert ar.flops == 3 * (2 * 12 * 16 + 2 * 4 * 10 + 4 * 4 * 5)
    # Two known rows and two windows of two; the first row of a window gives keys and values only.
    exact = pass_cost(models, "exact", slots=1, live=5)
    blocks = 2 * (12 * 16 * 4 + 3 * 16 * 2) + 4 * 4 * 5 * 4
    deltas = 2 * 4 * (3 * (4 + 4) + (4 + 4) + 2 * (4 + 16))
    heads = 2 * 4 * 4 * 10 + 2 * (4 + 10)
    assert exact.flops == blocks + deltas + heads + 2 * 4 * 9 * 16
    assert exact.bytes > ar.bytes / 3
    # Of many texts only the windows that are used pass the output layer, after the draws.
    more = pass_cost(models, "exact", slots=8, live=5)
    assert more.flops == 8 * (exact.flops - 2 * 4 * 10)
    assert more.bytes == exact.bytes + 4 * 4 * 10 + 7 * 2 * 5 * 4 * 4


def test_what_a_pass_costs_by_hand():
    cfg = ModelConfig(vocab_size=10, mask_id=9, num_layers=1, d_model=4, num_heads=2)
    models = Models(PushForwardLM(cfg), CausalLM(cfg), 2)
    ar = pass_cost(models, "ar", slots=3, live=5)
    assert ar.flops == 3 * (2 * 12 * 16 + 2 * 4 * 10 + 4 * 4 * 5)
    assert ar.bytes == 4 * (12 * 16 + 4 * 10 + 2 * 3 * 5 * 4)
    half = CausalLM(dataclasses.replace(cfg, weights_dtype="bfloat16"))  # products of f32, an output layer of bf16
    assert pass_cost(Models(None, half, 1), "ar", slots=3, live=5).bytes == ar.bytes - 2 * 4 * 10
    student = pass_cost(models, "student", slots=1, live=5)
    # Of 2 known rows keys, values and queries; of 2 noise rows everything, their encoder too.
    assert student.flops == 2 * (2 * 12 * 16 + 2 * 3 * 16 + 2 * 4 * 10 + 2 * 9 * 16) + 4 * 4 * 5 * 2
    exact = pass_cost(models, "exact", slots=1, live=5)
    assert exact.bytes > ar.bytes / 3 + student.bytes / 3
