"""Training on several devices: the same step on every mesh, and where everything lies."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from micro import micro_config, micro_config_dict

from kforcing_jax.architecture import LLAMA
from kforcing_jax.config import MeshConfig, parse
from kforcing_jax.data.packing import Batch
from kforcing_jax.errors import ConfigError
from kforcing_jax.models import init_params
from kforcing_jax.sharding import (
    RULES,
    check_divisible,
    make_mesh,
    mesh_shape,
    parameter_shardings,
    process_share,
    put_batch,
    replicated,
)
from kforcing_jax.training.recipes import Vocabulary, predecessors, stage_model, stage_objective, trained_part
from kforcing_jax.training.stage import Phase, abstract_state, compiled_step, init_state, make_optimizer

VOCABULARY = Vocabulary(vocab_size=13, mask_id=12, eos_id=11)
ROWS, LENGTH = 8, 8
CONFIG = micro_config(k2=dict(batch_size=ROWS, learning_rate=1e-2))
GATED = dict(adapter_rank=2, num_heads=4, num_kv_heads=2, tied_embeddings=True) | LLAMA


def batch(segmented):
    rng = np.random.default_rng(0)
    segments = np.sort(rng.integers(0, 3, size=(ROWS, LENGTH)), axis=1)[:, ::-1].astype(np.int32)
    return Batch(rng.integers(0, 12, size=(ROWS, LENGTH)).astype(np.int32), segments if segmented else None)


def params_on(mesh, name, seed, part=lambda model, params: params):
    model = stage_model(CONFIG, name, VOCABULARY)

    def init(key):
        return part(model, init_params(model, key))

    shardings = parameter_shardings(jax.eval_shape(init, jax.random.key(0)), mesh)
    return jax.jit(init, out_shardings=shardings)(jax.random.key(seed))


def run_steps(mesh, name="k2", accumulation=1, segmented=False, steps=2):
    """(state, metrics of the last step) after a few steps from fixed parameters on a mesh."""
    stage = CONFIG.stages[name].__class__(**{**vars(CONFIG.stages[name]), "accumulation": accumulation})
    params = params_on(mesh, name, 1, trained_part)
    teacher, _ = predecessors(CONFIG, name)
    teacher_params = params_on(mesh, teacher, seed=2) if teacher else {}
    abstract = abstract_state(params, stage, mesh)
    shardings = jax.tree.map(lambda x: x.sharding, abstract)
    state = jax.jit(lambda p: init_state(p, make_optimizer(stage)), out_shardings=shardings)(params)
    objective = functools.partial(stage_objective, CONFIG, name, VOCABULARY)
    step = compiled_step(stage, objective, Phase("float32", steps), state)
    key = jax.device_put(jax.random.key(3), replicated(mesh))
    with jax.set_mesh(mesh):
        for _ in range(steps):
            state, metrics = step(state, teacher_params, put_batch(batch(segmented), mesh, ROWS), key)
    return state, jax.device_get(metrics)


def mesh_of(**sizes):
    return make_mesh(MeshConfig(**{"data": 1} | sizes))


@pytest.fixture(scope="module")
def on_one_device():
    return {name: run_steps(mesh_of(), name) for name in ("ar", "k2")}


def assert_same_run(actual, expected):
    (state, metrics), (expected_state, expected_metrics) = actual, expected
    for name, value in expected_metrics.items():
        np.testing.assert_allclose(metrics[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    for got, wanted in zip(jax.tree.leaves(state.params), jax.tree.leaves(expected_state.params), strict=True):
        # Adam divides by the root of a square: gradients near zero keep their sign only within rounding.
        np.testing.assert_allclose(got, wanted, atol=2e-4)


@pytest.mark.parametrize(
    "sizes",
    [
        dict(data=2),
        dict(data=8),
        dict(fsdp=2),
        dict(fsdp=8),
        dict(tensor=2),
        dict(data=2, fsdp=2, tensor=2),
    ],
    ids=str,
)
def test_a_step_is_the_same_on_every_mesh(on_one_device, sizes):
    assert_same_run(run_steps(mesh_of(**sizes)), on_one_device["k2"])


def test_the_teachers_step_is_the_same_on_a_mesh(on_one_device):
    assert_same_run(run_steps(mesh_of(data=2, fsdp=2, tensor=2), "ar"), on_one_device["ar"])


@pytest.mark.parametrize("sizes", [dict(), dict(data=2, fsdp=2)], ids=str)
def test_a_batch_worked_off_in_parts_gives_the_same_step(on_one_device, sizes):
    assert_same_run(run_steps(mesh_of(**sizes), accumulation=2), on_one_device["k2"])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_gated_students_step_is_the_same_on_a_mesh(monkeypatch, optimizer):
    """Of the Llama family: heads that share keys, RMSNorm, SwiGLU, tied embeddings."""
    stages = dict(CONFIG.stages) | {"k2": dataclasses.replace(CONFIG.stages["k2"], optimizer=optimizer, windows=2)}
    config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, **GATED), stages=stages)
    monkeypatch.setitem(globals(), "CONFIG", config)
    assert_same_run(run_steps(mesh_of(data=2, fsdp=2, tensor=2)), run_steps(mesh_of()))


def test_segments_are_the_same_on_a_mesh_and_in_parts():
    expected = run_steps(mesh_of(), segmented=True)
    assert_same_run(run_steps(mesh_of(data=2, tensor=2), segmented=True, accumulation=4), expected)


def test_state_is_spread_over_fsdp_and_tensor():
    """Everything with two axes or more is split, but for norms and biases; optimiser and average like parameters."""
    state, _ = run_steps(mesh_of(fsdp=2, tensor=2), steps=1)
    split = {"attn_qkv", "attn_out", "mlp_in", "mlp_out", "embedding", "output", "project"}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name.endswith(("kernel", "embedding")):
            assert any(part in name for part in split)
            assert leaf.addressable_shards[0].data.size == leaf.size // 4, name
    assert {leaf.sharding for leaf in jax.tree.leaves(state.opt_state[1][0].mu)} == {
        leaf.sharding for leaf in jax.tree.leaves(state.params)
    }


def test_every_rule_matches_a_parameter():
    """Of the paper's students, and of gated ones of the Llama family."""
    names = []
    for changes in ({}, GATED, GATED | {"adapter_rank": -1, "qkv_bias": True}, {"qkv_bias": True}):
        config = dataclasses.replace(CONFIG, model=dataclasses.replace(CONFIG.model, **changes))
        init = functools.partial(init_params, stage_model(config, "k1", VOCABULARY))
        params = jax.eval_shape(init, jax.random.key(0))
        names += [jax.tree_util.keystr(p, simple=True, separator="/") for p, _ in jax.tree.leaves_with_path(params)]
    for pattern, _ in RULES:
        assert any(re.search(pattern, name) for name in names), pattern


