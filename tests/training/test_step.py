"""The training step of the real objectives: precision, donation, and what a segment may not learn from."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from compiling import OPTIMISED
from micro import micro_config, micro_config_dict

from kforcing_jax.config import MeshConfig, parse
from kforcing_jax.data.packing import Batch
from kforcing_jax.decoding.passes import MODELS, Decoding, Models, prefill, run
from kforcing_jax.decoding.programs import Programs
from kforcing_jax.evaluation.fidelity import _conditionals, _windows_after
from kforcing_jax.evaluation.samples import _under_teacher
from kforcing_jax.models import init_params
from kforcing_jax.models.cached import split
from kforcing_jax.sharding import make_mesh, parameter_shardings
from kforcing_jax.training.agreement import agreement_sums
from kforcing_jax.training.objectives import batch_loss
from kforcing_jax.training.recipes import Vocabulary, predecessors, stage_model, stage_objective
from kforcing_jax.training.rollout import rollout
from kforcing_jax.training.stage import abstract_state, compiled_step, init_state, make_optimizer, precision_phases

VOCABULARY = Vocabulary(vocab_size=13, mask_id=12, eos_id=11)


def stage_step(config, name, phase):
    """(the jitted step of a phase, its arguments)"""
    mesh, stage = make_mesh(MeshConfig(data=1)), config.stages[name]

    def params_of(stage_name):
        init = functools.partial(init_params, stage_model(config, stage_name, VOCABULARY))
        shardings = parameter_shardings(jax.eval_shape(init, jax.random.key(0)), mesh)
        return jax.jit(init, out_shardings=shardings)(jax.random.key(1))

    params, (teacher, _) = params_of(name), predecessors(config, name)
    shardings = jax.tree.map(lambda x: x.sharding, abstract_state(params, stage, mesh))
    state = jax.jit(lambda p: init_state(p, make_optimizer(stage)), out_shardings=shardings)(params)
    step = compiled_step(stage, functools.partial(stage_objective, config, name, VOCABULARY), phase, state)
    batch = Batch(jax.random.randint(jax.random.key(2), (stage.batch_size, config.data.seq_len), 0, 11))
    return step, (state, params_of(teacher) if teacher else {}, batch, jax.random.key(3))


def matmuls(jaxpr):
    """Every dot_general of a jaxpr, those inside loops, custom gradients and kernels included."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda v: hasattr(v, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from matmuls(inner)


def traced_matmuls(config, name, phase_index):
    phase = precision_phases(config.stages[name])[phase_index]
    step, arguments = stage_step(config, name, phase)
    found = list(matmuls(step.trace(*arguments).jaxpr.jaxpr))
    assert len(found) > 10
    return found


def precise(equation):
    highest = jax.lax.Precision.HIGHEST
    return equation.params["precision"] in (highest, (highest, highest))


def config_with(implementation, seq_len=8):
    stages = {name: dict(bfloat16_fraction=0.5, steps=10, batch_size=2) for name in ("ar", "k1", "k2")}
    config = micro_config(**stages)
    model = config.model.__class__(**{**vars(config.model), "attention": implementation})
    data = config.data.__class__(**{**vars(config.data), "seq_len": seq_len})
    return config.__class__(**{**vars(config), "model": model, "data": data})


@pytest.mark.parametrize("name", ["ar", "k2"])
@pytest.mark.parametrize("implementation, seq_len", [("dense", 8), ("blockwise", 64), ("splash", 128)])
def test_the_last_phase_multiplies_f32_at_the_highest_precision(name, implementation, seq_len):
    """Forward, backward, rollout, custom gradients and kernels: no product of less."""
    for equation in traced_matmuls(config_with(implementation, seq_len), name, -1):
        assert precise(equation), equation
        assert all(operand.aval.dtype == jnp.float32 for operand in equation.invars)


TOKENS = jnp.zeros((2, 8), jnp.int32)


def traced_programs():
    """What is traced outside the training step: (name, function of two models' parameters)."""
    config = config_with("dense")
    teacher, student = (stage_model(config, name, VOCABULARY) for name in ("ar", "k2"))
    tau, u, key = jnp.ones(2), jnp.zeros((2, 8, 2)), jax.random.key(0)
    programs = Programs(Models(student, teacher, 2), slots=2, positions=64, mesh=None)
    state = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), programs.state)

    def weights(t, s):
        return {"teacher": split(teacher.cfg, t), "student": split(student.cfg, s)}

    for mode, names in MODELS.items():
        part = Decoding(state.slots, {name: state.caches[name] for name in names})
        yield (
            f"decoding, {mode}",
            lambda t, s, m=mode, p=part: run(programs.models, m, 64, weights(t, s), p, jnp.ones(2, bool), 1, True),
        )
    for name in programs.models.names:
        yield (
            f"prefill, {name}",
            lambda t, s, n=name: prefill(programs.models, n, 16, 64, weights(t, s)[n], state.slots, state.caches[n]),
        )
    yield "rollout", lambda t, s: rollout(student, s, TOKENS, jnp.zeros((2, 8, 4)), tau, 2)
    yield "agreement", lambda t, s: agreement_sums(teacher, t, student, s, Batch(TOKENS), u, tau, 11)
    yield "samples", lambda t, s: _under_teacher(teacher, t, TOKENS)
    yield "joint", lambda t, s: _conditionals(teacher, t, TOKENS, jnp.zeros((5, 1), jnp.int32))
    yield "windows", lambda t, s: _windows_after(student, s, TOKENS[0], jnp.zeros((3, 2)))
    for name in ("ar", "k2"):
        objective = stage_objective(config, name, VOCABULARY)
        yield (
            f"validation of {name}",
            lambda t, s, o=objective, n=name: batch_loss(o, t if n == "ar" else s, s, Batch(TOKENS), 0, key).value,
        )


