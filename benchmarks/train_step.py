"""Window attention against the dense mask, and a student's training step against an AR step of as many tokens.

python benchmarks/train_step.py --lengths=128,512,1024 --ks=1,2,4

Three programs per length N and window k, each one forward and backward pass of a whole model with its loss (for the
students without the rollout of their targets, which the attention of the student has no part in):

  windows   the student as it trains, N positions with a window of k after each
  dense     the same student with the released code's attention: one (1 + k) N square mask
  ar        an AR model on (1 + k) times as many rows of N positions: as many tokens

They run in one process, take turns, and the medians are compared. Memory is what the compiler allots for temporaries.
"""

import datetime
import functools
import json
import sys

import jax
import jax.numpy as jnp
from absl import app, flags
from dense_mask import mask_attention
from device import device_text

from kforcing_jax.config import REMATS
from kforcing_jax.data.packing import Batch
from kforcing_jax.evaluation.timing import in_turns
from kforcing_jax.models import CausalLM, ModelConfig, PushForwardLM, attention, backbone, init_params
from kforcing_jax.models.keys import Causal, KeyValue
from kforcing_jax.noise import sample_uniform
from kforcing_jax.training.flops import attended_pairs
from kforcing_jax.training.losses import loss_and_agreement
from kforcing_jax.training.objectives import language_modelling

_LENGTHS = flags.DEFINE_list("lengths", ["128", "512", "1024"], "Positions per row.")
_KS = flags.DEFINE_list("ks", ["1", "2", "4"], "Windows.")
_TOKENS = flags.DEFINE_integer("tokens", 1024, "Text positions per step; rows are these over the length.")
_LAYERS = flags.DEFINE_integer("num_layers", 2, "Layers.")
_WIDTH = flags.DEFINE_integer("d_model", 256, "Width of the model.")
_HEADS = flags.DEFINE_integer("num_heads", 4, "Attention heads.")
_VOCABULARY = flags.DEFINE_integer("vocab_size", 512, "Vocabulary; small, so that attention is what is measured.")
_DTYPE = flags.DEFINE_enum("dtype", "float32", ["float32", "bfloat16"], "Compute dtype of the blocks.")
_REMAT = flags.DEFINE_enum("remat", "blocks", REMATS, "What the backward pass keeps.")
_REPEATS = flags.DEFINE_integer("repeats", 7, "Timed runs of each program.", lower_bound=1)
_JSON = flags.DEFINE_bool("json", False, "End with one JSON object on one line.")


def main(_):
    out = sys.stderr if _JSON.value else sys.stdout
    print(
        f"{device_text()}, {_LAYERS.value} layers of {_WIDTH.value}, {_DTYPE.value}, {_TOKENS.value} positions",
        file=out,
    )
    print(_HEADER, file=out, flush=True)
    results = []
    for length in map(int, _LENGTHS.value):
        for k in map(int, _KS.value):
            results.append(measure(length, k))
            print(_row(results[-1]), file=out, flush=True)
    if _JSON.value:
        settings = {flag: getattr(flags.FLAGS, flag) for flag in ("num_layers", "d_model", "num_heads", "vocab_size")}
        settings |= {"dtype": _DTYPE.value, "remat": _REMAT.value, "tokens": _TOKENS.value, "repeats": _REPEATS.value}
        date = datetime.date.today().isoformat()
        print(json.dumps({"device": device_text(), "date": date, "settings": settings, "results": results}))


