"""What each stage of a configuration is: its predecessors, its model, its objective. Nothing here touches an array."""

import dataclasses
from typing import NamedTuple

from kforcing_jax.config import Config, predecessors
from kforcing_jax.models import CausalLM, ModelConfig, PushForwardLM
from kforcing_jax.noise import CdfOrder
from kforcing_jax.training.objectives import Objective, distillation, language_modelling


class Vocabulary(NamedTuple):
    """What a model knows of a tokenizer; a Corpus and a Tokenizer have these attributes too."""

    vocab_size: int
    mask_id: int
    eos_id: int | None


def cdf_order(config: Config, vocab_size: int) -> CdfOrder | None:
    """The order of tokens on [0, 1) in a run that begins; weights keep theirs (None: vocabulary order)."""
    return CdfOrder.shuffled(vocab_size, config.seed) if config.model.cdf_order == "shuffled" else None


def stage_model(
    config: Config,
    name: str,
    vocabulary: Vocabulary,
    dtype: str = "float32",
    order: CdfOrder | None = None,
) -> CausalLM | PushForwardLM:
    """The model of a stage, whose blocks compute in `dtype`; parameters are f32 in any case.

    `order` is the `cdf_order` of its weights; by default that of the configuration. Where blocks compute in half
    precision, no product has to be better than the hardware's usual.
    """
    fields = dataclasses.asdict(config.model) | {"dtype": dtype}
    fields["cdf_order"] = order or cdf_order(config, vocabulary.vocab_size)
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