@pytest.mark.parametrize("name, program", list(traced_programs()), ids=lambda x: x if isinstance(x, str) else "")
def test_everything_else_multiplies_f32_at_the_highest_precision_too(name, program):
    """Decoding and prefill, rollout, evaluation, validation: TPUs and GPUs would take less by default."""
    config = config_with("dense")
    params = [
        jax.eval_shape(functools.partial(init_params, stage_model(config, stage, VOCABULARY)), jax.random.key(0))
        for stage in ("ar", "k2")
    ]
    found = list(matmuls(jax.jit(program).trace(*params).jaxpr.jaxpr))
    assert found and all(map(precise, found))


def test_the_precision_of_f32_products_is_a_field_of_the_model():
    raw = micro_config_dict()
    raw.model.precision = "high"
    config = parse(raw)
    assert stage_model(config, "k2", VOCABULARY).cfg.precision == "high"
    assert stage_model(config, "k2", VOCABULARY, "bfloat16").cfg.precision == "default"


@pytest.mark.parametrize("implementation, seq_len", [("dense", 8), ("splash", 128)])
def test_the_first_phase_computes_blocks_in_bfloat16_and_logits_in_f32(implementation, seq_len):
    config = config_with(implementation, seq_len)
    found = traced_matmuls(config, "k2", 0)
    assert not any(map(precise, found))
    with_vocabulary = [e for e in found if any(13 in operand.aval.shape for operand in e.invars)]
    assert with_vocabulary
    assert all(operand.aval.dtype == jnp.float32 for e in with_vocabulary for operand in e.invars)
    half = [e for e in found if e.invars[0].aval.dtype == jnp.bfloat16]
    assert len(half) > len(found) / 2


def test_bfloat16_phases_keep_f32_parameters_and_optimiser_state():
    config = config_with("dense")
    step, arguments = stage_step(config, "k2", precision_phases(config.stages["k2"])[0])
    state, metrics = step(*arguments)
    assert {leaf.dtype for leaf in jax.tree.leaves((state.params, state.ema, metrics))} == {np.dtype("float32")}
    assert all(leaf.dtype in (np.float32, np.int32) for leaf in jax.tree.leaves(state.opt_state))


def test_the_old_state_is_donated():
    config = config_with("dense")
    step, arguments = stage_step(config, "ar", precision_phases(config.stages["ar"])[-1])
    step.lower(*arguments).compile(OPTIMISED)(*arguments)
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(arguments[0].params))


@pytest.mark.parametrize("name", ["ar", "k2"])
def test_the_loss_of_packed_documents_is_that_of_the_documents(name):
    """Two documents in one row, or in a row each with padding after them."""
    config = config_with("dense")
    objective = stage_objective(config, name, VOCABULARY)
    _, (state, teacher_params, _, key) = stage_step(config, name, precision_phases(config.stages[name])[-1])
    rng = np.random.default_rng(0)
    documents = [rng.integers(0, 11, size=n).astype(np.int32) for n in (3, 5)]
    packed = Batch(np.concatenate(documents)[None], np.array([[1, 1, 1, 2, 2, 2, 2, 2]], np.int32))
    padded = Batch(
        np.stack([np.pad(d, (0, 8 - len(d)), constant_values=11) for d in documents]),
        np.stack([np.pad(np.ones(len(d), np.int32), (0, 8 - len(d))) for d in documents]),
    )

    def losses(batch):
        inputs = objective.draw_inputs(batch, key)
        if name != "ar":
            # The same noise for the same token, wherever it lies.
            noise = jnp.take(jnp.asarray(rng_noise), jnp.asarray(batch.tokens), axis=0)
            inputs = inputs._replace(noise_BxNxK=noise)
        return jax.jit(objective.losses)(state.params, teacher_params, inputs)

    rng_noise = rng.random((13, config.stages[name].window or 1)).astype(np.float32)
    (loss, metrics), (expected, expected_metrics) = losses(packed), losses(padded)
    np.testing.assert_allclose(loss.value, expected.value, rtol=1e-5)
    np.testing.assert_allclose(loss.weight, expected.weight)
    for metric, mean in metrics.items():
        np.testing.assert_allclose(mean.value, expected_metrics[metric].value, rtol=1e-5, err_msg=metric)
