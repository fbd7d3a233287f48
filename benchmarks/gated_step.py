"""A gated student's training step against an ordinary student's: time, memory, and what is kept of a stage.

    python benchmarks/gated_step.py --length=256 --windows=1,2,4

Whole steps as they train: rollout of the AR teacher, student forward and backward, optimiser, average. For each window
the programs run in one process and take turns, and the medians are compared. Memory is what a step needs in all, with
the old state's given up for the new one: teacher, state (parameters, average, moments) and temporaries.
"""

import dataclasses
import datetime
import functools
import json
import sys

import jax
import jax.numpy as jnp
from absl import app, flags
from device import device_text

from kforcing_jax.config import StageConfig
from kforcing_jax.data.packing import Batch
from kforcing_jax.evaluation.timing import in_turns
from kforcing_jax.models import CausalLM, ModelConfig, PushForwardLM, init_params
from kforcing_jax.training.objectives import distillation
from kforcing_jax.training.optimizer import make_optimizer
from kforcing_jax.training.recipes import trained_part
from kforcing_jax.training.step import init_state, train_step

_LENGTH = flags.DEFINE_integer("length", 256, "Positions per row.", lower_bound=2)
_ROWS = flags.DEFINE_integer("rows", 4, "Rows per step.", lower_bound=1)
_WINDOWS = flags.DEFINE_list("windows", ["1", "2", "4"], "Windows k.")
_RANK = flags.DEFINE_integer("rank", 32, "Of the deltas.")
_SHAPE = flags.DEFINE_list("shape", ["4", "256", "4", "2048"], "Layers, width, heads, vocabulary.")
_REPEATS = flags.DEFINE_integer("repeats", 7, "Timed runs of each program.", lower_bound=1)
_JSON = flags.DEFINE_bool("json", False, "End with one JSON object on one line.")


def main(_):
    out = sys.stderr if _JSON.value else sys.stdout
    print(f"{device_text()}, shape {'x'.join(_SHAPE.value)}, {_ROWS.value} rows of {_LENGTH.value}", file=out)
    results = [measure(int(k)) for k in _WINDOWS.value]
    for r in results:
        line = f"k = {r['k']}: time {r['gated_over_ordinary_seconds']:.2f}x"
        line += f" [{', '.join(f'{q:.2f}' for q in r['quartiles'])}]"
        line += f" ({r['two_windows_over_ordinary_seconds']:.2f}x with two windows a position)"
        for name, what in (("bytes", "memory"), ("state_bytes", "of which state")):
            line += f", {what} {r[name]['gated'] / r[name]['ordinary']:.2f}x"
        print(line, file=out)
    if _JSON.value:
        settings = {name: getattr(flags.FLAGS, name) for name in ("length", "rows", "rank", "shape", "repeats")}
        about = {"device": device_text(), "date": datetime.date.today().isoformat(), "settings": settings}
        print(json.dumps(about | {"results": results}))


def measure(k: int) -> dict:
    """Median seconds, bytes, and of these bytes of the state, of three programs, and ratios of the seconds."""
    steps = {"ordinary": step_of(k, 0), "gated": step_of(k, _RANK.value), "two windows": step_of(k, _RANK.value, 2)}
    programs = {name: (jax.jit(f).lower(*inputs).compile(), inputs) for name, (f, inputs) in steps.items()}
    times = in_turns({name: functools.partial(_run, *each) for name, each in programs.items()}, _REPEATS.value)
    ratio = times.ratio("gated", "ordinary")
    return {
        "k": k,
        "seconds": {name: times.median(name) for name in programs},
        "bytes": {name: _bytes(*each) for name, each in steps.items()},
        "state_bytes": {name: sum(x.nbytes for x in jax.tree.leaves(each[1][0])) for name, each in programs.items()},
        "gated_over_ordinary_seconds": ratio["median"],
        "quartiles": [ratio["low"], ratio["high"]],
        "two_windows_over_ordinary_seconds": times.ratio("two windows", "ordinary")["median"],
    }


def step_of(k: int, rank: int, windows: int = 1) -> tuple:
    """(training step with the AR teacher, its inputs)"""
    layers, width, heads, vocabulary = map(int, _SHAPE.value)
    sizes = dict(vocab_size=vocabulary, mask_id=vocabulary - 1, num_layers=layers, d_model=width, num_heads=heads)
    teacher = CausalLM(ModelConfig(**sizes))
    student = PushForwardLM(dataclasses.replace(teacher.cfg, adapter_rank=rank))
    stage = StageConfig(window=k, teacher="ar", windows=windows)
    objective, optimizer = distillation(student, teacher, stage, None), make_optimizer(stage)
    key = jax.random.key(0)
    teacher_params = jax.jit(functools.partial(init_params, teacher))(key)
    state = init_state(trained_part(student, jax.jit(functools.partial(init_params, student))(key)), optimizer)
    tokens = jax.random.randint(key, (_ROWS.value, _LENGTH.value), 0, vocabulary - 1, jnp.int32)

    def step(state, teacher_params, tokens):
        given = dict(objective=objective, optimizer=optimizer, teacher_params=teacher_params)
        return train_step(state, Batch(tokens), key, **given)

    return step, (state, teacher_params, tokens)


def _bytes(step, inputs) -> int:
    """What a step needs that writes the new state over the old one."""
    memory = jax.jit(step, donate_argnums=0).lower(*inputs).compile().memory_analysis()
    return memory.argument_size_in_bytes + memory.temp_size_in_bytes


def _run(program, inputs):
    jax.block_until_ready(program(*inputs))


if __name__ == "__main__":
    app.run(main)
