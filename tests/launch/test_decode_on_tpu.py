"""Which programs of decoding are compiled for a TPU."""

from decode_on_tpu import models_of
from micro import micro_config_dict

from kforcing_jax.config import parse
from kforcing_jax.training.recipes import Vocabulary

VOCABULARY = Vocabulary(vocab_size=7, mask_id=6, eos_id=None)


def test_of_a_gated_student_exact_decoding_is_one_of_them():
    config = micro_config_dict()
    assert list(models_of(parse(config), VOCABULARY, "bfloat16")) == ["ar", "student"]
    config.model.adapter_rank = 2
    models = models_of(parse(config), VOCABULARY, "bfloat16")
    assert list(models) == ["ar", "student", "exact"]
    assert models["exact"].is_one_pass and models["exact"].exact_windows == models["exact"].k == 2
