"""The arithmetic of a stage against what is traced."""

import functools

import counting
import jax
import pytest
from micro import micro_config

from kforcing_jax.config import MeshConfig
from kforcing_jax.data.packing import Batch
from kforcing_jax.models import init_params
from kforcing_jax.sharding import abstract_on, batch_sharding, make_mesh, parameter_shardings, replicated
from kforcing_jax.training.flops import attended_pairs, step_flops
from kforcing_jax.training.recipes import Vocabulary, predecessors, stage_model, stage_objective
from kforcing_jax.training.stage import Phase, abstract_state, compiled_step

VOCABULARY = Vocabulary(vocab_size=64, mask_id=63, eos_id=None)


def traced_flops(config, name):
    """FLOPs of the products in a step that repeats nothing."""
    mesh, stage = make_mesh(MeshConfig(data=1)), config.stages[name]

    def abstract_params(stage_name):
        model = stage_model(config, stage_name, VOCABULARY)
        shapes = jax.eval_shape(functools.partial(init_params, model), jax.random.key(0))
        return abstract_on(shapes, parameter_shardings(shapes, mesh))

    teacher, _ = predecessors(config, name)
    state = abstract_state(abstract_params(name), stage, mesh)
    tokens = jax.ShapeDtypeStruct((stage.batch_size, config.data.seq_len), "int32", sharding=batch_sharding(mesh))
    key = abstract_on(jax.eval_shape(lambda: jax.random.key(0)), replicated(mesh))
    objective = functools.partial(stage_objective, config, name, VOCABULARY)
    step = compiled_step(stage, objective, Phase("float32", 1), state)
    traced = step.trace(state, abstract_params(teacher) if teacher else {}, Batch(tokens), key)
    return counting.flops(traced.jaxpr)


@pytest.mark.parametrize("name", ["ar", "k1", "k2", "k2-from-ar", "k4"])
def test_the_arithmetic_is_what_is_traced_up_to_masked_pairs_and_the_noise_encoder(name):
    stages = {
        "k2-from-ar": dict(window=2, teacher="ar", steps=5, batch_size=4),
        "k4": dict(window=4, steps=5, batch_size=4),
    }
    config = micro_config(**stages)
    model = config.model.__class__(num_layers=3, d_model=64, num_heads=2, remat="nothing", attention="dense")
    config = config.__class__(**{**vars(config), "model": model})
    assert 0.97 < traced_flops(config, name) / step_flops(config, name, VOCABULARY.vocab_size) < 1.3


@pytest.mark.parametrize("sliding_window", [0, 1, 3, 6, 20])
@pytest.mark.parametrize("past", [0, 2])
def test_attended_pairs_are_counted_one_by_one(past, sliding_window):
    length, group = 5, 3
    seen = [t + 1 + past + j for t in range(length) for j in range(group)]
    assert attended_pairs(length, group, past, sliding_window) == sum(min(n, sliding_window or n) for n in seen)