def measure(length: int, k: int) -> dict:
    """Median seconds, temporary bytes and attention FLOPs of the three programs, and their ratios."""
    rows = max(_TOKENS.value // length, 1)
    programs = {
        "windows": student_program(rows, length, k, "auto"),
        "dense": student_program(rows, length, k, "mask"),
        "ar": ar_program(rows * (1 + k), length),
    }
    compiled = {name: (function.lower(*inputs).compile(), inputs) for name, (function, inputs) in programs.items()}
    runs = {name: functools.partial(_run, program, inputs) for name, (program, inputs) in compiled.items()}
    times = in_turns(runs, _REPEATS.value)
    seconds = {name: times.median(name) for name in runs}
    memory = {name: program.memory_analysis().temp_size_in_bytes for name, (program, _) in compiled.items()}
    pairs = attended_pairs(length, 1 + k)
    needed = 4 * rows * pairs * _WIDTH.value
    flops = {name: attention_flops(rows, length, k, name) for name in ("auto", "mask")}
    return {
        "length": length,
        "k": k,
        "rows": rows,
        "seconds": seconds,
        "temporary_bytes": memory,
        "dense_over_windows_seconds": times.ratio("dense", "windows")["median"],
        "windows_over_ar_seconds": times.ratio("windows", "ar")["median"],
        "dense_over_windows_bytes": memory["dense"] / memory["windows"],
        "attention_flops_over_needed": {"windows": flops["auto"] / needed, "dense": flops["mask"] / needed},
    }


def student_program(rows, length, k, implementation):
    """(jitted gradient of a student's loss, its inputs)"""
    model = PushForwardLM(_model_config("auto" if implementation == "mask" else implementation))

    def loss(params, tokens, noise, targets):
        attend = mask_attention if implementation == "mask" else attention.group_attention
        with _attention(attend):
            variables, tau = {"params": params}, jnp.ones(rows)
            hidden = model.apply(variables, tokens, noise, tau, method="begin").noise.hidden
            return model.apply(variables, loss_and_agreement, hidden, targets, method="per_token")[0].mean()

    params, tokens = _params_and_tokens(model, rows, length)
    key = jax.random.key(1)
    noise = sample_uniform(key, (rows, length, k))
    targets = jax.random.randint(key, noise.shape, 0, _VOCABULARY.value)
    return jax.jit(jax.grad(loss)), (params, tokens, noise, targets)


def ar_program(rows, length):
    """(jitted gradient of an AR model's loss, its inputs)"""
    model = CausalLM(_model_config("auto"))
    objective = language_modelling(model)

    def loss(params, tokens):
        return objective.losses(params, {}, objective.draw_inputs(Batch(tokens), None))[0].value

    return jax.jit(jax.grad(loss)), _params_and_tokens(model, rows, length)


def attention_flops(rows: int, length: int, k: int, implementation: str) -> float:
    """FLOPs of one layer's attention, forward, as compiled without fusing anything else into it."""
    heads, width = _HEADS.value, _WIDTH.value // _HEADS.value
    x = jax.ShapeDtypeStruct((rows, length, 1 + k, heads, width), jnp.float32)

    def attend(q, key, value):
        text, own = (KeyValue(key[:, :, at], value[:, :, at]) for at in (0, slice(1, None)))
        function = mask_attention if implementation == "mask" else attention.group_attention
        return function(q, own, text, Causal())

    return jax.jit(attend).lower(x, x, x).compile().cost_analysis()["flops"]


def _run(program, inputs):
    jax.block_until_ready(program(*inputs))


class _attention:
    """Blocks attend with another function while they are traced."""

    def __init__(self, function):
        self._function = function

    def __enter__(self):
        self._before, backbone.group_attention = backbone.group_attention, self._function

    def __exit__(self, *exception):
        backbone.group_attention = self._before


def _model_config(implementation):
    return ModelConfig(
        vocab_size=_VOCABULARY.value,
        mask_id=_VOCABULARY.value - 1,
        num_layers=_LAYERS.value,
        d_model=_WIDTH.value,
        num_heads=_HEADS.value,
        dtype=_DTYPE.value,
        remat=_REMAT.value,
        attention=implementation,
    )


def _params_and_tokens(model, rows, length):
    params = jax.jit(functools.partial(init_params, model))(jax.random.key(0))
    return params, jax.random.randint(jax.random.key(2), (rows, length), 0, _VOCABULARY.value - 1)


_HEADER = (
    f"{'N':>5} {'k':>2} {'rows':>4}   {'dense / windows':>15} {'windows / AR':>12}   {'dense / windows':>15}   "
    f"{'attention FLOPs / needed':>24}\n{'':>15} {'time':>14} {'time':>12} {'memory':>16} {'windows':>17} {'dense':>8}"
)


def _row(r: dict) -> str:
    flops = r["attention_flops_over_needed"]
    return (
        f"{r['length']:>5} {r['k']:>2} {r['rows']:>4}   {r['dense_over_windows_seconds']:>14.2f}x "
        f"{r['windows_over_ar_seconds']:>11.2f}x   {r['dense_over_windows_bytes']:>14.1f}x   "
        f"{flops['windows']:>14.2f}x {flops['dense']:>7.1f}x"
    )


if __name__ == "__main__":
    app.run(main)
