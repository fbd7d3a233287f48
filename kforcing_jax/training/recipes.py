"""What each stage of a configuration is: its predecessors, its model, its objective. Nothing here touches an array."""

import dataclasses
from typing import NamedTuple

from kforcing_jax.config import Config, predecessors
from kforcing_jax.models import CausalLM, ModelConfig, PushForwardLM
from kforcing_jax.noise import CdfOrder
from kforcing_jax.registry import OBJECTIVES
from kforcing_jax.training.objectives import Objective


class Vocabulary(NamedTuple):
    """What a model knows of a tokenizer, and the order in which its tokens lie on [0, 1) (None: that of the ids)."""

    vocab_size: int
    mask_id: int
    eos_id: int | None
    cdf_order: CdfOrder | None = None


def stage_model(config: Config, name: str, vocabulary: Vocabulary, dtype: str = "float32") -> CausalLM | PushForwardLM:
    """The model of a stage, whose blocks compute in `dtype`; parameters are f32 in any case.

    Where blocks compute in half precision, no product has to be better than the hardware's usual.
    """
    fields = dataclasses.asdict(config.model) | {"dtype": dtype, "cdf_order": vocabulary.cdf_order}
    if dtype != "float32":
        fields["precision"] = "default"
    cfg = ModelConfig(vocab_size=vocabulary.vocab_size, mask_id=vocabulary.mask_id, **fields)
    return PushForwardLM(cfg) if config.stages[name].window else CausalLM(cfg)


def stage_objective(config: Config, name: str, vocabulary: Vocabulary, dtype: str = "float32") -> Objective:
    """What a stage minimises, student and teacher computing in `dtype`."""
    stage, (teacher_name, _) = config.stages[name], predecessors(config, name)
    teacher = stage_model(config, teacher_name, vocabulary, dtype) if teacher_name else None
    objective = OBJECTIVES.find(stage.objective or ("distillation" if teacher else "language_modelling"))
    return objective(stage_model(config, name, vocabulary, dtype), teacher, stage, vocabulary.eos_id)
