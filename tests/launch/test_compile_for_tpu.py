"""Compiling for TPUs that are not there: the attention kernels, and the command as a user runs it."""

import json
import math
import os
import re
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
import traffic
from hlo_programs import tpu_mesh
from jax.sharding import NamedSharding, PartitionSpec

from kforcing_jax.config import MeshConfig
from kforcing_jax.decoding.costs import pass_cost
from kforcing_jax.decoding.engine import programs_for
from kforcing_jax.decoding.passes import Models
from kforcing_jax.models import CausalLM, ModelConfig, PushForwardLM, splash
from kforcing_jax.models.attention import Causal, choose_implementation, group_attention
from kforcing_jax.models.keys import KeyValue
from kforcing_jax.sharding import make_mesh
from kforcing_jax.training.flops import attended_pairs

REPOSITORY = Path(__file__).parents[2]
CONFIG = """
from kforcing_jax.config import default_config, default_stage
def get_config():
    config = default_config()
    config.data.update(dict(source="text_files", path="missing.txt", tokenizer="bpe", vocab_size=1001, seq_len=256))
    config.model.update(dict(num_layers=2, d_model=128, num_heads=2))
    config.stages.unlock()
    config.stages.ar = default_stage(batch_size=32, bfloat16_fraction=1.0)
    config.stages.k1 = default_stage(window=1, batch_size=32, accumulation=2)
    return config.lock()
"""

pytestmark = pytest.mark.tpu_aot
pytest.importorskip("libtpu", reason="needs libtpu: pip install -e '.[tpu]'")


@pytest.mark.parametrize("length", [512, 1024, 2048])
@pytest.mark.parametrize("group", [1, 2, 3, 5])
def test_the_kernel_computes_at_most_1_3_times_the_pairs_that_are_needed(length, group):
    beside = length * group * max(group - 1, 0)
    assert splash.pairs(length, group) + beside <= 1.3 * attended_pairs(length, group)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("length, group, segmented", [(128, 2, True), (1024, 5, False), (1024, 1, False)])
def test_attention_over_a_text_compiles_as_a_kernel_in_little_memory(dtype, length, group, segmented):
    """Forward and backward on a mesh with every axis; temporaries a small part of one dense mask's scores."""
    batch, heads, width = 8, 4, 64
    mesh = make_mesh(MeshConfig(data=2, fsdp=2, tensor=2), list(tpu_mesh().devices.flat))
    rows = NamedSharding(mesh, PartitionSpec(("data", "fsdp")))

    def array(*shape, dtype=dtype):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=rows)

    q, text = array(batch, length, group, heads, width), KeyValue(*[array(batch, length, heads, width)] * 2)
    own = KeyValue(*[array(batch, length, group - 1, heads, width)] * 2)
    segments = array(batch, length, dtype="int32") if segmented else None

    compiled = compiled_kernels(mesh, q, own, text, segments)
    scores = heads * (length * group) ** 2 * 4
    arrays = 12 * length * group * heads * 2 * width * 4  # a dozen of the queries' size, padded to 128 lanes
    assert compiled.memory_analysis().temp_size_in_bytes < max(scores / 6, arrays)


def compiled_kernels(mesh, q, own, text, segments=None):
    """Attention and its gradients, which are computed by the kernels."""

    def loss(q, own, text, segments):
        precision = "highest" if q.dtype == "float32" else "default"
        return group_attention(q, own, text, Causal(segments), precision=precision).astype(jnp.float32).sum()

    with jax.set_mesh(mesh):
        assert choose_implementation(q, own, text, Causal(), None) == "splash"
        compiled = jax.jit(jax.grad(loss, argnums=(0, 1, 2))).lower(q, own, text, segments).compile()
    code = compiled.as_text()
    assert all(kernel in code for kernel in ("splash_mha_fwd", "splash_mha_dq", "splash_mha_dkv"))
    return compiled


@pytest.mark.parametrize("dtype, sharing", [("float32", 4), ("bfloat16", 8)])
def test_as_many_heads_over_the_same_keys_as_are_said_to_fit_do(dtype, sharing):
    """With four tokens a group, 16 rows a position in f32 and 32 in bfloat16. One more head does not fit in f32."""
    mesh = make_mesh(MeshConfig(data=1), list(tpu_mesh().devices.flat)[:1])

    def array(*shape):
        return jax.ShapeDtypeStruct(shape, dtype, sharding=NamedSharding(mesh, PartitionSpec()))

    text = KeyValue(*[array(1, 1024, 1, 128)] * 2)
    own = KeyValue(*[array(1, 1024, 3, 1, 128)] * 2)
    compiled_kernels(mesh, array(1, 1024, 4, sharing, 128), own, text)
    with jax.set_mesh(mesh):
        chosen = choose_implementation(array(1, 1024, 4, sharing + 1, 128), own, text, Causal(), None)
    assert chosen == "blockwise"


