"""What an architecture is made of, and what it cannot be."""

import re

import pytest

from kforcing_jax.architecture import LLAMA, Architecture, Rope
from kforcing_jax.config import default_config, default_stage, parse
from kforcing_jax.errors import ConfigError
from kforcing_jax.models import ModelConfig


def test_the_sizes_of_a_released_llama_give_its_parameters():
    """SmolLM2-135M has 134,515,008 (its model card), with the embedding of 49,152 x 576 once and two norms a layer."""
    smol = Architecture(
        num_layers=30, d_model=576, num_heads=9, num_kv_heads=3, d_mlp=1536, tied_embeddings=True, **LLAMA
    )
    norms = (2 * smol.num_layers + 1) * smol.d_model
    assert smol.num_layers * smol.block_entries + 49_152 * smol.d_model + norms == 134_515_008
    assert (smol.head_width, smol.kv_heads, smol.problems()) == (64, 3, [])


def test_everything_that_is_wrong_is_in_one_message():
    wrong = dict(num_layers=0, d_model=30, num_heads=6, num_kv_heads=4, norm="batch_norm", mlp="moe", norm_epsilon=0.0)
    with pytest.raises(ValueError) as raised:
        ModelConfig(vocab_size=5, mask_id=7, rope=Rope(scaling="longrope"), **wrong)
    named = re.findall(r"(?:^|; )model\.([\w.]+)", str(raised.value))
    assert named == [
        *["norm", "mlp", "num_layers", "norm_epsilon", "d_model", "num_heads", "rope.scaling", "mask_id"],
    ]


@pytest.mark.parametrize(
    "changes, line",
    [
        ({"d_head": 5}, "model.d_head = 5 is odd"),
        ({"num_kv_heads": 3}, "model.num_heads = 4 is not divisible by model.num_kv_heads = 3"),
        ({"sliding_window": -1}, "model.sliding_window = -1 should be at least 0"),
        ({"norm": "layernorm"}, "model.norm = 'layernorm' is not one of layer_norm, rms_norm"),
    ],
)
def test_a_configuration_names_the_field(changes, line):
    config = default_config()
    config.model.update(changes)
    with config.unlocked():
        config.stages = {"ar": default_stage()}
    with pytest.raises(ConfigError, match=re.escape(line)):
        parse(config)


def test_an_own_head_width_need_not_divide_the_model():
    cfg = ModelConfig(vocab_size=5, mask_id=None, num_layers=1, d_model=10, num_heads=3, d_head=4)
    assert (cfg.head_width, cfg.kv_heads, cfg.mlp_width) == (4, 3, 40)
