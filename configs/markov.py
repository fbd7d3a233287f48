"""An enumerable teacher: the student's joint distribution, exactly.

    python -m kforcing_jax.main --config=configs/markov.py --workdir=runs/markov

An AR teacher learns a random Markov chain of six states. Its joint over all 6^k blocks is computed exactly, and 20,000
blocks of each student at each of 8 contexts are compared with it (total variation, G-test), next to a sample of the
same size from that joint. k = 4 is trained twice: from the k = 2 student (`k4`, the paper's recipe) and from the AR
teacher itself (`k4-from-ar`). Tokens lie on [0, 1) in the order of their ids: of six random
states any order is as good.
"""

from kforcing_jax.config import default_config, default_stage


def get_config():
    config = default_config()
    config.data.source = "markov"
    config.data.seq_len = 8
    config.data.markov_rows = 50_000
    config.mesh.data = 1  # batches are small: one device, whatever there is
    config.model.num_layers = 4
    config.model.d_model = 64
    config.evaluation.prompt_length = 4
    config.evaluation.new_tokens = 4
    config.evaluation.joint_contexts = 8
    config.evaluation.joint_samples = 20_000
    config.logging.log_every = 100
    config.logging.checkpoint_every = 500
    shared = dict(batch_size=32, learning_rate=2e-3, schedule="cosine", warmup_steps=20, ema_decay=0.99)
    config.stages.unlock()
    config.stages.ar = default_stage(steps=600, **shared)
    config.stages.k1 = default_stage(window=1, steps=2500, **shared)
    config.stages.k2 = default_stage(window=2, steps=2000, **shared)
    config.stages.k4 = default_stage(window=4, steps=800, **shared)
    config.stages.k4_from_ar = default_stage(window=4, teacher="ar", steps=800, **shared)
    return config.lock()
