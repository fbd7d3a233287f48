"""What a pass of the engine has to do at least: weights and live cache read once, the arithmetic of its rows."""

import dataclasses

from kforcing_jax.decoding.passes import MODELS, Models

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
    """Of one pass of a mode over `slots` texts that have `live` tokens each (`exact`: one of either model)."""
    known, k = models.k + (mode == "exact"), models.k
    costs = {
        "student": lambda: (
            _model_cost(models.config("student"), slots, live, rows=known + k, drawn=k) + _noise(models, slots)
        ),
        "teacher": lambda: _model_cost(models.config("teacher"), slots, live, rows=known if mode == "exact" else 1),
    }
    return sum((costs[name]() for name in MODELS[mode]), Cost(0, 0))


def _model_cost(cfg, slots, live, rows, drawn=None):
    """`rows` tokens of every text pass the layers, `drawn` of them also the last one and the output layer."""
    drawn, width = rows if drawn is None else drawn, cfg.d_model
    # In the last layer the others give keys and values only: 3 of 12 squares of the width, as queries are of all.
    through = rows * (cfg.num_layers - 1) + drawn
    flops = 2 * slots * (12 * width**2 * through + 3 * width**2 * (rows - drawn) + drawn * width * cfg.vocab_size)
    flops += 4 * slots * width * live * through
    weights = 12 * width**2 * cfg.num_layers * _BYTES[cfg.dtype] + width * cfg.vocab_size * _F32
    cache = 2 * cfg.num_layers * slots * live * width * _BYTES[cfg.dtype]
    return Cost(flops, weights + cache)


def _noise(models, slots):
    """The noise encoder; what depends on the temperature is computed once a request."""
    squares = 9 * models.config("student").d_model ** 2
    return Cost(2 * slots * models.k * squares, squares * _F32)
