"""Drawing tokens from logits: a search of sqrt(V) blocks against a running sum over the whole vocabulary.

python benchmarks/draw.py --vocab_sizes=512,30522,50258

Four programs per vocabulary, on the same logits and uniforms:

  search        `noise.inverse_cdf`: the sums of sqrt(V) blocks, and the running sum inside one of them
  running_sum   the same tokens by a compensated running sum over all of V
  argmax        `noise.argmax`: the maximum, then the least index that equals it
  jnp_argmax    `jnp.argmax`

They run in one process and take turns; times are medians, ratios those of neighbouring runs with their quartiles. No
ratio is printed unless both programs of a pair gave the same tokens.
"""

import datetime
import functools
import hashlib
import json
import sys

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags
from device import device_text

from kforcing_jax import noise
from kforcing_jax.evaluation.timing import in_turns

_ROWS = flags.DEFINE_integer("rows", 64, "Draws at a time.", lower_bound=1)
_VOCAB_SIZES = flags.DEFINE_list("vocab_sizes", ["512", "30522", "50258"], "Vocabularies.")
_REPEATS = flags.DEFINE_integer("repeats", 15, "Timed runs of each program.", lower_bound=1)
_JSON = flags.DEFINE_bool("json", False, "End with one JSON object on one line.")


def running_sum(logits_xV: jax.Array, u_x: jax.Array) -> jax.Array:
    """`noise.inverse_cdf` without blocks: F of every token, by sums that carry their rounding errors."""
    weights_xV = jnp.exp(logits_xV - jnp.max(logits_xV, axis=-1, keepdims=True))
    total, error = noise._running_sums((weights_xV, jnp.zeros_like(weights_xV)))
    sums_xV = total + error
    beyond_xV = (weights_xV > 0) & (sums_xV > u_x[..., None] * sums_xV[..., -1:])
    return jnp.argmax(beyond_xV, axis=-1).astype(jnp.int32)


_PAIRS = {"search": "running_sum", "argmax": "jnp_argmax"}
_PROGRAMS = {
    "search": noise.inverse_cdf,
    "running_sum": running_sum,
    "argmax": lambda logits_xV, u_x: noise.argmax(logits_xV),
    "jnp_argmax": lambda logits_xV, u_x: jnp.argmax(logits_xV, axis=-1),
}


def measure(vocab_size: int) -> dict:
    """Medians in milliseconds, ratios with their spread, and a hash of the tokens of one vocabulary."""
    rng = np.random.default_rng(0)
    logits = jnp.asarray(3 * rng.normal(size=(_ROWS.value, vocab_size)), jnp.float32)
    u = jnp.asarray(rng.random(_ROWS.value), jnp.float32)
    compiled = {name: jax.jit(function) for name, function in _PROGRAMS.items()}
    tokens = {name: np.asarray(function(logits, u), np.int32) for name, function in compiled.items()}
    runs = {name: functools.partial(lambda f: jax.block_until_ready(f(logits, u)), f) for name, f in compiled.items()}
    times = in_turns(runs, _REPEATS.value)
    for ours, reference in _PAIRS.items():
        if not np.array_equal(tokens[ours], tokens[reference]):
            raise SystemExit(f"V = {vocab_size}: {ours} and {reference} do not give the same tokens")
    return {
        "vocab_size": vocab_size,
        "milliseconds": {name: 1e3 * times.median(name) for name in runs},
        "speed_up": {ours: times.ratio(reference, ours) for ours, reference in _PAIRS.items()},
        "tokens_sha256": {name: hashlib.sha256(tokens[name].tobytes()).hexdigest()[:16] for name in _PAIRS},
    }


def main(_):
    out = sys.stderr if _JSON.value else sys.stdout
    print(f"{device_text()}, {_ROWS.value} draws at a time", file=out)
    results = []
    for vocab_size in map(int, _VOCAB_SIZES.value):
        results.append(measure(vocab_size))
        print(_line(results[-1]), file=out, flush=True)
    if _JSON.value:
        settings = {"rows": _ROWS.value, "repeats": _REPEATS.value}
        date = datetime.date.today().isoformat()
        print(json.dumps({"device": device_text(), "date": date, "settings": settings, "results": results}))


def _line(result) -> str:
    cells = [f"V = {result['vocab_size']:>7,}"]
    for ours, reference in _PAIRS.items():
        milliseconds, ratio = result["milliseconds"], result["speed_up"][ours]
        cells.append(
            f"{ours} {milliseconds[ours]:.2f} ms, {reference} {milliseconds[reference]:.2f} ms: "
            f"{ratio['median']:.1f}x [{ratio['low']:.1f}, {ratio['high']:.1f}]"
        )
    return "   ".join(cells)


if __name__ == "__main__":
    app.run(main)
