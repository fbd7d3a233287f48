r"""Students of any model of the Llama family: k = 1, 2 and 4, as low-rank additions to a model that stays as it is.

    python -m kforcing_jax.main --config=configs/llama.py --workdir=runs/llama \
        --config.stages.ar.checkpoint=Llama-3.1-8B-Instruct --config.data.path='chats/*.jsonl'

The teacher is a folder as on the Hugging Face hub, or a GGUF file (Llama, Mistral, Qwen2, Qwen3): its sizes,
vocabulary, tokenizer and chat template are taken over. The text is chats, of which answers alone are learnt
(docs/data.md says what a line is). docs/own_model.md goes through all of it.

What to change: `data.seq_len`, the longest text that will be decoded; `tau_min`, `tau_max` and `top_p` of the students,
as the model will be sampled (they decode at no other); `model.weights_dtype="float32"` for weights that were not stored
as bfloat16, such as GGUF; `accumulation`, by the memory below; without several chips, `mesh.fsdp=1`.

Hardware: a TPU slice, or GPUs. It has been run with tiny models only (tests/test_own_model.py). HBM a chip of an 8B
teacher (the shape of Llama-3.1-8B, bfloat16), GiB, by

    python launch/compile_for_tpu.py --config=configs/llama.py:8b --topology=v5e:4x4 --stage=k4 \
        --config.stages.k4.accumulation=8

(libtpu 0.0.42.1, jax 0.10.2, 2026-11-30; arguments are weights and state, the rest is a step's, TF its model FLOPs):

| slice | stage | `accumulation` | rows at a time | arguments | temporary | of | TF a chip |
| --- | --- | --- | --- | --- | --- | --- | --- |
| v5e:4x4 | k1 | 8 | 2 | 1.17 | 5.42 | 15.75 | 760 |
| v5e:4x4 | k4 | 16 | 1 | 1.25 | 7.32 | 15.75 | 3,740 |
| v5e:4x4 | k4 | 8 | 2 | 1.25 | 13.01 | 15.75 | 3,740 |
| v5e:8x8 | k4 | 2 | 2 | 0.38 | 10.33 | 15.75 | 934 |
| v6e:4x4 | k4 | 4 | 4 | 1.25 | 22.18 | 31.25 | 3,740 |
| v6e:4x8 | k4 | 2 | 4 | 0.67 | 20.13 | 31.25 | 1,870 |

Every part of a step gathers the weights anew (k4 on v5e:4x4: 2.0 TB a chip and step in 16 parts, 1.0 in 8): as few
parts as fit. 4,000 steps of k4 are 21 hours of 16 v5e at their peak, which no program reaches.

Expected: exact text from the first step on. What such students have reached is measured on small models only
(docs/results.md). Rank and rate are not tuned for large ones.
"""

from typing import Any

from kforcing_jax.architecture import LLAMA
from kforcing_jax.config import ConfigError, default_config, default_stage


def get_config(variant: str = ""):
    if variant not in ("", "8b"):
        raise ConfigError(f"configs/llama.py has no variant {variant!r}; it has 8b")
    config = default_config()
    config.data.update(source="chat", path="chats.jsonl", packing="segments", loss_on="answers", seq_len=1024)
    config.model.update(adapter_rank=32, cdf_order="shuffled", weights_dtype="bfloat16", remat="blocks")
    if variant == "8b":
        _llama_3_8b(config)
    config.mesh.update(data=1, fsdp=-1)
    config.evaluation.update(batch_size=16, rows=128, samples=64, prompt_length=256, new_tokens=256)
    config.logging.update(log_every=50, validate_every=500, checkpoint_every=500)
    shared: dict[str, Any] = dict(
        optimizer="muon", learning_rate=1e-2, schedule="cosine", warmup_steps=200, batch_size=256, accumulation=4
    )
    # No step in f32: what that takes at 8B was not compiled. Such students decode as they were taught with
    # --dtype=bfloat16, which commands have to be told.
    shared |= dict(steps=4000, tau_min=0.7, tau_max=0.7, top_p=0.9, bfloat16_fraction=1.0)
    config.stages.unlock()
    config.stages.ar = default_stage(checkpoint="Llama-3.1-8B-Instruct", batch_size=256)
    config.stages.k1 = default_stage(window=1, **shared)
    config.stages.k2 = default_stage(window=2, **shared)
    config.stages.k4 = default_stage(window=4, **shared)
    return config.lock()


def _llama_3_8b(config):
    """What is read from the folder otherwise: for `compile_for_tpu` on a machine that has none."""
    config.data.vocab_size = 128_256
    config.model.update(LLAMA | dict(num_layers=32, d_model=4096, num_heads=32, num_kv_heads=8, d_mlp=14_336))
    config.model.rope.update(base=5e5, scaling="llama3", factor=8.0, original_length=8192)
