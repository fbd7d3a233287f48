"""Floating-point operations that a stage's arithmetic needs: nothing repeated, nothing masked away.

And what a device can do, so that a share of it can be told.
"""

from kforcing_jax.config import BackboneConfig, Config, predecessors
from kforcing_jax.models.gated import delta_size

# A backward pass costs twice the forward pass: gradients of activations and of weights.
_FORWARD_AND_BACKWARD = 3
# Where only the gradients of activations are wanted.
_FORWARD_AND_INPUTS = 2

# Dense bfloat16 operations per second of a device in TFLOP/s, by the beginning of its `device_kind`, the first that
# fits. TPUs: docs.cloud.google.com/tpu/docs, the page of each version; GPUs: NVIDIA's data sheets, without sparsity.
_PEAK_TERAFLOPS = (
    ("TPU v4", 275.0),
    ("TPU v5 lite", 197.0),
    ("TPU v5e", 197.0),
    ("TPU v5", 459.0),  # v5p
    ("TPU v6", 918.0),  # v6e
    ("NVIDIA H100 PCIe", 756.0),
    ("NVIDIA H100 NVL", 835.0),
    ("NVIDIA H100", 989.0),
    ("NVIDIA H200", 989.0),
    ("NVIDIA A100", 312.0),
)


def peak_teraflops(device_kind: str) -> float | None:
    """A device's peak in bfloat16, TFLOP/s, None where it is not known, as of a CPU."""
    return next((peak for name, peak in _PEAK_TERAFLOPS if device_kind.startswith(name)), None)


def step_flops(config: Config, name: str, vocab_size: int) -> float:
    """FLOPs of one training step over all devices: student forward and backward, and the teacher's rollout.

    A gated student shares one pass over the text with the rollout; its noise rows alone have a backward pass, which
    has no gradients of the matrices to compute, but those of its deltas.
    """
    stage, length = config.stages[name], config.data.seq_len
    teacher, _ = predecessors(config, name)
    teacher_window = config.stages[teacher].window if teacher else 0
    rollout = 0.0 if teacher is None else _rollout_flops(config, vocab_size, stage.window, teacher_window)
    if config.model.adapter_rank and stage.window:
        text = _pass_flops(config, vocab_size, group=1, past=0, drawn=0)
        noise = _noise_flops(config, vocab_size, stage.window)
        return stage.batch_size * length * (text + stage.windows * (rollout - text + noise))
    student = _pass_flops(config, vocab_size, group=1 + stage.window, past=0, drawn=max(stage.window, 1))
    return stage.batch_size * length * (_FORWARD_AND_BACKWARD * student + rollout)


def _noise_flops(config, vocab_size, window):
    """Forward and backward FLOPs per position of a gated student's noise rows."""
    rows = _pass_flops(config, vocab_size, group=1 + window, past=0, drawn=window)
    rows -= _pass_flops(config, vocab_size, group=1, past=0, drawn=0)
    return _FORWARD_AND_INPUTS * rows + _FORWARD_AND_BACKWARD * 2 * window * delta_entries(config.model, vocab_size)


def delta_entries(model: BackboneConfig, vocab_size: int) -> int:
    """Entries of all deltas of a gated student: of every matrix of its blocks, and of the output layer."""
    matrices = [*model.matrices * model.num_layers, (model.d_model, vocab_size)]
    return sum(delta_size(model.adapter_rank, *shape) for shape in matrices)


def attended_pairs(length: int, group: int, past: int = 0, sliding_window: int = 0) -> float:
    """Query-key pairs of one head over one text, every position with a group of tokens after `past` of its own.

    Token j of the group at position t sees t + past + j tokens (DESIGN: W N^2/2 + N W^2/2 in all), or those of them
    that a sliding window lets through.
    """
    width = sliding_window or length + past + group
    pairs = 0.0
    for before in range(past, past + group):
        growing = min(max(width - before, 0), length)  # positions that see everything
        pairs += growing * (growing + 1) / 2 + growing * before + (length - growing) * width
    return pairs


def _rollout_flops(config, vocab_size, window, teacher_window):
    """Per position. A teacher with a window of its own gets its tokens and as many noise tokens in each pass."""
    if not teacher_window:
        return sum(_pass_flops(config, vocab_size, group=1, past=done, drawn=1) for done in range(window))
    chunk = window // 2 if window > 1 else 1
    first = _pass_flops(config, vocab_size, group=1 + chunk, past=0, drawn=chunk)
    later = (
        _pass_flops(config, vocab_size, group=2 * chunk, past=done - chunk, drawn=chunk)
        for done in range(chunk, window, chunk)
    )
    return first + sum(later)


def _pass_flops(config, vocab_size, group, past, drawn):
    """Forward FLOPs per position: `group` tokens that see half the text, `past` tokens of their anchor, each other."""
    model = config.model
    pairs = attended_pairs(config.data.seq_len, group, past, model.sliding_window) / config.data.seq_len
    weights, width = model.block_entries, model.num_heads * model.head_width
    return 2 * model.num_layers * (group * weights + 2 * width * pairs) + 2 * drawn * model.d_model * vocab_size
