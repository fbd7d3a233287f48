"""A configuration that trains in seconds, for tests of what surrounds training."""

import ml_collections

from kforcing_jax.config import Config, default_config, default_stage, parse

# The text of a file for `--config`.
CONFIG_FILE = """
from micro import micro_config_dict
def get_config():
    return micro_config_dict()
"""


def micro_config(**stages: dict) -> Config:
    """`micro_config_dict`, validated."""
    return parse(micro_config_dict(**stages))


def micro_config_dict(**stages: dict) -> ml_collections.ConfigDict:
    """A Markov chain of four states under a two-layer model; `stages` override fields of ar, k1 and k2."""
    config = default_config()
    config.data.source = "markov"
    config.data.markov_states = 4
    config.data.markov_rows = 64
    config.data.validation_fraction = 0.25
    config.data.seq_len = 8
    config.model.num_layers = 2
    config.model.d_model = 16
    config.model.num_heads = 2
    config.mesh.data = 1
    config.evaluation.update(
        dict(batch_size=4, rows=8, samples=4, prompt_length=3, new_tokens=4, joint_contexts=2, joint_samples=200)
    )
    config.evaluation.update(dict(confidences=(0.0, 0.5, 1.0), speed_batches=(4,), speed_rounds=3))
    config.logging.update(dict(log_every=2, checkpoint_every=2, validation_rows=4, sample_tokens=0))
    config.stages.unlock()
    for name, window in (("ar", 0), ("k1", 1), ("k2", 2)):
        fields = dict(window=window, steps=5, batch_size=4, learning_rate=1e-2) | stages.pop(name, {})
        config.stages[name] = default_stage(**fields)
    for name, fields in stages.items():
        config.stages[name] = default_stage(**fields)
    return config
