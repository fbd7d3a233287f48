"""The paper's LM1B run: 12 layers, 128 positions, k = 1, 2 and 4.

    python -m kforcing_jax.prepare --config=configs/lm1b.py --workdir=runs/lm1b
    python -m kforcing_jax.main --config=configs/lm1b.py --workdir=runs/lm1b

Hardware: one TPU v5e slice of 8 chips (the paper: 8 H100). By `launch/compile_for_tpu.py --topology=v5e:2x4` the
largest stage, k4 in f32, takes 11.9 of 15.75 GiB a chip (docs/scaling.md has all of them). Nothing has run on a TPU
yet.

| stage | positions | FLOPs (model) |
| --- | --- | --- |
| ar | 33 G | 2.2e19 |
| k1 | 33 G | 4.6e19 |
| k2 | 33 G | 8.6e19 |
| k4 | 33 G | 1.5e20 |

From the paper (arXiv 2606.10820, appendix): 12 layers of width 768 with 12 heads, 128 positions, bert-base-uncased (V
= 30,522), sentences as [CLS] ... [SEP], the test split for validation; per stage 500k steps of 512 rows, AdamW (0.9,
0.999, eps 1e-6, no weight decay), constant 1e-4, clipping at 1, EMA 0.999 (the defaults of `default_stage`), the
first 400k steps in half precision and the last 100k in f32.

Ours: bfloat16 where the paper has float16. And sentences share rows, each a segment of its own, where the released
code gives each one a row padded to 128: a step sees about four times as many sentences. `data.packing = "padded"` is
theirs. Tokens lie on [0, 1) in a shuffled order, which was learnt better on small models (README.md);
`model.cdf_order = "vocabulary"` is theirs. `stages.k1.tau_min = 0.01` trains a student for all temperatures, as the
paper shows for k = 1 on this data set.

Expected: the paper's Gen-PPL under GPT-2 large is 104.8 for AR, 107.2 for k = 2 and 127.6 for k = 4, at 3.0 to 3.3
times the throughput of AR at k = 4. No run of this file has been finished yet.

`--config=configs/lm1b.py:smoke` is the same path in tiny: minutes on a CPU, on the data of `launch/sample_data.py`.
"""

from kforcing_jax.config import ConfigError, default_config, default_stage


def get_config(variant: str = ""):
    config = default_config()
    config.data.source = "lm1b"
    config.data.packing = "segments"
    config.data.tokenizer = "bert-base-uncased"
    config.data.vocab_size = 30_522
    config.data.seq_len = 128
    config.model.num_layers = 12
    config.model.d_model = 768
    config.model.num_heads = 12
    config.model.cdf_order = "shuffled"
    config.model.remat = "attention"
    config.mesh.data = -1
    config.evaluation.update(batch_size=64, rows=4096, samples=256, prompt_length=6, new_tokens=122)
    config.logging.update(log_every=100, checkpoint_every=1000)
    shared = dict(steps=500_000, batch_size=512, bfloat16_fraction=0.8)
    if variant == "smoke":
        shared = _smoke(config)
    elif variant:
        raise ConfigError(f"configs/lm1b.py has no variant {variant!r}; it has smoke")
    config.stages.unlock()
    config.stages.ar = default_stage(**shared)
    config.stages.k1 = default_stage(window=1, **shared)
    config.stages.k2 = default_stage(window=2, **shared)
    config.stages.k4 = default_stage(window=4, **shared)
    return config.lock()


def _smoke(config) -> dict:
    """Tiny sizes; returns what the stages share."""
    config.data.path = "sample/tfds"
    config.data.seq_len = 32
    config.model.update(num_layers=2, d_model=32, num_heads=2)
    config.mesh.data = 1
    config.evaluation.update(batch_size=4, rows=8, samples=4, prompt_length=6, new_tokens=12, speed_batches=(4,))
    config.logging.update(log_every=2, checkpoint_every=2)
    return dict(steps=5, batch_size=4, learning_rate=1e-3, bfloat16_fraction=0.8)
