"""The whole curriculum on real text, on a laptop's CPU.

python -m kforcing_jax.main --config=configs/tiny.py --workdir=runs/tiny
"""

from kforcing_jax.config import default_config, default_stage


def get_config():
    config = default_config()
    config.data.source = "news"
    config.data.seq_len = 64
    shared = dict(learning_rate=2e-3, schedule="cosine", warmup_steps=20, ema_decay=0.99)
    config.stages.unlock()
    config.stages.ar = default_stage(steps=600, batch_size=32, **shared)
    config.stages.k1 = default_stage(window=1, steps=500, batch_size=16, **shared)
    config.stages.k2 = default_stage(window=2, steps=350, batch_size=16, **shared)
    config.stages.k4 = default_stage(window=4, steps=300, batch_size=8, **shared)
    return config.lock()
