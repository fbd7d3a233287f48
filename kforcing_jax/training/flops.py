"""Floating-point operations that a stage's arithmetic needs: nothing repeated, nothing masked away."""

from kforcing_jax.config import Config, predecessors

# A backward pass costs twice the forward pass: gradients of activations and of weights.
_FORWARD_AND_BACKWARD = 3


def step_flops(config: Config, name: str, vocab_size: int) -> float:
    """FLOPs of one training step over all devices: student forward and backward, and the teacher's rollout."""
    stage, length = config.stages[name], config.data.seq_len
    student = _pass_flops(config, vocab_size, group=1 + stage.window, past=0, drawn=max(stage.window, 1))
    teacher, _ = predecessors(config, name)
    rollout = (
        0.0 if teacher is None else _rollout_flops(config, vocab_size, stage.window, config.stages[teacher].window)
    )
    return stage.batch_size * length * (_FORWARD_AND_BACKWARD * student + rollout)


def attended_pairs(length: int, group: int) -> float:
    """Query-key pairs of one head over one text, every position with a group of tokens (DESIGN: W N^2/2 + N W^2/2)."""
    windows = group - 1
    return group * length * (length + 1) / 2 + length * windows * (windows + 1) / 2


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
    layers, width = config.model.num_layers, config.model.d_model
    pairs = attended_pairs(config.data.seq_len, group) / config.data.seq_len + group * past
    weights = 12 * width**2  # 4 for queries, keys, values and output; 8 for the MLP
    return 2 * layers * (group * weights + 2 * width * pairs) + 2 * drawn * width * vocab_size
