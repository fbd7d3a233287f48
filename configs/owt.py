"""The paper's OpenWebText run: 12 layers, 1,024 positions, k = 1, 2 and 4, on one TPU v5e slice of 8 chips.

    python launch/compile_for_tpu.py --config=configs/owt.py --topology=v5e:2x4

compiles every stage for that slice on any machine and says what it takes; docs/scaling.md holds what it said. The
numbers are the paper's (arXiv 2606.10820, appendix, training details): AdamW and EMA are the defaults of
`default_stage`, 512 sequences a step, 500k steps a stage, of which the first 400k in half precision. Ours is bfloat16,
theirs was float16 with loss scaling; they found bfloat16 too coarse to the end, and so the last 100k steps run in f32.

The data of the paper (GPT-2's tokenizer, V = 50,258 with the mask id; the last 100k documents for validation) needs a
source that is not here yet. Until it is, this trains a byte-level BPE of that size on text files of your own:
--config.data.path='openwebtext/*.jsonl'.
"""

from kforcing_jax.config import default_config, default_stage


def get_config():
    config = default_config()
    config.data.source = "text_files"
    config.data.path = "openwebtext/*.jsonl"
    config.data.tokenizer = "bpe"
    config.data.vocab_size = 50_258
    config.data.seq_len = 1024
    config.model.num_layers = 12
    config.model.d_model = 768
    config.model.num_heads = 12
    config.model.remat = "attention"
    # Parameters, optimiser state and teacher together take 3 GB: copies are cheaper than gathering them every layer.
    config.mesh.data = -1
    config.evaluation.update(batch_size=8, rows=512, samples=64, prompt_length=64, new_tokens=448)
    config.logging.update(log_every=100, checkpoint_every=5000)
    # 64 rows a step on each of 8 chips, as many at a time as fit.
    shared = dict(steps=500_000, batch_size=512, bfloat16_fraction=0.8)
    config.stages.unlock()
    config.stages.ar = default_stage(accumulation=2, **shared)
    config.stages.k1 = default_stage(window=1, accumulation=4, **shared)
    config.stages.k2 = default_stage(window=2, accumulation=8, **shared)
    config.stages.k4 = default_stage(window=4, accumulation=8, **shared)
    return config.lock()
