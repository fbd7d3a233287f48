"""What each stage of a configuration is: its predecessors, its model, its objective. Nothing here touches an array."""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from kforcing_jax.config import Config, predecessors
from kforcing_jax.data.packing import Batch
from kforcing_jax.errors import ConfigError, UserError
from kforcing_jax.models import CausalLM, ModelConfig, PushForwardLM, init_params
from kforcing_jax.models.gated import own_params
from kforcing_jax.noise import CdfOrder
from kforcing_jax.registry import OBJECTIVES
from kforcing_jax.training.objectives import Objective
from kforcing_jax.training.optimizer import make_optimizer


class Vocabulary(NamedTuple):
    """What a model knows of a tokenizer, and the order in which its tokens lie on [0, 1) (None: that of the ids)."""

    vocab_size: int
    mask_id: int | None
    eos_id: int | None
    cdf_order: CdfOrder | None = None


def stage_model(config: Config, name: str, vocabulary: Vocabulary, dtype: str = "float32") -> CausalLM | PushForwardLM:
    """The model of a stage, whose blocks compute in `dtype`; parameters are f32, but for a
    teacher's of another `model.weights_dtype`.

    Where blocks compute in half precision, no product has to be better than the hardware's usual.
    """
    model, is_student = config.model, bool(config.stages[name].window)
    fields: dict[str, Any] = {field.name: getattr(model, field.name) for field in dataclasses.fields(model)}
    fields |= {"dtype": dtype, "cdf_order": vocabulary.cdf_order}
    fields["adapter_rank"] = model.adapter_rank if is_student else 0
    if dtype != "float32":
        fields["precision"] = "default"
    cfg = ModelConfig(vocab_size=vocabulary.vocab_size, mask_id=vocabulary.mask_id, **fields)
    return PushForwardLM(cfg) if is_student else CausalLM(cfg)


def trained_part(model: CausalLM | PushForwardLM, params: dict) -> dict:
    """What a stage trains, averages and keeps of a model's parameters, or their shapes: all, or a gated one's own."""
    return own_params(params) if model.cfg.is_gated else params


def stage_objective(config: Config, name: str, vocabulary: Vocabulary, dtype: str = "float32") -> Objective:
    """What a stage minimises, student and teacher computing in `dtype`."""
    stage, (teacher_name, _) = config.stages[name], predecessors(config, name)
    teacher = stage_model(config, teacher_name, vocabulary, dtype) if teacher_name else None
    objective = OBJECTIVES.find(stage.objective or ("distillation" if teacher else "language_modelling"))
    return objective(stage_model(config, name, vocabulary, dtype), teacher, stage, vocabulary.eos_id)


def check_own_parts(config: Config, vocabulary: Vocabulary, segmented: bool) -> None:
    """Tries losses, objectives, schedules and optimisers of one's own on shapes, before a run comes to their stage.

    Raises:
      ConfigError: one cannot be imported or fails; names the stage and the parts.
    """
    for name, stage in config.stages.items():
        if not stage.own_parts:
            continue
        try:
            _try_on_shapes(config, name, vocabulary, segmented)
        except UserError:
            raise
        except Exception as error:  # it is somebody's code: anything can be raised
            parts = ", ".join(f"{field} = {own!r}" for field, own in stage.own_parts.items())
            reason = " ".join(str(error).split())
            key = name.replace("-", "_")
            raise ConfigError(f"stages.{key} ({parts}) fails: {type(error).__name__}: {reason}") from None


def _try_on_shapes(config, name, vocabulary, segmented):
    stage, (teacher, _) = config.stages[name], predecessors(config, name)
    objective, optimizer = stage_objective(config, name, vocabulary), make_optimizer(stage)
    rows: Any = jax.ShapeDtypeStruct((stage.batch_size, config.data.seq_len), jnp.int32)
    batch = Batch(rows, rows if segmented else None)

    def params_of(stage_name):
        model = stage_model(config, stage_name, vocabulary)
        return model, init_params(model, jax.random.key(0))

    def one_step(batch):
        params, teacher_params = trained_part(*params_of(name)), params_of(teacher)[1] if teacher else {}
        inputs = objective.draw_inputs(batch, jax.random.key(0))
        loss, _ = objective.losses(params, teacher_params, inputs)
        updates, _ = optimizer.update(params, optimizer.init(params), params)
        return loss.value, updates

    jax.eval_shape(one_step, batch)
