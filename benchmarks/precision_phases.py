"""What a coarser last phase of a stage costs: one student, trained again with its matrix products in other precisions.

    python benchmarks/precision_phases.py --workdir=runs/tiny --output=precision_phases.json

The paper trains four fifths of a stage in half precision and the last fifth in f32, which on an accelerator takes three
fifths of the time. Here the last fifth is also tried with fewer bits. A CPU has no such products, so they are
imitated: both factors of every f32 product are rounded to the bits that the hardware's way keeps (bfloat16 8, TF32 11,
three bfloat16 passes, which JAX calls `high`, 16) and multiplied in f32. Students are evaluated in f32.
"""

import contextlib
import functools

from absl import app, flags
from jax._src.lax.lax import _dot_general_lower, dot_general_p
from jax._src.lib.mlir.dialects import hlo
from jax.interpreters import mlir
from students import Experiment, Training, line, say, write_json

from kforcing_jax.config import predecessors

_WORKDIR = flags.DEFINE_string("workdir", None, "A finished run.", required=True)
_STAGE = flags.DEFINE_string("stage", "k4", "The student.")
_SCALE = flags.DEFINE_float("scale", 1.0, "Of the run's steps.", lower_bound=0.0)
_OUTPUT = flags.DEFINE_string("output", None, "Where the figures go, as JSON; they are printed in any case.")

# Bits of a significand, the leading one included.
_F32, _HIGH, _TF32, _BFLOAT16 = 24, 16, 11, 8
# Name -> (dtype of the blocks, bits of f32 products) of the last fifth, after four fifths in bfloat16.
LAST_FIFTHS = {
    "bfloat16, then f32 (the paper's kind)": ("float32", _F32),
    "bfloat16, then f32 with high products": ("float32", _HIGH),
    "bfloat16, then f32 with TF32 products": ("float32", _TF32),
    "bfloat16 throughout": ("bfloat16", _BFLOAT16),
}


@contextlib.contextmanager
def products_of(bits: int):
    """Rounds both factors of every f32 matrix product of what is compiled meanwhile, on a CPU."""

    def rounded(ctx, lhs, rhs, **settings):
        factors = [
            hlo.reduce_precision(x, exponent_bits=8, mantissa_bits=bits - 1) if aval.dtype == "float32" else x
            for x, aval in zip((lhs, rhs), ctx.avals_in, strict=True)
        ]
        return _dot_general_lower(ctx, *factors, platform="cpu", **settings)

    # How a product is lowered is private to JAX; there is no public place that all of them pass.
    usual = functools.partial(_dot_general_lower, platform="cpu")
    mlir.register_lowering(dot_general_p, rounded if bits < _F32 else usual, platform="cpu")
    yield
    mlir.register_lowering(dot_general_p, usual, platform="cpu")


def main(_):
    results = {}
    with Experiment.opened(_WORKDIR.value) as experiment:
        name = _STAGE.value
        teacher, origin = map(experiment.stage, predecessors(experiment.config, name))
        student, _ = experiment.stage(name)
        steps = max(round(experiment.config.stages[name].steps * _SCALE.value), 5)

        def measured(variant, training):
            results[variant] = experiment.figures(name, student, training.state.ema)
            say(variant, line(results[variant]))

        begun = Training(experiment, name, student, teacher, origin[1], steps)
        whole = begun.branched()
        whole.advance(steps)
        measured("f32 throughout", whole)
        with products_of(_BFLOAT16):
            begun.advance(round(0.8 * steps), "bfloat16")
        for variant, (dtype, bits) in LAST_FIFTHS.items():
            training = begun.branched()
            with products_of(bits):
                training.advance(steps, dtype)
            measured(variant, training)
        write_json(_OUTPUT.value, experiment, {"steps": steps, "stage": name, "variants": results})


if __name__ == "__main__":
    app.run(main)
