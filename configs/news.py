"""A CPU run that shows what more training buys: BPE of 2,048 tokens on news, 8 layers, k = 1, 2, 4, 8.

    python -m kforcing_jax.main --config=configs/news.py --workdir=runs/news

Hardware: about an hour on 2 idle CPU cores, 1:49 on one beside other work (2026-11-30). Result to expect:
docs/results.md. Needs the network once, for the articles (10.5 MB).

`--config=configs/news.py:gpu` is the same on one GPU: 12 layers of 512, batches of 256 rows. It has not been run yet.
"""

from typing import Any

from kforcing_jax.config import ConfigError, default_config, default_stage


def get_config(variant: str = ""):
    config = default_config()
    config.data.source = "news"
    config.data.tokenizer = "bpe"
    config.data.vocab_size = 2048
    config.data.seq_len = 64
    config.mesh.data = 1  # batches are small: one device, whatever there is
    config.model.update(num_layers=8, d_model=128, num_heads=4, cdf_order="shuffled")
    config.evaluation.update(rows=128, samples=128)
    config.logging.update(log_every=50, validate_every=500, checkpoint_every=500)
    # Muon and a shuffled order together are worth four times the steps of AdamW in the order of the ids (README.md).
    shared: dict[str, Any] = dict(
        optimizer="muon", learning_rate=1e-2, schedule="cosine", warmup_steps=50, batch_size=8, ema_decay=0.99
    )
    if variant == "gpu":
        config.model.update(num_layers=12, d_model=512, num_heads=8)
        shared |= dict(batch_size=256, learning_rate=5e-3)
    elif variant:
        raise ConfigError(f"configs/news.py has no variant {variant!r}; it has gpu")
    config.stages.unlock()
    config.stages.ar = default_stage(steps=4500, **(shared | dict(batch_size=2 * shared["batch_size"])))
    config.stages.k1 = default_stage(window=1, steps=3600, **shared)
    config.stages.k2 = default_stage(window=2, steps=2800, **shared)
    config.stages.k4 = default_stage(window=4, steps=2800, **shared)
    config.stages.k8 = default_stage(window=8, steps=600, **shared)
    return config.lock()
