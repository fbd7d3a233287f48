"""What each stage of a configuration is: its predecessors, its model, its objective. Nothing here touches an array."""

import dataclasses
from typing import NamedTuple

from kforcing_jax.config import Config, predecessors
from kforcing_jax.models import CausalLM, ModelConfig, PushForwardLM
from kforcing_jax.noise import CdfOrder
from kforcing_jax.training.objectives import Objective, distillation, language_modelling


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
    student = stage_model(config, name, vocabulary, dtype)
    teacher, _ = predecessors(config, name)
    if teacher is None:
        return language_modelling(student)
    return distillation(
        student, stage_model(config, teacher, vocabulary, dtype), config.stages[name], vocabulary.eos_id
    )
