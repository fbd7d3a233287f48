"""What a pass of the engine has to do at least: weights and live cache read once, the arithmetic of its rows."""

import dataclasses

from kforcing_jax.decoding.passes import Models
from kforcing_jax.models import ModelConfig
from kforcing_jax.models.gated import delta_size

_F32 = 4
_BYTES = {"float32": 4, "bfloat16": 2}


@dataclasses.dataclass(frozen=True)
class Cost:
    """FLOPs, and bytes that are moved."""

    flops: float
    bytes: float

    def __add__(self, other: "Cost") -> "Cost":
        return Cost(self.flops + other.flops, self.bytes + other.bytes)


def pass_cost(models: Models, mode: str, slots: int, live: int) -> Cost:
    """Of one step of a mode over `slots` texts that have `live` tokens each.

    It is one pass, of mode `exact` one of either model; of a gated student with `exact_windows` one that does both.
    """
    k = models.k
    if mode == "ar":
        assert models.causal is not None
        return _model_cost(models.causal.cfg, slots, live, known=1, drawn=1)
    student = models.config("student")
    if mode == "student":
        return _model_cost(student, slots, live, known=k, noise=k, drawn=k) + _noise(models, slots, k)
    if models.is_one_pass:
        return _one_pass_cost(models, slots, live)
    known = 1 if models.is_shared else k + 1
    draft = _model_cost(student, slots, live, known=known, noise=k, drawn=k) + _noise(models, slots, k)
    assert models.causal is not None
    return draft + _model_cost(models.causal.cfg, slots, live, known=k + 1, drawn=k + 1)


def _one_pass_cost(models, slots, live):
    """Known tokens draw, the windows of all anchors pass the layers; the output layer passes one, or all at once."""
    k, windows, cfg = models.k, models.exact_windows, models.config("student")
    if k == 1:
        return _model_cost(models.causal.cfg, slots, live, known=1, drawn=1)
    through = _model_cost(cfg, slots, live, known=k, noise=windows * k, last=k + windows * (k - 1), drawn=0)
    if models.reads_output_once(slots):
        heads = _head_cost(cfg, slots, k + windows * (k - 1))
    else:
        heads = _head_cost(cfg, slots, k) + _head_cost(cfg, slots, k - 1)
    return through + heads + _head_delta_cost(cfg, slots, k - 1) + _noise(models, slots, windows * k)


def _model_cost(cfg: ModelConfig, slots, live, known, noise=0, last=None, drawn=0):
    """`known` tokens of every text and `noise` ones pass the layers, `last` (by default `drawn`) of them the last one.

    `drawn` pass the output layer, and its delta where there is one: then they are noise.
    """
    rows, width = known + noise, cfg.num_heads * cfg.head_width
    last = drawn if last is None else last
    squares, keys = cfg.block_entries, sum(inputs * outputs for inputs, outputs in cfg.matrices[:3])
    # In the last layer the others give keys and values only (with queries, which are of all).
    through, projected = rows * (cfg.num_layers - 1) + last, rows - last
    flops = 2 * slots * (squares * through + keys * projected) + 4 * slots * width * live * through
    cache = 2 * cfg.num_layers * slots * live * cfg.kv_heads * cfg.head_width * _BYTES[cfg.dtype]
    cost = Cost(flops, squares * cfg.num_layers * _BYTES[cfg.dtype] + cache)
    if noise and cfg.is_gated:
        cost += _deltas_cost(cfg, slots, noise)
    if drawn:
        cost += _head_cost(cfg, slots, drawn)
        cost += _head_delta_cost(cfg, slots, drawn) if noise else Cost(0, 0)
    return cost


def _head_cost(cfg, slots, rows):
    """The output layer; of a batch of rows it is read once, in the dtype of the parameters."""
    numbers = cfg.d_model * cfg.vocab_size
    return Cost(2 * slots * rows * numbers, numbers * _BYTES[cfg.weights_dtype])


def _head_delta_cost(cfg, slots, rows):
    numbers = delta_size(cfg.adapter_rank, cfg.d_model, cfg.vocab_size)
    return Cost(2 * slots * rows * numbers, numbers * _F32)


def _deltas_cost(cfg, slots, rows):
    """What noise rows add to the matrices of the blocks."""
    numbers = cfg.num_layers * sum(delta_size(cfg.adapter_rank, *shape) for shape in cfg.matrices)
    return Cost(2 * slots * rows * numbers, numbers * _BYTES[cfg.dtype])


def _noise(models, slots, rows):
    """The noise encoder; what depends on the temperature is computed once a request."""
    squares = 9 * models.config("student").d_model ** 2
    return Cost(2 * slots * rows * squares, squares * _F32)