def test_what_does_not_divide_is_whole_everywhere():
    """A rank or a head may be smaller than the mesh; the other axes of its array are split all the same."""
    mesh = mesh_of(fsdp=2, tensor=4)
    leaf = jax.ShapeDtypeStruct((2, 16, 2, 6), jnp.float32)  # L, D, heads, C
    sharding = parameter_shardings({"blocks": {"attn_q": {"kernel": leaf}}}, mesh)["blocks"]["attn_q"]["kernel"]
    assert sharding.spec == PartitionSpec(None, "fsdp", None, None)


@pytest.mark.parametrize(
    "config, devices, expected",
    [
        (MeshConfig(), 8, (8, 1, 1)),
        (MeshConfig(data=-1, fsdp=2), 8, (4, 2, 1)),
        (MeshConfig(data=2, fsdp=-1, tensor=2), 8, (2, 2, 2)),
        (MeshConfig(data=2), 8, (2, 1, 1)),
    ],
)
def test_one_size_takes_the_devices_that_are_left(config, devices, expected):
    assert mesh_shape(config, devices) == expected


@pytest.mark.parametrize(
    "sizes, message",
    [
        (dict(data=-1, fsdp=3), "mesh.data = -1, mesh.fsdp = 3, mesh.tensor = 1: 3 does not divide the 8 devices"),
        (dict(data=9), "mesh.data = 9, mesh.fsdp = 1, mesh.tensor = 1: 9 devices are needed, 8 are here"),
        (dict(data=-1, fsdp=-1), "mesh.data and mesh.fsdp are both -1; only one can take the devices that are left"),
        (dict(tensor=0), "mesh.tensor = 0 should be at least 1"),
    ],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        mesh_shape(MeshConfig(**sizes), 8)


@pytest.mark.parametrize(
    "stage, mesh, message",
    [
        (dict(batch_size=6), dict(data=4), "stages.k2.batch_size = 6 is not divisible by mesh.data * mesh.fsdp"),
        (dict(batch_size=8, accumulation=4), dict(fsdp=4), "stages.k2.accumulation = 4 * 4"),
        (dict(), dict(tensor=4), "model.num_heads = 2 is not divisible by mesh.tensor = 4"),
        (dict(batch_size=8), dict(fsdp=8, tensor=4), "is not divisible by mesh.tensor = 4"),
    ],
)
def test_what_cannot_be_split_evenly_is_refused(stage, mesh, message):
    raw = micro_config_dict(k2=stage, ar=dict(batch_size=8), k1=dict(batch_size=8))
    sizes = {"data": 1, "fsdp": 1, "tensor": 1} | mesh
    shape = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes))
    with pytest.raises(ConfigError, match=re.escape(message)):
        check_divisible(parse(raw), shape)


def test_the_batch_of_a_stage_that_trains_nothing_is_not_split():
    stages = {"ar": dict(checkpoint="x.ckpt", batch_size=6), "k1": dict(batch_size=8), "k2": dict(batch_size=8)}
    check_divisible(
        parse(micro_config_dict(**stages)), jax.sharding.AbstractMesh((1, 4, 1), ("data", "fsdp", "tensor"))
    )


def test_a_process_holds_all_rows_when_it_is_alone():
    assert process_share(mesh_of(data=4, tensor=2), 8) == (0, 1)
