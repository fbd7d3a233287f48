"""The benchmark compares like with like, and ends with what it measured."""

import json
import subprocess
import sys
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from dense_mask import mask_attention

from kforcing_jax.models.attention import group_attention
from kforcing_jax.models.keys import Causal, KeyValue

BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "train_step.py"
SMALL = ("--lengths=32", "--ks=1,2", "--tokens=64", "--num_layers=1", "--d_model=32", "--num_heads=2", "--repeats=1")


def test_the_dense_mask_computes_what_windows_compute(rng):
    q, k, v = (jnp.asarray(rng.normal(size=(2, 6, 3, 2, 4)), jnp.float32) for _ in range(3))
    inputs = (q, KeyValue(k[:, :, 1:], v[:, :, 1:]), KeyValue(k[:, :, 0], v[:, :, 0]), Causal())
    np.testing.assert_allclose(mask_attention(*inputs), group_attention(*inputs), atol=1e-5)


def test_the_last_line_is_one_object_with_device_and_date():
    command = [sys.executable, str(BENCHMARK), *SMALL, "--json"]
    done = subprocess.run(command, cwd=BENCHMARK.parents[1], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout.splitlines()[-1])
    assert "cpu" in report["device"] and len(report["date"]) == 10
    assert [(r["length"], r["k"]) for r in report["results"]] == [(32, 1), (32, 2)]
    for result in report["results"]:
        assert all(seconds > 0 for seconds in result["seconds"].values())
        assert result["attention_flops_over_needed"]["dense"] > result["attention_flops_over_needed"]["windows"] > 0.9
