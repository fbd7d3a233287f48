"""The whole curriculum on real text, on a laptop's CPU.

    python -m kforcing_jax.main --config=configs/tiny.py --workdir=runs/tiny

News articles, characters, 64 positions, a backbone of 0.9M parameters: AR teacher, then students with k = 1, 2, 4 and
8, each from the one before, as in the paper. Needs the network once, for the articles (10.5 MB).
Hardware, time and result to expect: see the table in README.md. `--config=configs/tiny.py:x4` takes four times the
steps.
"""

from kforcing_jax.config import ConfigError, default_config, default_stage


def get_config(variant: str = ""):
    if variant not in ("", "x4"):
        raise ConfigError(f"configs/tiny.py has no variant {variant!r}; it has x4")
    longer = 4 if variant else 1
    config = default_config()
    config.data.source = "news"
    config.data.tokenizer = "characters"
    config.data.seq_len = 64
    config.mesh.data = 1  # batches are small: one device, whatever there is
    # Deep and narrow: the tokens of a window are resolved one after the other, layer by layer.
    config.model.num_layers = 8
    config.model.d_model = 96
    config.model.num_heads = 4
    config.model.cdf_order = "shuffled"  # learnt better than the order of the ids, see README.md
    # The paper's 500k steps of AdamW at 1e-4 do not fit into minutes; Muon at a rate that ends at zero does.
    shared = dict(optimizer="muon", learning_rate=1e-2, schedule="cosine", warmup_steps=20 * longer, ema_decay=0.99)
    config.stages.unlock()
    config.stages.ar = default_stage(steps=800 * longer, batch_size=16, **shared)
    config.stages.k1 = default_stage(window=1, steps=600 * longer, batch_size=8, **shared)
    config.stages.k2 = default_stage(window=2, steps=550 * longer, batch_size=8, **shared)
    config.stages.k4 = default_stage(window=4, steps=900 * longer, batch_size=4, **shared)
    config.stages.k8 = default_stage(window=8, steps=500 * longer, batch_size=4, **shared)
    return config.lock()