@pytest.mark.parametrize("mode", ["student", "ar"])
def test_a_pass_of_decoding_moves_weights_and_cache_once_and_copies_no_cache(mode):
    """Half a layer's cache is larger than what lies on the chip: 640 rows of 512 slots, 168 MB."""
    cfg = ModelConfig(vocab_size=256, mask_id=255, num_layers=2, d_model=256, num_heads=4, dtype="bfloat16")
    models = Models(PushForwardLM(cfg), None, 4) if mode == "student" else Models(None, CausalLM(cfg), 1)
    programs = programs_for(models, 640, 438, make_mesh(MeshConfig(data=1), list(tpu_mesh().devices.flat)[:1]))
    live = programs.live_for(438)
    caches = jax.tree.leaves(programs.state.caches)
    assert {cache.shape for cache in caches} == {(640, 2, 512, 128)}  # two heads of 64 side by side
    compiled = programs.compiled("run", mode, live)
    assert compiled.memory_analysis().temp_size_in_bytes <= 0.3 * sum(2 * cache.size for cache in caches)
    text = compiled.as_text()
    assert not re.findall(r"= bf16\[640,2,512,128\]\S* (?:copy|transpose)\(.*", text)
    moved = traffic.total(traffic.of_a_pass(text))
    assert 1 <= moved / pass_cost(models, mode, 640, live).bytes <= 1.25


def compile_for_tpu(tmp_path, *flags):
    (tmp_path / "config.py").write_text(CONFIG)
    command = [sys.executable, "launch/compile_for_tpu.py", f"--config={tmp_path / 'config.py'}", *flags]
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    environment.pop("XLA_FLAGS", None)
    return subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, timeout=600)


def test_the_command_reports_every_stage_and_compiles_once(tmp_path):
    done = compile_for_tpu(tmp_path, "--topology=v5e:2x4", "--json", "--config.mesh.fsdp=2")
    assert done.returncode == 0, done.stderr
    stages = json.loads(done.stdout.splitlines()[-1])["stages"]
    assert list(stages) == ["ar", "k1"]
    for stage in stages.values():
        assert stage["fits"] and 0 < stage["hbm_bytes"] < stage["hbm_limit"] < 2**34
        assert 1 < stage["flops"] / stage["model_flops"] < 2
        assert all(c["count"] > 0 and c["bytes"] > 0 for c in stage["collectives"].values())
        # Weights are gathered; logits, of which a single row has 256 * 1001, are not.
        largest = re.findall(r"\d+", stage["collectives"]["all-gather"]["largest"].partition("[")[2])
        assert math.prod(map(int, largest)) <= 1001 * 128
    assert (stages["ar"]["batch_per_device"], stages["ar"]["rows_at_a_time"]) == (4, 4)
    assert (stages["k1"]["batch_per_device"], stages["k1"]["rows_at_a_time"]) == (4, 2)
    assert [phase["dtype"] for phase in stages["ar"]["phases"]] == ["bfloat16"]

    results = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.json")}
    assert len(results) == 2
    table = compile_for_tpu(tmp_path, "--topology=v5e:2x4", "--config.mesh.fsdp=2")
    assert table.returncode == 0 and "ar " in table.stdout and "k1 " in table.stdout and "yes" in table.stdout
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.json")} == results


def test_decoding_is_reported_by_context_batch_and_mode(tmp_path):
    flags = "--topology=v5e:1x1", "--decode", "--batch=2", "--context=64", "--json"
    done = compile_for_tpu(tmp_path, *flags)
    assert done.returncode == 0, done.stderr
    ar, student = json.loads(done.stdout.splitlines()[-1])["decode"]
    assert (ar["k"], student["k"]) == (1, 1)  # the largest window of this config
    for report in ar, student:
        assert report["fits"] and (report["context"], report["batch"], report["live"]) == (64, 2, 128)
        assert report["tokens_per_second"] == pytest.approx(2 / report["seconds"])
        assert report["cache_bytes"] == 2 * 2 * 2 * 2 * 128 * 64 * 2  # layers, kinds, rows, heads, slots, width, bytes
        # Of so small a model what is not counted as needed, vectors and features of the noise, is a part.
        assert 0 < report["moved_bytes"] < 1.5 * report["needed_bytes"]


def test_what_does_not_fit_is_said_with_status_1(tmp_path):
    flags = ("--stage=ar", "--config.stages.ar.batch_size=65536", "--config.model.remat=nothing")
    done = compile_for_tpu(tmp_path, "--topology=v5e:2x2", "--json", *flags)
    stage = json.loads(done.stdout.splitlines()[-1])["stages"]["ar"]
    assert done.returncode == 1
    assert not stage["fits"] and stage["hbm_bytes"] > stage["hbm_limit"]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--decode", "--batch=4,x"], "--batch=x should be whole numbers above 0"),
        (["--topology=v5z:2x4"], "--topology=v5z:2x4 cannot be compiled for"),
        (["--stages=k9"], "--stage=k9 is not a stage of this config; there are ar, k1"),
        (["--config.mesh.data=3"], "stages.ar.batch_size = 32 is not divisible by mesh.data * mesh.fsdp"),
        (["--config.mesh.fsdp=3"], "3 does not divide the 8 devices"),
        (
            ["--config=configs/llama.py", "--config.stages.ar.checkpoint=no/model"],
            "stages.ar.checkpoint = 'no/model' is not here, and model.num_layers, d_model, num_heads do not say",
        ),
    ],
)
def test_mistakes_are_one_line(tmp_path, flags, message):
    done = compile_for_tpu(tmp_path, *flags)
    assert done.returncode == 2
    assert [line for line in done.stderr.splitlines() if message in line and line.startswith("error: ")]
