"""What a configuration chooses is what a stage is made of."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from micro import micro_config

from kforcing_jax.data.packing import Batch
from kforcing_jax.errors import ConfigError
from kforcing_jax.models import init_params
from kforcing_jax.training.optimizer import learning_rate, make_optimizer
from kforcing_jax.training.recipes import Vocabulary, check_own_parts, stage_model, stage_objective

VOCABULARY = Vocabulary(6, 5, None)
OWN = """
import jax.numpy as jnp
import optax
from kforcing_jax.training.losses import Mean
from kforcing_jax.training.objectives import Objective, distillation

def seven(logits_xV, targets_x):
    return jnp.full(targets_x.shape, 7.0)

def eight(student, teacher, stage, eos_id):
    return Objective(distillation(student, teacher, stage, eos_id).draw_inputs, lambda *_: (Mean(8.0, 1.0), {}))

def rising(stage, steps):
    return lambda step: 10.0 + step

def backwards(stage):
    return optax.sgd(-3.0)

def of_one_argument(logits_xV):
    return logits_xV
"""


@pytest.fixture(autouse=True)
def own_parts(tmp_path, monkeypatch):
    """A user's module own_parts, in the current folder."""
    (tmp_path / "own_parts.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    sys.modules.pop("own_parts", None)


def loss_of(config, name):
    """Of one batch."""
    params = init_params(stage_model(config, name, VOCABULARY), jax.random.key(0))
    objective = stage_objective(config, name, VOCABULARY)
    batch = Batch(np.zeros((2, 8), np.int32))
    teacher = init_params(stage_model(config, "ar", VOCABULARY), jax.random.key(1))
    loss, metrics = objective.losses(params, teacher, objective.draw_inputs(batch, jax.random.key(2)))
    return loss.value, metrics


def test_a_loss_of_ones_own_is_what_a_student_minimises():
    loss, metrics = loss_of(micro_config(k1={"loss": "own_parts:seven"}), "k1")
    assert loss == 7.0 and metrics["loss_1"].value == 7.0 and 0 <= metrics["agreement_1"].value <= 1
    assert loss_of(micro_config(), "k1")[0] != 7.0


def test_an_objective_of_ones_own_takes_the_place_of_distillation():
    assert loss_of(micro_config(k1={"objective": "own_parts:eight"}), "k1") == (8.0, {})


def test_a_schedule_and_an_optimiser_of_ones_own_take_the_steps():
    stage = micro_config(k1={"schedule": "own_parts:rising", "optimizer": "own_parts:backwards"}).stages["k1"]
    assert float(learning_rate(stage)(stage.warmup_steps + 5)) == 15.0
    optimizer, params = make_optimizer(stage), {"w": jnp.zeros(1)}
    updates, _ = optimizer.update({"w": jnp.full(1, 0.5)}, optimizer.init(params), params)
    assert float(updates["w"][0]) == 1.5


def test_parts_that_fit_are_accepted_before_their_stage():
    own = {"loss": "own_parts:seven", "schedule": "own_parts:rising", "optimizer": "own_parts:backwards"}
    for segmented in (False, True):
        check_own_parts(micro_config(k2=own, k1={"objective": "own_parts:eight"}), VOCABULARY, segmented)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"loss": "own_parts:seve"}, "'own_parts:seve' is not a loss: module own_parts has no seve"),
        ({"loss": "own_parts:of_one_argument"}, r"stages.k2 \(loss = 'own_parts:of_one_argument'\) fails: TypeError"),
        ({"objective": "own_parts:seven"}, r"stages.k2 \(objective = 'own_parts:seven'\) fails: TypeError"),
        ({"optimizer": "own_parts:rising"}, r"stages.k2 \(optimizer = 'own_parts:rising'\) fails: TypeError"),
    ],
)
def test_parts_that_do_not_fit_are_refused_before_any_stage(changes, says):
    with pytest.raises(ConfigError, match=says):
        check_own_parts(micro_config(k2=changes), VOCABULARY, segmented=False)
