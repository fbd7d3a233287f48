"""The paper's LM1B run: 12 layers, 128 positions, k = 1, 2 and 4, on one TPU v5e slice of 8 chips.

    python launch/compile_for_tpu.py --config=configs/lm1b.py --topology=v5e:2x4

compiles every stage for that slice on any machine and says what it takes; docs/scaling.md holds what it said. The
numbers are the paper's, as in configs/owt.py, but for one: the released code gives every sentence a row of its own,
padded to 128, and three quarters of its compute are padding. Here sentences share rows, each a segment of its own
(`data.packing = "segments"`), so a step of 512 rows sees about four times as many sentences.

The data of the paper (bert-base-uncased, V = 30,522; the test split for validation) needs a source that is not here
yet. Until it is, this trains a byte-level BPE of that size on text files of your own, one sentence a line:
--config.data.path='lm1b/*.txt'.
"""

from kforcing_jax.config import default_config, default_stage


def get_config():
    config = default_config()
    config.data.source = "text_files"
    config.data.path = "lm1b/*.txt"
    config.data.document_separator = "\n"
    config.data.packing = "segments"
    config.data.tokenizer = "bpe"
    config.data.vocab_size = 30_522
    config.data.seq_len = 128
    config.model.num_layers = 12
    config.model.d_model = 768
    config.model.num_heads = 12
    config.model.remat = "attention"
    config.mesh.data = -1
    config.evaluation.update(batch_size=64, rows=4096, samples=256, prompt_length=6, new_tokens=122)
    config.logging.update(log_every=100, checkpoint_every=5000)
    shared = dict(steps=500_000, batch_size=512, bfloat16_fraction=0.8)
    config.stages.unlock()
    config.stages.ar = default_stage(**shared)
    config.stages.k1 = default_stage(window=1, **shared)
    config.stages.k2 = default_stage(window=2, **shared)
    config.stages.k4 = default_stage(window=4, **shared)
    return config.lock()
